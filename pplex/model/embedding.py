"""Embedding lookup with the reference's rule for absent tokens."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


def embed(table: nn.Module, ids: mx.array, offset: int | mx.array = 0) -> mx.array:
    """Rows ``ids + offset`` of ``table``, dense or quantized; -1 gives zeros.

    Follows ``ScaledEmbedding`` of NVIDIA's PersonaPlex, ``models/lm.py``.
    """
    rows = table(mx.where(ids >= 0, ids + offset, 0))
    # The same question in other words: what is compiled asks twice, and stores nothing.
    return mx.where(ids[..., None] < 0, mx.zeros((), rows.dtype), rows)
