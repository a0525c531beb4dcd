"""Runs a loaded model on one device: plain MLX, compiled C, or CUDA kernels."""
