"""The engine of NVIDIA GPUs: kernels of ours around MLX's products."""
