"""The depformer: the codes of one frame, codebook after codebook.

Follows NVIDIA's PersonaPlex, ``models/lm.py`` (``depformer_step``). Each step has its
own weights; there is no positional embedding, and the cache lives for one frame only.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from pplex.model.config import LmConfig
from pplex.model.embedding import embed
from pplex.model.streams import NOT_FORCED
from pplex.model.transformer import Gating, RmsNorm


class DepformerLayer(nn.Module):
    """One layer of one step."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm1 = RmsNorm(dim)
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.norm2 = RmsNorm(dim)
        self.gating = Gating(dim, hidden_dim)

    def finish(self, x: mx.array, y: mx.array) -> mx.array:
        """The layer's output from its input ``x`` and attended values (batch, dim)."""
        x = x + self.out_proj(y)
        return x + self.gating(self.norm2(x))


class StepCache:
    """Keys and values of every layer over the steps of a frame.

    Of each layer an array (2, batch, heads, steps, head_dim). A step writes its own
    into its slot and the later ones, which nobody sees yet: so that is one operation
    that makes a new array, and none if it is the first.
    """

    def __init__(self, config: LmConfig, num_steps: int) -> None:
        self._num_heads = config.depformer_num_heads
        self._hiding_step = config.hiding_step
        self._slots = np.arange(num_steps)[:, None]
        self._pasts: list[mx.array | None] = [None] * config.depformer_num_layers

    def attend(self, layer: int, qkv: mx.array, step: int) -> mx.array:
        """Attention (batch, dim) of ``step``, whose ``qkv`` (batch, 3 dim) is kept."""
        b, width = qkv.shape
        split = qkv.reshape(b, 3, self._num_heads, 1, -1)
        new = split[:, 1:].swapaxes(0, 1)
        past = self._pasts[layer]
        if past is None:
            shape = *new.shape[:3], len(self._slots), new.shape[-1]
            self._pasts[layer] = mx.broadcast_to(new, shape)
            return qkv[:, width // 3 * 2 :]  # all of the only value
        past = mx.where(mx.array(self._slots < step), past, new)
        self._pasts[layer] = past
        first = 1 if step == self._hiding_step else 0
        k, v = past[:, :, :, first : step + 1]
        q = split[:, 0]
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return y.reshape(b, width // 3)


class _DepformerStep(nn.Module):
    """The weights of one codebook."""

    def __init__(self, config: LmConfig) -> None:
        super().__init__()
        self.layers = [
            DepformerLayer(config.depformer_dim, config.depformer_hidden_dim)
            for _ in range(config.depformer_num_layers)
        ]
        self.head = nn.Linear(config.depformer_dim, config.card, bias=False)


class Depformer(nn.Module):
    """``num_steps`` codebooks; a conversation needs those of the agent only."""

    def __init__(self, config: LmConfig, num_steps: int) -> None:
        super().__init__()
        self._config = config
        self._num_steps = num_steps
        dim = config.depformer_dim
        self.input = nn.Linear(config.dim, num_steps * dim, bias=False)
        self.text_emb = nn.Embedding(config.text_card + 1, dim)
        self.audio_emb = nn.Embedding((num_steps - 1) * (config.card + 1), dim)
        self.steps = [_DepformerStep(config) for _ in range(num_steps)]

    def __call__(
        self,
        hidden: mx.array,
        text: mx.array,
        sample: Callable[[mx.array, int], mx.array],
        forced: mx.array | None = None,
    ) -> list[mx.array]:
        """Codes (batch,) of each step after the output ``hidden`` (batch, dim).

        ``text`` (batch,) is the frame's text id, ``sample`` draws ids (batch,) from the
        logits (batch, card) of a step, ``forced`` (batch, steps) holds ids given
        instead, ``NOT_FORCED`` elsewhere.
        """
        b = hidden.shape[0]
        inputs = self.input(hidden).reshape(b, self._num_steps, -1)
        past = StepCache(self._config, self._num_steps)
        token, codes = text, []
        for idx, step in enumerate(self.steps):
            x = inputs[:, idx] + self._embed(token, idx)
            for number, layer in enumerate(step.layers):
                qkv = layer.in_proj(layer.norm1(x))
                x = layer.finish(x, past.attend(number, qkv, idx))
            token = sample(step.head(x), idx)
            if forced is not None:
                given = forced[:, idx]
                token = mx.where(given == NOT_FORCED, token, given)
            codes.append(token)
        return codes

    def _embed(self, token: mx.array, idx: int) -> mx.array:
        if idx == 0:
            return embed(self.text_emb, token)
        return embed(self.audio_emb, token, (idx - 1) * (self._config.card + 1))
