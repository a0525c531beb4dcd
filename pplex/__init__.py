"""pplex: PersonaPlex full-duplex speech models on recordings, in MLX."""
