"""Measurements of speed and quality. Run from the repository: `python -m benchmarks.cpu.speed`."""

from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
