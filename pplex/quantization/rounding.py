"""A matrix rounded so that its outputs change least, not its values.

Of what a matrix is multiplied with the second moments are known (``activations``). The
error that the rounding of a column makes is made good by the columns after it (GPTQ,
arXiv 2210.17323, in the form of LDLQ, arXiv 2307.13304). Then, in turn, the scales and
biases of a row are fitted by least squares of the outputs' error, and each code is
moved to the value that is best beside all others.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from pplex.checkpoint.layouts import Quantization
from pplex.quantization.quantize import STORED, pack, quantize

_DAMPING = 0.01  # of the mean of the diagonal
_ROUNDS = 2
_BLOCK_VALUES = 1 << 24
_RIDGE = 1e-6


def round_by_inputs(
    weight: mx.array, moment: np.ndarray, form: Quantization
) -> tuple[mx.array, mx.array, mx.array]:
    """Packed codes, scales and biases of ``weight`` (rows, columns) in float32.

    ``moment`` (columns, columns) is the sum of the outer products of its inputs.
    """
    w = np.array(weight)
    h = moment.astype(np.float32)
    h[np.diag_indices(len(h))] += _DAMPING * max(float(np.diag(h).mean()), 1e-9)
    codes, scales, biases = _forward(w, h, form)
    for _ in range(_ROUNDS):
        scales, biases = _fitted(w, h, codes, scales, biases)
        codes = _moved(w, h, codes, scales, biases, form)
    scales, biases = _fitted(w, h, codes, scales, biases)
    whole = codes.reshape(w.shape).astype(np.uint32)
    packed = pack(mx.array(whole), form.bits)
    return packed, mx.array(scales).astype(STORED), mx.array(biases).astype(STORED)


def _forward(
    w: np.ndarray, h: np.ndarray, form: Quantization
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (rows, groups, group_size), scales and biases (rows, groups), in float32.

    Column by column, each with what the errors before it ask of it.
    """
    rows, columns = w.shape
    size, top = form.group_size, 2**form.bits - 1
    # h = U D U^T with ones on the diagonal of U, which is upper triangular.
    upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    upper = upper / np.diag(upper)
    codes, errors = np.empty_like(w), np.empty_like(w)
    scales, biases = (np.empty((rows, columns // size), np.float32) for _ in range(2))
    for group in range(columns // size):
        first, last = group * size, (group + 1) * size
        wanted = w[:, first:last] + errors[:, :first] @ upper[:first, first:last]
        _, *fit = quantize(mx.array(wanted), form, refine=True)
        scale, bias = (np.array(part.astype(mx.float32))[:, 0] for part in fit)
        inverse = _inverse(scale)
        scales[:, group], biases[:, group] = scale, bias
        for j in range(first, last):
            value = wanted[:, j - first] + errors[:, first:j] @ upper[first:j, j]
            codes[:, j] = np.clip(np.round((value - bias) * inverse), 0, top)
            errors[:, j] = w[:, j] - (codes[:, j] * scale + bias)
    return codes.reshape(rows, -1, size), scales, biases


def _inverse(scales: np.ndarray) -> np.ndarray:
    """One over each, and 0 over 0: codes of a scale of 0 say nothing."""
    none = scales == 0
    inverse: np.ndarray = np.where(none, 0, 1 / np.where(none, 1, scales))
    return inverse


def _values(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """The matrix (rows, columns) that they stand for."""
    values: np.ndarray = codes * scales[..., None] + biases[..., None]
    return values.reshape(len(codes), -1)


def _fitted(
    w: np.ndarray,
    h: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases with the least squared error of each row's outputs.

    As stored, rounded; a row that they serve no better keeps its own.
    """
    rows, groups, size = codes.shape
    step = max(1, _BLOCK_VALUES // (groups * groups * size))
    by_group = h.reshape(groups, size, groups, size)
    ones = by_group.sum(axis=(1, 3))
    done = []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        q, before = codes[part], np.concatenate([scales[part], biases[part]], axis=1)
        error = w[part] - _values(q, scales[part], biases[part])
        # (groups, rows, columns) to the products of all pairs of groups.
        crossed = (q.transpose(1, 0, 2) @ h.reshape(groups, size, -1)).reshape(
            groups, len(q), groups, size
        )
        matrix = np.empty((len(q), 2 * groups, 2 * groups), np.float64)
        matrix[:, :groups, :groups] = (crossed * q).sum(-1).transpose(1, 0, 2)
        mixed = crossed.sum(-1).transpose(1, 0, 2)
        matrix[:, :groups, groups:] = mixed
        matrix[:, groups:, :groups] = mixed.transpose(0, 2, 1)
        matrix[:, groups:, groups:] = ones
        ridge = _RIDGE * np.trace(matrix, axis1=1, axis2=2) / (2 * groups)
        matrix += ridge[:, None, None] * np.eye(2 * groups)
        felt = (error @ h).reshape(q.shape)
        wanted = np.concatenate([(felt * q).sum(-1), felt.sum(-1)], axis=1)
        change = np.linalg.solve(matrix, wanted[..., None].astype(np.float64))[..., 0]
        after = (before + change).astype(np.float16).astype(np.float32)
        left = w[part] - _values(q, after[:, :groups], after[:, groups:])
        # What overflows float16 is worse than anything.
        better = ((left @ h) * left).sum(1) < ((error @ h) * error).sum(1)
        done.append(np.where(better[:, None], after, before))
    both = np.concatenate(done)
    return both[:, :groups], both[:, groups:]


def _moved(
    w: np.ndarray,
    h: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
    form: Quantization,
) -> np.ndarray:
    """Each code in turn where the error of the outputs is least."""
    size, top = form.group_size, 2**form.bits - 1
    moved, diagonal = codes.copy(), np.diag(h)
    felt = (_values(codes, scales, biases) - w) @ h
    for group in range(codes.shape[1]):
        first, last = group * size, (group + 1) * size
        scale, inverse = scales[:, group], _inverse(scales[:, group])
        here = np.ascontiguousarray(felt[:, first:last])
        changes = np.empty_like(here)
        for j in range(size):
            now = moved[:, group, j]
            best = now - here[:, j] / diagonal[first + j] * inverse
            best = np.clip(np.round(best), 0, top)
            changes[:, j] = (best - now) * scale
            moved[:, group, j] = best
            here += np.outer(changes[:, j], h[first + j, first:last])
        felt += changes @ h[first:last]
    return moved
