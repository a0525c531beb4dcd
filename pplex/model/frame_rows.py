"""A frame of a batch of rows after the temporal transformer, by CUDA kernels.

What is chosen stays on the GPU as the next column of tokens, with its embedding beside
it, so that a head is one kernel.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from pplex.layers.cuda.compiler import use_cuda
from pplex.layers.cuda.rows import Head, choose_next
from pplex.model.lm import Lm
from pplex.model.sampling import Sampler


def serves(lm: Lm) -> bool:
    """Whether there are kernels for the heads and tables of ``lm``: all in bfloat16."""
    depformer = lm.depformer
    tables = depformer.text_emb, depformer.audio_emb
    heads = lm.text_linear, *(step.head for step in depformer.steps)
    return (
        use_cuda()
        and all(type(table) is nn.Embedding for table in tables)
        and all(part.weight.dtype == mx.bfloat16 for part in (*tables, *heads))
        and lm.config.depformer_dim % 8 == 0
    )


def choose_column(
    lm: Lm,
    x: mx.array,
    user: mx.array,
    keys: mx.array | None,
    given: mx.array | None,
    sampler: Sampler,
) -> mx.array:
    """The next column int32 (rows, streams) from temporal output ``x`` (rows, dim).

    ``user`` (rows, codebooks) are the user's tokens of it; ``keys`` (rows, 2) are those
    of the noise, ``given`` (rows, agent streams) what is chosen already.
    """
    config, depformer = lm.config, lm.depformer
    hidden, logits = lm.head(x)
    column = user

    def choose(logits: mx.array, step: int) -> mx.array | None:
        nonlocal column
        table = None
        if step < 0:
            table = depformer.text_emb.weight, 0
        elif step + 1 < config.num_codebooks:
            table = depformer.audio_emb.weight, step * (config.card + 1)
        head, streams = _head(sampler, lm, step), config.num_streams
        column, embedded = choose_next(
            head, logits, column, streams, keys, given, table
        )
        return embedded if table else None

    embedded = choose(logits, -1)
    assert embedded is not None
    depformer.run(hidden, embedded, choose)
    return column


def _head(sampler: Sampler, lm: Lm, step: int) -> Head:
    """The text head is step -1."""
    config, heads = sampler.config, lm.config.num_agent_streams
    if step < 0:
        first, temp, top_k = 0, config.text_temp, sampler.text_top_k
    else:
        first = sampler.text_noise + step * sampler.audio_noise
        temp, top_k = config.temp, sampler.top_k
    return Head(step + 1, heads, first, sampler.noise_width, temp, top_k)
