"""What MLX computes on: choices that depend on it ask here."""

from __future__ import annotations

import mlx.core as mx


def device_info() -> dict[str, str | int]:
    """What MLX says of its device; memory that it only keeps for later is free."""
    mx.clear_cache()
    return mx.device_info(mx.default_device())


def on_cpu() -> bool:
    """Whether MLX's default device is a CPU."""
    return mx.default_device() == mx.Device(mx.cpu)
