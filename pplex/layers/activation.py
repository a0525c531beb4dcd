"""Activations for which MLX's own are slow on a CPU."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from pplex.layers.device import on_cpu


def elu(x: mx.array) -> mx.array:
    """ELU with alpha 1.

    MLX's ``exp`` is not vectorised in its Linux CPU build (25 ns a value, and the codec
    takes it of half a million values a frame), so there NumPy computes it.
    """
    if not on_cpu():
        return nn.elu(x)
    values = np.asarray(x)
    y = np.minimum(values, 0.0)
    np.exp(y, out=y)
    y -= 1.0
    y += np.maximum(values, 0.0)
    return mx.array(y)
