"""CUDA kernels on the CPU: `EmulatedLauncher` runs csrc/cuda as the driver would."""

from .launcher import EmulatedLauncher, EmulationError

__all__ = ["EmulatedLauncher", "EmulationError"]
