"""The depformer: the codes of one frame, codebook after codebook.

Follows NVIDIA's PersonaPlex, ``models/lm.py`` (``depformer_step``). Each step has its
own weights; there is no positional embedding, and the cache lives for one frame only.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

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
    """Keys and values of every layer over the steps of a frame."""

    def __init__(self, num_layers: int, num_heads: int) -> None:
        self._num_heads = num_heads
        self._pasts: list[mx.array | None] = [None] * num_layers

    def attend(self, layer: int, qkv: mx.array, hide_first: bool) -> mx.array:
        """Attention (batch, dim) of the next step; its ``qkv`` (batch, 3 dim) is kept.

        With ``hide_first`` step 0 is not seen.
        """
        b, width = qkv.shape
        first = 1 if hide_first else 0
        split = qkv.reshape(b, 3 * self._num_heads, 1, -1)
        past = self._pasts[layer]
        if past is not None:
            split = mx.concatenate([past, split], axis=2)
        self._pasts[layer] = split
        q, k, v = mx.split(split, 3, axis=1)
        y = mx.fast.scaled_dot_product_attention(
            q[:, :, -1:], k[:, :, first:], v[:, :, first:], scale=q.shape[-1] ** -0.5
        )
        return y.reshape(b, width // 3)


class DepformerStep(nn.Module):
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
        self.steps = [DepformerStep(config) for _ in range(num_steps)]

    def __call__(
        self,
        hidden: mx.array,
        text: mx.array,
        sample: Callable[[mx.array, int], mx.array],
        forced: mx.array | None = None,
    ) -> mx.array:
        """Codes (batch, steps) after the temporal output ``hidden`` (batch, dim).

        ``text`` (batch,) is the frame's text id, ``sample`` draws ids (batch,) from the
        logits (batch, card) of a step, ``forced`` (batch, steps) holds ids given
        instead, ``NOT_FORCED`` elsewhere.
        """
        b = hidden.shape[0]
        inputs = self.input(hidden).reshape(b, self._num_steps, -1)
        config = self._config
        past = StepCache(config.depformer_num_layers, config.depformer_num_heads)
        token, codes = text, []
        for idx, step in enumerate(self.steps):
            x = inputs[:, idx] + self._embed(token, idx)
            hide_first = idx == config.hiding_step
            for number, layer in enumerate(step.layers):
                qkv = layer.in_proj(layer.norm1(x))
                x = layer.finish(x, past.attend(number, qkv, hide_first))
            token = sample(step.head(x), idx)
            if forced is not None:
                given = forced[:, idx]
                token = mx.where(given == NOT_FORCED, token, given)
            codes.append(token)
        return mx.stack(codes, axis=1)

    def _embed(self, token: mx.array, idx: int) -> mx.array:
        if idx == 0:
            return embed(self.text_emb, token)
        return embed(self.audio_emb, token, (idx - 1) * (self._config.card + 1))
