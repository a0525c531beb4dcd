"""CUDA kernels for a batch of rows: what lies between matrix products.

The language model's take bfloat16, the codec's float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import mlx.core as mx

from pplex.engine.cuda.compiler import Kernel, read_source, with_constants
from pplex.model.rotary import frequencies

MOST_DIM = 8192  # add_norm.cu
TILE = 16  # rows that attend to their prompt together
WIDTHS = 64, 128  # of heads, that attention knows
LATENTS_TILE, LATENTS_WIDTH = 64, 64  # new positions together, and of heads
# The kernels, each a file of its name, and the threads of its blocks.
THREADS = {
    "attend": 128,
    "attend_prompts": 128,
    "join_parts": 256,
    "attend_latents": 256,
    "choose_text": 1024,
    "embed_column": 512,
    "add_norm": 512,
    "swiglu": 512,
    "gelu": 512,
    "add_scaled": 512,
    "add_rows": 256,
}


def attend_rows(
    qkv: mx.array,
    ring: Sequence[mx.array],
    prompts: tuple[mx.array, mx.array],
    rows: mx.array,
    tiles: mx.array,
    slot: int,
    window: int,
    max_period: float,
) -> mx.array:
    """Attention (rows', heads, 1, head_dim) of one new position a row.

    ``qkv`` (rows', 3 heads, 1, head_dim) is the new position's, and behind the rows
    that there are others, of which zeros come; ``ring`` (rows, heads, slots, head_dim)
    holds what came after the prompts, keys and values or words and scales of each, and
    ``prompts`` (prompts, heads, slots, head_dim) those. ``rows`` int32 (rows, 4):
    positions so far, how many of them the prompt has, the first of them that is kept,
    the prompt's number. ``tiles`` int32 (tiles, 1 + ``TILE``): a prompt's number and
    rows that have it, -1 for none. No more than ``window`` positions are seen. The new
    position is written **into** ``slot`` of the ring, of which MLX knows nothing: what
    else touches those arrays must be separated by ``mx.synchronize``.
    """
    num_rows, heads, slots, _ = ring[0].shape
    head_dim = qkv.shape[-1]
    kv_bits = 8 if len(ring) > 2 else 16
    angles = _frequencies(head_dim, max_period)
    sizes = {"HEAD_DIM": head_dim, "WINDOW": window}
    # A graph's kernels that do not need each other run side by side: one waits for
    # latency, the other for memory.
    parts = (num_rows, heads, head_dim + 2), mx.float32
    (before,) = _kernel("attend_prompts", **sizes)(
        [qkv, *prompts, tiles, rows, angles],
        [parts],
        [prompts[0].shape[2]],
        blocks=(heads, len(tiles)),
    )
    floats = (3 + THREADS["attend"] // 32) * head_dim + window + 512
    (since,) = _kernel("attend", 4 * floats, **sizes, KV_BITS=kv_bits)(
        [qkv, *with_scales(ring), rows, angles],
        [parts],
        [slot, slots],
        blocks=(heads, num_rows),
    )
    count = num_rows * heads
    (y,) = _kernel("join_parts", **sizes)(
        [since, before, rows],
        [((len(qkv), heads, 1, head_dim), mx.bfloat16)],
        [heads, count],
        blocks=(-(-count * 32 // THREADS["join_parts"]), 1),
        init_value=0 if num_rows < len(qkv) else None,
    )
    return y


def with_scales(kept: Sequence[mx.array]) -> list[mx.array]:
    """Keys and values as kernels take them: with scales, whatever where are none."""
    return [a for a in kept for _ in range(2)] if len(kept) == 2 else list(kept)


@functools.cache
def _frequencies(head_dim: int, max_period: float) -> mx.array:
    return mx.array(frequencies(head_dim, max_period))


def choose_text(
    logits: mx.array,
    user: mx.array,
    keys: mx.array | None,
    given: mx.array | None,
    *,
    width: int,
    temp: float,
    top_k: int,
) -> mx.array:
    """Columns int32 (rows, streams): text ids, room for the agent's codes, the user's.

    From ``logits`` (at least rows, card) bfloat16 ids are drawn with the noise of
    ``keys`` (rows, 2), ``width`` numbers a row, or the largest taken where there are
    none; ``given`` (rows, agent streams) holds ids to take instead, ``NOT_FORCED``
    elsewhere.
    ``user`` (rows, codebooks) are the user's codes.
    """
    card = logits.shape[1]
    rows, codebooks = user.shape
    streams = 1 + 2 * codebooks
    (column,) = _kernel("choose_text")(
        [
            logits,
            user if keys is None else keys,
            user if given is None else given,
            user.astype(mx.int32),
        ],
        [((rows, streams), mx.int32)],
        [card, streams, codebooks, 1 + codebooks, int(keys is not None)]
        + [int(given is not None), width, 0.0 if keys is None else float(temp), top_k],
        blocks=(1, rows),
    )
    return column


def embed_column(column: mx.array, text: mx.array, audio: mx.array) -> mx.array:
    """Summed rows (rows, 1, dim) of tokens (rows, streams), as ``Lm.embed`` sums them.

    ``text`` (ids, dim) and ``audio`` (audio streams * ids, dim) are bfloat16 tables.
    """
    rows, streams = column.shape
    dim = text.shape[1]
    (x,) = _kernel("embed_column")(
        [column.astype(mx.int32), text, audio],
        [((rows, 1, dim), mx.bfloat16)],
        [streams, audio.shape[0] // (streams - 1), dim],
        blocks=(-(-dim // (2 * THREADS["embed_column"])), rows),
    )
    return x


def add_norm_rows(
    x: mx.array, y: mx.array, weight: mx.array
) -> tuple[mx.array, mx.array]:
    """``x + y`` (..., dim) bfloat16, and its RMSNorm with ``weight`` (dim,) float32."""
    dim = y.shape[-1]
    total, normed = _kernel("add_norm")(
        [x, y, weight],
        [(y.shape, mx.bfloat16)] * 2,
        [dim],
        blocks=(1, y.size // dim),
    )
    return total, normed


def swiglu_rows(x: mx.array) -> mx.array:
    """``silu(gate) * value`` (..., width) of ``x`` (..., 2 width), gate first."""
    *batch, width = x.shape
    width //= 2
    (y,) = _kernel("swiglu")(
        [x],
        [((*batch, width), mx.bfloat16)],
        [width],
        blocks=(-(-width // (8 * THREADS["swiglu"])), x.size // (2 * width)),
    )
    return y


def gelu_rows(x: mx.array) -> mx.array:
    """GELU of float32 ``x``, of a multiple of four."""
    (y,) = _kernel("gelu")(
        [x],
        [(x.shape, mx.float32)],
        [x.size // 4],
        blocks=(-(-x.size // (4 * THREADS["gelu"])), 1),
    )
    return y


def add_scaled(x: mx.array, y: mx.array, scale: mx.array) -> mx.array:
    """``x + scale * y`` float32 (..., dim), of a multiple of four."""
    quads = x.size // 4
    (total,) = _kernel("add_scaled")(
        [x, y, scale],
        [(x.shape, mx.float32)],
        [quads, len(scale) // 4],
        blocks=(-(-quads // THREADS["add_scaled"]), 1),
    )
    return total


def attend_latents(
    qkv: mx.array,
    kept: tuple[mx.array, mx.array] | None,
    turns: tuple[mx.array, mx.array],
    end: int,
    window: int,
    block: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """Attention (rows, t, heads, head_dim) of new positions; all keys, all values.

    Of ``qkv`` (rows, t, 3 heads, head_dim) queries and keys are turned by ``turns``
    (t, head_dim / 2), cosines and sines. ``end`` positions came before them. Those in
    the window are ``kept``, and will be, as ``KvCache`` keeps them. All is float32.
    """
    rows, t, heads, head_dim = qkv.shape
    heads //= 3
    slots = min(window, end + t)
    tiles = -(-t // LATENTS_TILE)
    kept = (qkv, qkv) if kept is None else kept
    store = (rows, heads, slots, head_dim), mx.float32
    y, keys, values = _kernel("attend_latents", HEAD_DIM=head_dim)(
        [qkv, *kept, *turns],
        [((rows, t, heads, head_dim), mx.float32), store, store],
        [t, end, heads, kept[0].shape[2], slots, window, block],
        blocks=(heads * tiles, rows),
    )
    return y, keys, values


def add_rows(
    x: mx.array, table: mx.array, ids: mx.array, *, subtract: bool = False
) -> mx.array:
    """``x + table[ids]`` or the difference, float32 (..., dim), of int32 ids (...,).

    MLX compiles a kernel for each type of table and ids, in seconds.
    """
    dim = x.shape[-1]
    (y,) = _kernel("add_rows")(
        [x, table, ids.astype(mx.int32)],
        [(x.shape, mx.float32)],
        [dim, int(subtract)],
        blocks=(1, x.size // dim),
    )
    return y


def source(name: str, **sizes: int) -> str:
    """The text of a kernel; those that attend know ``HEAD_DIM`` and ``WINDOW``.

    And the one that reads what rows keep, of how many bits that is.
    """
    files = ["common.cu", *["kept.cu"] * ("KV_BITS" in sizes), f"{name}.cu"]
    texts = map(read_source, files)
    return with_constants({"THREADS": THREADS[name], **sizes}, *texts)


@functools.cache
def _kernel(name: str, shared_memory: int = 0, **sizes: int) -> Kernel:
    return Kernel.of(name, source(name, **sizes), THREADS[name], shared_memory)
