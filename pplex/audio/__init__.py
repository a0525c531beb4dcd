"""PCM in and out: files, streams and loudness (NumPy, no MLX)."""
