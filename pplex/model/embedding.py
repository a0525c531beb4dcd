"""Embedding lookup with the reference's rule for absent tokens."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


def embed(table: nn.Module, ids: mx.array, offset: int | mx.array = 0) -> mx.array:
    """Rows ``ids + offset`` of ``table``, dense or quantized; -1 gives zeros.

    Follows ``ScaledEmbedding`` of NVIDIA's PersonaPlex, ``models/lm.py``.
    """
    present = ids >= 0
    rows = table(mx.where(present, ids + offset, 0))
    return mx.where(present[..., None], rows, mx.zeros((), rows.dtype))
