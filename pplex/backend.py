"""What MLX computes with: chosen once, before MLX is imported."""


def use_fast_blas() -> None:
    """Placeholder."""
