"""Shared by tests: makers of models and inputs, a double of the web UI, the emulated card."""

from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
