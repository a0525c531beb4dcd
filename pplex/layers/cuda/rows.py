"""CUDA kernels for a batch of rows in bfloat16: what lies between matrix products."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import mlx.core as mx

from pplex.layers.cuda.compiler import Kernel, compile_cuda, read_source, with_constants
from pplex.layers.rotary import frequencies

MOST_STEPS = 16  # of a depformer: attend_steps.cu
MOST_DIM = 8192  # add_norm.cu
TILE = 16  # rows that attend to their prompt together
WIDTHS = 64, 128  # of heads, that attention knows
_THREADS = 128
_NORM_THREADS = 512
_CHOICE_THREADS = 1024

KeysValues = tuple[mx.array, mx.array]


def attend_rows(
    qkv: mx.array,
    ring: KeysValues,
    prompts: KeysValues,
    rows: mx.array,
    tiles: mx.array,
    slot: int,
    window: int,
    max_period: float,
) -> mx.array:
    """Attention (rows, heads, 1, head_dim) of one new position a row.

    ``qkv`` (rows, 3 heads, 1, head_dim) is the new position's, ``ring`` (rows, heads,
    slots, head_dim) holds what came after the prompts and ``prompts`` (prompts, heads,
    slots, head_dim) those. ``rows`` int32 (rows, 4): positions so far, how many of them
    the prompt has, the first of them that is kept, the prompt's number. ``tiles``
    int32 (tiles, 1 + ``TILE``): a prompt's number and rows that have it, -1 for none.
    No more than ``window`` positions are seen. The new position is written **into**
    ``slot`` of the ring, of which MLX knows nothing: what else touches those arrays
    must be separated by ``mx.synchronize``.
    """
    num_rows, three_heads, _, head_dim = qkv.shape
    heads = three_heads // 3
    angles = _frequencies(head_dim, max_period)
    (parts,) = _prompt_attention(head_dim, window)(
        [qkv, *prompts, tiles, rows, angles],
        [((num_rows, heads, head_dim + 2), mx.float32)],
        [prompts[0].shape[2]],
        blocks=(heads, len(tiles)),
    )
    (y,) = _attention(head_dim, window)(
        [qkv, *ring, parts, rows, angles],
        [((num_rows, heads, 1, head_dim), mx.bfloat16)],
        [slot, ring[0].shape[2]],
        blocks=(heads, num_rows),
    )
    return y


@functools.cache
def _prompt_attention(head_dim: int, window: int) -> Kernel:
    sizes = {"THREADS": _THREADS, "HEAD_DIM": head_dim, "WINDOW": window}
    return _kernel("attend_prompts", sizes)


@functools.cache
def _frequencies(head_dim: int, max_period: float) -> mx.array:
    return mx.array(frequencies(head_dim, max_period))


@functools.cache
def _attention(head_dim: int, window: int) -> Kernel:
    sizes = {"THREADS": _THREADS, "HEAD_DIM": head_dim, "WINDOW": window}
    floats = 3 * head_dim + _THREADS // 32 * head_dim + window + 512
    return _kernel("attend", sizes, shared_memory=4 * floats)


@dataclass(frozen=True)
class Head:
    """Which of a frame's ``heads`` chooses, and how: see ``sampling.py``.

    Of the ``width`` random numbers of a row's frame it takes those from ``first`` on.
    """

    idx: int
    heads: int
    first: int
    width: int
    temp: float
    top_k: int


def choose_next(
    head: Head,
    logits: mx.array,
    column: mx.array,
    streams: int,
    keys: mx.array | None,
    given: mx.array | None,
    table: tuple[mx.array, int] | None,
) -> tuple[mx.array, mx.array]:
    """Columns int32 (rows, streams) with the ids a head chose, and their embeddings.

    From ``logits`` (rows, card) bfloat16 ids are drawn with the noise of ``keys``
    (rows, 2), or the largest taken where there are none; ``given`` (rows, heads) holds
    ids to take instead, ``NOT_FORCED`` elsewhere. ``column`` (rows, n) holds the last
    n of the streams so far. Embeddings (rows, dim) are rows of ``table``: its weights,
    and the row of id 0.
    """
    rows, card = logits.shape
    weights, first_row = table or (logits, 0)
    dim = weights.shape[1] if table else 0
    temp = 0.0 if keys is None else float(head.temp)
    next_column, embedded = _choice()(
        [
            logits,
            column if keys is None else keys,
            column if given is None else given,
            column,
            weights,
        ],
        [((rows, streams), mx.int32), ((rows, max(dim, 1)), mx.bfloat16)],
        [card, streams, column.shape[1], head.idx, head.heads, int(keys is not None)]
        + [head.first, head.width, temp, head.top_k, int(given is not None)]
        + [first_row, dim],
        blocks=(1, rows),
    )
    return next_column, embedded


@functools.cache
def _choice() -> Kernel:
    return _kernel("choose_next", {"THREADS": _CHOICE_THREADS})


def embed_column(column: mx.array, text: mx.array, audio: mx.array) -> mx.array:
    """Summed rows (rows, 1, dim) of tokens (rows, streams), as ``Lm.embed`` sums them.

    ``text`` (ids, dim) and ``audio`` (audio streams * ids, dim) are bfloat16 tables.
    """
    rows, streams = column.shape
    dim = text.shape[1]
    (x,) = _embedding()(
        [column.astype(mx.int32), text, audio],
        [((rows, 1, dim), mx.bfloat16)],
        [streams, audio.shape[0] // (streams - 1), dim],
        blocks=(-(-dim // (2 * _NORM_THREADS)), rows),
    )
    return x


@functools.cache
def _embedding() -> Kernel:
    return _kernel("embed_column", {"THREADS": _NORM_THREADS})


def add_norm_rows(
    x: mx.array, y: mx.array, weight: mx.array
) -> tuple[mx.array, mx.array]:
    """``x + y`` (..., dim) bfloat16, and its RMSNorm with ``weight`` (dim,) float32."""
    dim = y.shape[-1]
    total, normed = _add_norm()(
        [x, y, weight],
        [(y.shape, mx.bfloat16)] * 2,
        [dim],
        blocks=(1, y.size // dim),
    )
    return total, normed


@functools.cache
def _add_norm() -> Kernel:
    return _kernel("add_norm", {"THREADS": _NORM_THREADS})


def swiglu_rows(x: mx.array) -> mx.array:
    """``silu(gate) * value`` (..., width) of ``x`` (..., 2 width), gate first."""
    *batch, width = x.shape
    width //= 2
    (y,) = _swiglu()(
        [x],
        [((*batch, width), mx.bfloat16)],
        [width],
        blocks=(-(-width // (8 * _NORM_THREADS)), x.size // (2 * width)),
    )
    return y


@functools.cache
def _swiglu() -> Kernel:
    return _kernel("swiglu", {"THREADS": _NORM_THREADS})


def attend_steps(
    qkv: mx.array, past: mx.array, num_heads: int, layer: int, step: int, first: int
) -> mx.array:
    """Attention (rows, dim) of a depformer step over the steps from ``first`` on.

    ``qkv`` (rows, 3 dim) is the step's; it is written into ``past`` (rows, layers,
    steps, 3 dim), which nothing else may use. All are bfloat16.
    """
    rows, layers, steps, width = past.shape
    dim = width // 3
    (y,) = _step_attention(num_heads)(
        [qkv, past],
        [((rows, dim), mx.bfloat16)],
        [layer, layers, step, steps, first, dim // num_heads],
        blocks=(1, rows),
    )
    return y


@functools.cache
def _step_attention(num_heads: int) -> Kernel:
    return _kernel("attend_steps", {"THREADS": 32 * num_heads})


def _kernel(name: str, sizes: dict[str, int], *, shared_memory: int = 0) -> Kernel:
    texts = read_source("common.cu"), read_source(f"{name}.cu")
    code = compile_cuda(with_constants(sizes, *texts))
    return Kernel(name, code, sizes["THREADS"], shared_memory)
