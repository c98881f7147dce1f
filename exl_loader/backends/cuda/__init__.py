"""CUDA kernels: compiled with NVRTC or nvcc, launched through the driver; no PyTorch here."""
