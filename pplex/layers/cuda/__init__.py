"""CUDA kernels of our own, where MLX's take longer to launch or to run."""
