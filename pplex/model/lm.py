"""The language model: seventeen token streams in, one frame's logits and codes out.

Follows NVIDIA's PersonaPlex, ``models/lm.py``.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from pplex.model.cache import Cache, KvCache
from pplex.model.config import LmConfig
from pplex.model.depformer import Depformer
from pplex.model.embedding import embed
from pplex.model.streams import TEXT_ROW
from pplex.model.transformer import RmsNorm, TemporalLayer, run_layers


class Lm(nn.Module):
    """Temporal transformer, text head and depformer.

    ``num_steps`` is the number of depformer steps held: those of the agent's codebooks
    unless the user's are wanted too.
    """

    def __init__(self, config: LmConfig, num_steps: int | None = None) -> None:
        super().__init__()
        self.config = config
        steps = config.num_codebooks if num_steps is None else num_steps
        self.text_emb = nn.Embedding(config.text_card + 1, config.dim)
        self.audio_emb = nn.Embedding(config.n_q * (config.card + 1), config.dim)
        self.layers = [
            TemporalLayer(config.dim, config.num_heads, config.hidden_dim)
            for _ in range(config.num_layers)
        ]
        self.out_norm = RmsNorm(config.dim)
        self.text_linear = nn.Linear(config.dim, config.text_card, bias=False)
        self.depformer = Depformer(config, steps)

    def make_cache(self) -> KvCache:
        """An empty cache for the temporal transformer."""
        return KvCache(self.config.num_layers, self.config.window)

    def embed(self, tokens: mx.array) -> mx.array:
        """Summed rows (batch, t, dim) of tokens (batch, streams, t), text first.

        Audio rows are added in order and the text row last, rounding after each sum, as
        saved voice prompts were made.
        """
        config = self.config
        first_rows = np.arange(config.n_q, dtype=np.int32) * (config.card + 1)
        rows = embed(self.audio_emb, tokens[:, 1:], mx.array(first_rows[:, None]))
        total = rows[:, 0]
        for idx in range(1, config.n_q):
            total = total + rows[:, idx]
        return total + embed(self.text_emb, tokens[:, 0])

    def temporal(self, x: mx.array, cache: Cache) -> mx.array:
        """Run inputs (batch, t, dim) as the next ``t`` positions; before the norm."""
        return run_layers(self.layers, x, cache, self.config.max_period)

    def head(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Normalised output and text logits of temporal output ``x`` (..., dim)."""
        hidden = self.out_norm(x)
        return hidden, self.text_linear(hidden)

    def agent_logits(self, hidden: mx.array, given: mx.array) -> mx.array:
        """Float32 logits (batch, codebooks, card) of codes after ``hidden``.

        ``given`` (batch, agent streams) is the column that is chosen.
        """
        heads: list[mx.array] = []

        def keep(logits: mx.array, _: int) -> mx.array:
            heads.append(logits.astype(mx.float32))
            return mx.zeros((logits.shape[0],), mx.int32)

        self.depformer(hidden, given[:, TEXT_ROW], keep, given[:, 1:])
        return mx.stack(heads, axis=1)
