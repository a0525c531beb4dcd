"""What MLX computes on: choices that depend on it ask here."""

from __future__ import annotations

import mlx.core as mx


def on_cpu() -> bool:
    """Whether MLX's default device is a CPU."""
    return mx.default_device() == mx.Device(mx.cpu)
