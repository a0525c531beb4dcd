"""One matrix to packed codes, scales and biases: MLX's affine form, fitted better.

``mx.quantize`` spreads the codes of a group between its extremes. ``refine`` then
alternates between the nearest codes and the scale and bias that fit them with the
least squared error, which a group's outliers otherwise decide.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from pplex.checkpoint.layouts import Quantization
from pplex.engine.device import streams

STORED = mx.float16  # of scales and biases, as the published folders have them
ROUNDS = 4
BLOCK_VALUES = 1 << 22

Parts = tuple[mx.array, mx.array, mx.array]  # packed codes, scales, biases


def quantize(
    weight: mx.array, form: Quantization, refine: bool
) -> tuple[mx.array, mx.array, mx.array]:
    """``weight`` (rows, columns) as packed codes, scales and biases.

    Some rows at a time, so that no more than those are held in float32.
    """
    rows, columns = weight.shape
    step = max(1, BLOCK_VALUES // columns)
    blocks = (weight[i : i + step].astype(mx.float32) for i in range(0, rows, step))
    return quantize_blocks(blocks, form, refine)


def quantize_blocks(
    blocks: Iterable[mx.array], form: Quantization, refine: bool
) -> tuple[mx.array, mx.array, mx.array]:
    """A matrix that comes in ``blocks`` of rows, in float32, like ``quantize``.

    One block is computed while the next is made.
    """
    queues = streams()
    done = []
    for number, block in enumerate(blocks):
        with mx.stream(queues[number % len(queues)]):
            parts = mx.quantize(block, group_size=form.group_size, bits=form.bits)
            packed, scales, biases = parts
            parts = packed, scales.astype(STORED), biases.astype(STORED)
            parts = _refine(block, form, parts) if refine else parts
            mx.async_eval(*parts)
        done.append(parts)
    packed, scales, biases = (mx.concatenate(list(p)) for p in zip(*done, strict=True))
    mx.eval(packed, scales, biases)
    return packed, scales, biases


def _refine(
    weight: mx.array, form: Quantization, parts: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array, mx.array]:
    """The parts with less squared error, group by group."""
    rows, columns = weight.shape
    w = weight.reshape(rows, -1, form.group_size)
    top = 2**form.bits - 1
    mean = w.mean(axis=-1, keepdims=True)

    def nearest(scale: mx.array, bias: mx.array) -> mx.array:
        inverse = mx.where(scale == 0, 0.0, 1.0 / scale)
        return mx.clip(mx.round((w - bias) * inverse), 0, top)

    def error(codes: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
        return mx.square(codes * scale + bias - w).sum(axis=-1, keepdims=True)

    scale, bias = (part.astype(mx.float32)[..., None] for part in parts[1:])
    codes = nearest(scale, bias)
    best: tuple[mx.array, ...] = (error(codes, scale, bias), codes, scale, bias)
    for _ in range(ROUNDS):
        middle = codes.mean(axis=-1, keepdims=True)
        spread = codes - middle
        variance = mx.square(spread).mean(axis=-1, keepdims=True)
        together = (spread * w).mean(axis=-1, keepdims=True)
        slope = mx.where(variance > 0, together / mx.maximum(variance, 1e-9), scale)
        # As stored: the codes are chosen for the rounded values.
        scale = slope.astype(STORED).astype(mx.float32)
        bias = (mean - scale * middle).astype(STORED).astype(mx.float32)
        codes = nearest(scale, bias)
        found = (error(codes, scale, bias), codes, scale, bias)
        better = found[0] < best[0]
        best = tuple(mx.where(better, f, b) for f, b in zip(found, best, strict=True))
    _, codes, scale, bias = best
    packed = pack(codes.reshape(rows, columns).astype(mx.uint32), form.bits)
    return packed, scale[..., 0].astype(STORED), bias[..., 0].astype(STORED)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes uint32 (rows, columns) as words (rows, columns * bits / 32).

    A row is one stream of bits, the low bits of a code and of a word first.
    """
    rows, columns = codes.shape
    if 32 % bits == 0:
        per_word = 32 // bits
        shifts = mx.arange(per_word, dtype=mx.uint32) * bits
        words = codes.reshape(rows, -1, per_word) << shifts
        return words.sum(axis=-1).astype(mx.uint32)
    single = (np.array(codes)[..., None] >> np.arange(bits, dtype=np.uint32)) & 1
    stream = np.packbits(
        single.astype(np.uint8).reshape(rows, columns * bits), axis=1, bitorder="little"
    )
    return mx.array(stream.view("<u4"))
