"""What the host and MLX hand to each other while a GPU is busy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Coming:
    """An array on its way to the host: once ``array`` is begun, ``read`` waits."""

    array: mx.array
    read: Callable[[], np.ndarray]


class Exchange:
    """Arrays to MLX and back, as MLX does it."""

    def send(self, x: np.ndarray) -> mx.array:
        """An array of MLX's; ``x`` may change afterwards."""
        return mx.array(x)

    def bring(self, x: mx.array) -> Coming:
        """An array that nothing is to write to any more."""
        return Coming(x, lambda: np.array(x))
