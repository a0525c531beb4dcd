"""A frame of a batch of rows after the temporal transformer, by CUDA kernels.

What is chosen stays on the GPU, in the next column of tokens.
"""

from __future__ import annotations

import mlx.core as mx

from pplex.layers.cuda.rows import choose_text
from pplex.layers.cuda.weights import DENSE, form_of
from pplex.model.depformer_kernel import depformer_kernel
from pplex.model.lm import Lm
from pplex.model.sampling import Sampler


def serves(lm: Lm) -> bool:
    """Whether there are kernels for the depformer and heads of ``lm``."""
    return form_of(lm.text_linear) == DENSE and depformer_kernel(lm) is not None


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
    kernel = depformer_kernel(lm)
    assert kernel is not None
    hidden, logits = lm.head(x)
    column = choose_text(
        logits,
        user,
        keys,
        given,
        width=sampler.noise_width,
        temp=sampler.config.text_temp,
        top_k=sampler.text_top_k,
    )
    return kernel(lm.depformer.input(hidden), column, keys, given, sampler)
