"""Transformer parts: attention over a cache, feed-forward, normalisation.

Follows NVIDIA's PersonaPlex, ``modules/transformer.py`` and ``modules/gating.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from pplex.layers.cache import Cache
from pplex.layers.cuda.compiler import use_cuda
from pplex.layers.cuda.rows import MOST_DIM, add_norm_rows, swiglu_rows

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


def add_norm(norm: RmsNorm, x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
    """``x + y`` and its normalisation."""
    if _by_kernels(x) and x.shape[-1] <= MOST_DIM:
        return add_norm_rows(x, y, norm.weight.astype(mx.float32))
    x = x + y
    return x, norm(x)


def _by_kernels(x: mx.array) -> bool:
    """Whether there are CUDA kernels for ``x``."""
    return use_cuda() and x.dtype == mx.bfloat16 and x.shape[-1] % 16 == 0


class Attention(nn.Module):
    """The projections around causal self-attention; a cache does what lies between."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self._num_heads = num_heads
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def split(self, x: mx.array) -> mx.array:
        """Queries, keys and values (batch, 3 heads, t, head_dim) of ``x``."""
        b, t, _ = x.shape
        qkv = self.in_proj(x).reshape(b, t, 3 * self._num_heads, -1)
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
        x = self.linear_in(x)
        if _by_kernels(x):
            return self.linear_out(swiglu_rows(x))
        gate, value = mx.split(x, 2, axis=-1)
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
        x, h = add_norm(self.norm2, x, self.self_attn.join(y))
        return x + self.gating(h)

    def lead_to(
        self, after: TemporalLayer, x: mx.array, y: mx.array
    ) -> tuple[mx.array, mx.array]:
        """``finish``, and ``after.split`` of its result."""
        x, h = add_norm(self.norm2, x, self.self_attn.join(y))
        x, h = add_norm(after.norm1, x, self.gating(h))
        return x, after.self_attn.split(h)


class CodecLayer(nn.Module):
    """A layer of the codec's transformers: LayerNorm, GELU, layer scales."""

    def __init__(self, dim: int, num_heads: int, feed_forward: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.self_attn = Attention(dim, num_heads)
        self.layer_scale_1 = mx.ones((dim,))
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.linear1 = nn.Linear(dim, feed_forward, bias=False)
        self.linear2 = nn.Linear(feed_forward, dim, bias=False)
        self.layer_scale_2 = mx.ones((dim,))

    def split(self, x: mx.array) -> mx.array:
        """Queries, keys and values (batch, 3 heads, t, head_dim) of ``x``."""
        return self.self_attn.split(self.norm1(x))

    def finish(self, x: mx.array, y: mx.array) -> mx.array:
        """The layer's output from its input ``x`` and the attended values ``y``."""
        x = x + self.layer_scale_1 * self.self_attn.join(y)
        y = self.linear2(nn.gelu(self.linear1(self.norm2(x))))
        return x + self.layer_scale_2 * y


Layer = TemporalLayer | CodecLayer

# From a layer's input and attended values to its output and the next layer's queries,
# keys and values: all that happens between two attentions.
Joint = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]


def joints(layers: Sequence[Layer]) -> list[Joint]:
    """What happens between the attentions of ``layers``, one function for each gap."""

    def joint(before: Layer, after: Layer) -> Joint:
        def run(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
            if isinstance(before, TemporalLayer) and isinstance(after, TemporalLayer):
                return before.lead_to(after, x, y)
            x = before.finish(x, y)
            return x, after.split(x)

        return run

    return [joint(*pair) for pair in zip(layers[:-1], layers[1:], strict=True)]


def run_layers(
    layers: Sequence[Layer],
    x: mx.array,
    cache: Cache,
    max_period: float,
    between: Sequence[Joint] | None = None,
) -> mx.array:
    """Run ``x`` (batch, t, dim) through ``layers``, adding ``t`` positions.

    ``between`` are the ``joints`` of the layers, if the caller has compiled them.
    """
    t = x.shape[1]
    mask = cache.mask(t)
    qkv = layers[0].split(x)
    for idx, joint in enumerate(joints(layers) if between is None else between):
        x, qkv = joint(x, cache.attend(idx, qkv, max_period, mask))
    last = len(layers) - 1
    x = layers[last].finish(x, cache.attend(last, qkv, max_period, mask))
    cache.advance(t)
    return x
