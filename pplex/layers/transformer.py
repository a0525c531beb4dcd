"""Transformer parts: attention over a cache, feed-forward, normalisation.

Follows NVIDIA's PersonaPlex, ``modules/transformer.py`` and ``modules/gating.py``.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from pplex.layers.cache import Cache, Mask

RMS_NORM_EPS = 1e-8
LAYER_NORM_EPS = 1e-5


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
    """Causal self-attention with interleaved rotary embeddings over a cache."""

    def __init__(self, dim: int, num_heads: int, max_period: float) -> None:
        super().__init__()
        self._num_heads = num_heads
        self._head_dim = dim // num_heads
        self._max_period = max_period
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def __call__(self, x: mx.array, cache: Cache, layer: int, mask: Mask) -> mx.array:
        """Attend from ``x`` (batch, t, dim) to the cache and to ``x`` itself."""
        b, t, dim = x.shape
        qkv = self.in_proj(x).reshape(b, t, 3 * self._num_heads, self._head_dim)
        y = cache.attend(layer, qkv.transpose(0, 2, 1, 3), self._max_period, mask)
        return self.out_proj(y.transpose(0, 2, 1, 3).reshape(b, t, dim))


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

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, max_period: float
    ) -> None:
        super().__init__()
        self.norm1 = RmsNorm(dim)
        self.self_attn = Attention(dim, num_heads, max_period)
        self.norm2 = RmsNorm(dim)
        self.gating = Gating(dim, hidden_dim)

    def __call__(self, x: mx.array, cache: Cache, layer: int, mask: Mask) -> mx.array:
        """Map ``x`` (batch, t, dim) to the same shape."""
        x = x + self.self_attn(self.norm1(x), cache, layer, mask)
        return x + self.gating(self.norm2(x))


class CodecLayer(nn.Module):
    """A layer of the codec's transformers: LayerNorm, GELU, layer scales."""

    def __init__(
        self, dim: int, num_heads: int, feed_forward: int, max_period: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.self_attn = Attention(dim, num_heads, max_period)
        self.layer_scale_1 = mx.ones((dim,))
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.linear1 = nn.Linear(dim, feed_forward, bias=False)
        self.linear2 = nn.Linear(feed_forward, dim, bias=False)
        self.layer_scale_2 = mx.ones((dim,))

    def __call__(self, x: mx.array, cache: Cache, layer: int, mask: Mask) -> mx.array:
        """Map ``x`` (batch, t, dim) to the same shape."""
        y = self.self_attn(self.norm1(x), cache, layer, mask)
        x = x + self.layer_scale_1 * y
        y = self.linear2(nn.gelu(self.linear1(self.norm2(x))))
        return x + self.layer_scale_2 * y


def run_layers(
    layers: list[TemporalLayer] | list[CodecLayer], x: mx.array, cache: Cache
) -> mx.array:
    """Run ``x`` (batch, t, dim) through ``layers``, adding ``t`` positions."""
    t = x.shape[1]
    mask = cache.mask(t)
    for idx, layer in enumerate(layers):
        x = layer(x, cache, idx, mask)
    cache.advance(t)
    return x
