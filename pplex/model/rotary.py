"""Rotary embedding, interleaved pairs.

Follows NVIDIA's PersonaPlex, ``modules/rope.py``. Angles are float32 there, and so far
from the start that their rounding shows: they are made the same way.
"""

from __future__ import annotations

import functools
import math

import mlx.core as mx
import numpy as np


def rotate(x: mx.array, max_period: float, offset: int) -> mx.array:
    """Rotate ``x`` (batch, heads, t, head_dim); ``offset`` is the first's position."""
    b, heads, t, width = x.shape
    if t == 1:  # one small product instead of MLX's dozen operations
        return x @ _matrix(offset, width, max_period)
    cos, sin = turns(offset, t, width, max_period)
    pairs = x.reshape(b, heads, t, width // 2, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = [real * cos - imaginary * sin, real * sin + imaginary * cos]
    return mx.stack(turned, axis=-1).reshape(x.shape)


def frequencies(width: int, max_period: float) -> np.ndarray:
    """Angle from one position to the next of each pair, float32 (width / 2,)."""
    exponents = np.arange(width // 2, dtype=np.float32) * np.float32(
        -math.log(max_period) * 2 / width
    )
    rates: np.ndarray = np.exp(exponents.astype(np.float64))
    return rates.astype(np.float32)


def angles(
    start: int, t: int, width: int, max_period: float
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, float32 (t, width / 2), of positions from ``start`` on."""
    positions = np.arange(start, start + t, dtype=np.float32)
    angles = positions[:, None] * frequencies(width, max_period)
    return np.cos(angles), np.sin(angles)


@functools.lru_cache(maxsize=64)  # every layer of a chunk asks for the same ones
def turns(
    start: int, t: int, width: int, max_period: float
) -> tuple[mx.array, mx.array]:
    """``angles`` from ``start`` on as MLX has them."""
    cos, sin = angles(start, t, width, max_period)
    return mx.array(cos), mx.array(sin)


@functools.lru_cache(maxsize=64)  # every layer of a step asks for the same one
def _matrix(position: int, width: int, max_period: float) -> mx.array:
    """The rotation of one position, a matrix (width, width) to multiply by."""
    cos, sin = angles(position, 1, width, max_period)
    matrix = np.zeros((width, width), np.float32)
    even, odd = np.arange(0, width, 2), np.arange(1, width, 2)
    matrix[even, even] = matrix[odd, odd] = cos[0]
    matrix[even, odd] = sin[0]
    matrix[odd, even] = -sin[0]
    return mx.array(matrix)
