"""What tests share: makers of models and inputs, doubles of hosts, the emulated card."""

from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
