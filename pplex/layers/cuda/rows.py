"""CUDA kernels for a batch of rows: attention over a shared ring, and sampling."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import resources
from typing import Any

import mlx.core as mx

from pplex.layers.rotary import frequencies

THREADS = 128
NORM_THREADS = 256


def use_cuda() -> bool:
    """Whether MLX computes on a CUDA device."""
    return mx.cuda.is_available() and mx.default_device() == mx.Device(mx.gpu)


def read_source(name: str, package: str = "pplex.layers.cuda") -> str:
    """The text of a CUDA file of a package."""
    return resources.files(package).joinpath(name).read_text()


KeysValues = tuple[mx.array, mx.array]


def attend_rows(
    qkv: mx.array,
    ring: KeysValues,
    prompts: KeysValues,
    rows: mx.array,
    place: mx.array,
    window: int,
    max_period: float,
) -> mx.array:
    """Attention (rows, heads, 1, head_dim) of one new position a row.

    ``qkv`` (rows, 3 heads, 1, head_dim) is the new position's, ``ring`` (rows, heads,
    slots, head_dim) holds what came after the prompts and ``prompts`` (prompts, heads,
    slots, head_dim) those, all in bfloat16. ``rows`` int32 (rows, 4): positions so far,
    how many of them the prompt has, the first of them that is kept, the prompt's
    number. ``place`` int32: the new position's slot, the slots of the ring and of a
    prompt. No more than ``window`` positions are seen. The new position is written
    **into** the ring, of which MLX knows nothing: what else touches those arrays must
    be separated by ``mx.synchronize``.
    """
    num_rows, three_heads, _, head_dim = qkv.shape
    heads = three_heads // 3
    (y,) = _attention(head_dim, window)(
        inputs=[qkv, *ring, *prompts, rows, _frequencies(head_dim, max_period), place],
        grid=(heads * THREADS, num_rows, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(num_rows, heads, 1, head_dim)],
        output_dtypes=[mx.bfloat16],
    )
    return y


@functools.cache
def _frequencies(head_dim: int, max_period: float) -> mx.array:
    return mx.array(frequencies(head_dim, max_period))


@functools.cache
def _attention(head_dim: int, window: int) -> Callable[..., list[mx.array]]:
    floats = 3 * head_dim + THREADS // 32 * head_dim + window + 512
    return _kernel(
        f"pplex_attend_{head_dim}_{window}",
        {"THREADS": THREADS, "HEAD_DIM": head_dim, "WINDOW": window},
        ["common.cu", "rows.cu"],
        inputs=["qkv", "keys", "values", "prompt_keys", "prompt_values", "rows"]
        + ["frequencies", "place"],
        outputs=["y"],
        call="pplex::Ring ring{const_cast<__nv_bfloat16*>(keys), "
        "const_cast<__nv_bfloat16*>(values), place[1]}; "
        "pplex::Prompts prompts{prompt_keys, prompt_values, place[2]}; "
        "pplex::attend(qkv, ring, prompts, rows, frequencies, place[0], y);",
        shared_memory=4 * floats,
    )


def choose_rows(
    logits: mx.array, keys: mx.array, first: int, width: int, temp: float, top_k: int
) -> mx.array:
    """Ids (rows,) drawn from ``logits`` (rows, card), as ``sampling.draw`` does.

    ``keys`` (rows, 2) are those of each row's noise, of which this head takes the
    values from ``first`` on out of ``width``.
    """
    rows, card = logits.shape
    threads = 1024 if card > 8192 else 512
    (ids,) = _choice(threads)(
        inputs=[
            logits.astype(mx.float32),
            keys,
            _head(card, first, width, top_k, temp),
        ],
        grid=(threads, rows, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows,)],
        output_dtypes=[mx.int32],
    )
    return ids


@functools.cache
def _head(card: int, first: int, width: int, top_k: int, temp: float) -> mx.array:
    return mx.array([card, first, width, top_k, temp], mx.float32)


@functools.cache
def _choice(threads: int) -> Callable[..., list[mx.array]]:
    # What differs between heads is read, not compiled: compiling takes seconds.
    return _kernel(
        f"pplex_choose_{threads}",
        {"THREADS": threads},
        ["common.cu"],
        inputs=["logits", "keys", "head"],
        outputs=["ids"],
        call="__shared__ pplex::Scratch sh; int row = blockIdx.y, card = head[0]; "
        "pplex::Noise noise{make_uint2(keys[2 * row], keys[2 * row + 1]), "
        "(unsigned)head[1], (unsigned)head[2]}; "
        "int id = pplex::choose(sh, logits + (size_t)row * card, card, noise, head[4], "
        "(int)head[3]); if (threadIdx.x == 0) ids[row] = id;",
    )


def add_norm_rows(
    x: mx.array, y: mx.array, weight: mx.array
) -> tuple[mx.array, mx.array]:
    """``x + y`` (..., dim) bfloat16, and its RMSNorm with ``weight`` (dim,) float32."""
    dim = x.shape[-1]
    total, normed = _add_norm()(
        inputs=[x, y, weight],
        grid=(NORM_THREADS, x.size // dim, 1),
        threadgroup=(NORM_THREADS, 1, 1),
        output_shapes=[x.shape, x.shape],
        output_dtypes=[mx.bfloat16, mx.bfloat16],
    )
    return total, normed


@functools.cache
def _add_norm() -> Callable[..., list[mx.array]]:
    return _kernel(
        "pplex_add_norm",
        {"THREADS": NORM_THREADS},
        ["common.cu", "steps.cu"],
        inputs=["x", "y", "weight"],
        outputs=["sum", "normed"],
        call="pplex::add_norm(x, y, weight, sum, normed, weight_shape[0]);",
    )


def attend_steps(
    qkv: mx.array, past: mx.array, num_heads: int, layer: int, step: int, first: int
) -> mx.array:
    """Attention (rows, dim) of a depformer step over the steps from ``first`` on.

    ``qkv`` (rows, 3 dim) is the step's; it is written into ``past`` (rows, layers,
    steps, 3 dim), which nothing else may use. All are bfloat16.
    """
    rows, layers, steps, width = past.shape
    dim = width // 3
    (y,) = _step_attention(num_heads, dim // num_heads, steps)(
        inputs=[qkv, past, mx.array([layer, layers, step, first], mx.int32)],
        grid=(32 * num_heads, rows, 1),
        threadgroup=(32 * num_heads, 1, 1),
        output_shapes=[(rows, dim)],
        output_dtypes=[mx.bfloat16],
    )
    return y


@functools.cache
def _step_attention(
    num_heads: int, head_dim: int, steps: int
) -> Callable[..., list[mx.array]]:
    return _kernel(
        f"pplex_attend_steps_{num_heads}_{head_dim}_{steps}",
        {"THREADS": 32 * num_heads},
        ["common.cu", "steps.cu"],
        inputs=["qkv", "past", "place"],
        outputs=["y"],
        call=f"size_t size = (size_t){3 * num_heads * head_dim * steps}; "
        "__nv_bfloat16* kept = const_cast<__nv_bfloat16*>(past) + "
        "(blockIdx.y * (size_t)place[1] + place[0]) * size; "
        f"pplex::attend_steps(qkv, kept, y, place[2], place[3], {num_heads}, "
        f"{head_dim});",
    )


def _kernel(
    name: str,
    sizes: dict[str, int],
    files: list[str],
    *,
    inputs: list[str],
    outputs: list[str],
    call: str,
    shared_memory: int = 0,
) -> Any:
    constants = [f"constexpr int {key} = {value};" for key, value in sizes.items()]
    texts = [read_source(file) for file in files]
    return mx.fast.cuda_kernel(
        name=name,
        input_names=inputs,
        output_names=outputs,
        header="\n".join(["namespace pplex {", *constants, *texts, "}", ""]),
        source=f"\n  {call}\n",
        shared_memory=shared_memory,
    )
