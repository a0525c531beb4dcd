"""Transformer parts: attention over a cache, feed-forward, normalisation.

Follows NVIDIA's PersonaPlex, ``modules/transformer.py`` and ``modules/gating.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from pplex.model.cache import Cache

RMS_NORM_EPS = 1e-8
_LAYER_NORM_EPS = 1e-5


def gelu(x: mx.array) -> mx.array:
    """GELU; ``nn.gelu`` has a compiler fuse it at run time, which takes seconds."""
    return x * (1 + mx.erf(x / math.sqrt(2))) / 2


class RmsNorm(nn.Module):
    """RMS normalisation computed in float32 and rounded once."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = mx.ones((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        """Normalise the last axis of ``x``."""
        weight = self.weight.astype(mx.float32)
        y = mx.fast.rms_norm(x.astype(mx.float32), weight, RMS_NORM_EPS)
        return y.astype(x.dtype)


class Attention(nn.Module):
    """The projections around causal self-attention; a cache does what lies between."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def split(self, x: mx.array) -> mx.array:
        """Queries, keys and values (batch, 3 heads, t, head_dim) of ``x``."""
        b, t, _ = x.shape
        qkv = self.in_proj(x).reshape(b, t, 3 * self.num_heads, -1)
        return qkv.transpose(0, 2, 1, 3)

    def join(self, y: mx.array) -> mx.array:
        """Attended values (batch, heads, t, head_dim) to (batch, t, dim)."""
        b, _, t, _ = y.shape
        return self.out_proj(y.transpose(0, 2, 1, 3).reshape(b, t, -1))


class Gating(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.linear_out = nn.Linear(hidden_dim, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map ``x`` (..., dim) to the same shape."""
        gate, value = mx.split(self.linear_in(x), 2, axis=-1)
        return self.linear_out(nn.silu(gate) * value)


class TemporalLayer(nn.Module):
    """A layer of the temporal transformer: RMSNorm, attention, SwiGLU."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm1 = RmsNorm(dim)
        self.self_attn = Attention(dim, num_heads)
        self.norm2 = RmsNorm(dim)
        self.gating = Gating(dim, hidden_dim)

    def split(self, x: mx.array) -> mx.array:
        """Queries, keys and values (batch, 3 heads, t, head_dim) of ``x``."""
        return self.self_attn.split(self.norm1(x))

    def finish(self, x: mx.array, y: mx.array) -> mx.array:
        """The layer's output from its input ``x`` and the attended values ``y``."""
        x = x + self.self_attn.join(y)
        return x + self.gating(self.norm2(x))


class CodecLayer(nn.Module):
    """A layer of the codec's transformers: LayerNorm, GELU, layer scales."""

    def __init__(self, dim: int, num_heads: int, feed_forward: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_LAYER_NORM_EPS)
        self.self_attn = Attention(dim, num_heads)
        self.layer_scale_1 = mx.ones((dim,))
        self.norm2 = nn.LayerNorm(dim, eps=_LAYER_NORM_EPS)
        self.linear1 = nn.Linear(dim, feed_forward, bias=False)
        self.linear2 = nn.Linear(feed_forward, dim, bias=False)
        self.layer_scale_2 = mx.ones((dim,))

    def split(self, x: mx.array) -> mx.array:
        """Queries, keys and values (batch, 3 heads, t, head_dim) of ``x``."""
        return self.self_attn.split(self.norm1(x))

    def finish(self, x: mx.array, y: mx.array) -> mx.array:
        """The layer's output from its input ``x`` and the attended values ``y``."""
        x = x + self.layer_scale_1 * self.self_attn.join(y)
        y = self.linear2(gelu(self.linear1(self.norm2(x))))
        return x + self.layer_scale_2 * y


Layer = TemporalLayer | CodecLayer


def run_layers(
    layers: Sequence[Layer], x: mx.array, cache: Cache, max_period: float
) -> mx.array:
    """Run ``x`` (batch, t, dim) through ``layers``, adding ``t`` positions."""
    t = x.shape[1]
    mask = cache.mask(t)
    for idx, layer in enumerate(layers):
        y = cache.attend(idx, layer.split(x), max_period, mask)
        x = layer.finish(x, y)
    cache.advance(t)
    return x
