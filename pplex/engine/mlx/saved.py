"""Keys and values, and a codec's state, as what is saved has them."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import numpy as np
from numpy.typing import DTypeLike

from pplex.engine.base import Arrays, checked, number
from pplex.model.cache import KvCache
from pplex.model.mimi import CodecState


def to_numpy(x: mx.array) -> np.ndarray:
    """A copy; bfloat16, which NumPy has not, as its bits in uint16."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def _to_mlx(x: np.ndarray) -> mx.array:
    """An array of what was saved; uint16 are bits of bfloat16."""
    array = mx.array(x)
    return array.view(mx.bfloat16) if x.dtype == np.uint16 else array


def save_cache(cache: KvCache, ahead: int = 0) -> dict[str, np.ndarray]:
    """The keys, then the values (2 layers, heads, slots, head_dim) of the first row.

    As far as they are filled; and the positions so far, how many after a prompt.
    Without the last ``ahead``: in a full ring nothing sees what they wrote over. At
    8 bits they are words, and the ``scales`` are beside them.
    """
    end = cache.end - ahead
    filled = min(end, cache.window)
    arrays = [to_numpy(array[:1, :, :filled]) for array in cache.arrays()]
    kept = {}
    if filled:
        size, step = cache.num_layers, len(arrays) // 2
        for first, name in zip(range(0, step, size), ("cache", "scales"), strict=False):
            keys, values = (arrays[i : i + size] for i in (first, first + step))
            kept[name] = np.concatenate([*keys, *values])
    ends = {"end": end, "said": max(0, cache.said - ahead)}
    return kept | {name: np.array([count], np.int64) for name, count in ends.items()}


def restore_cache(
    cache: KvCache, saved: Arrays, heads: int, head_dim: int, dtype: mx.Dtype
) -> None:
    """Make an empty cache what was saved; ValueError if it does not fit."""
    cache.end = number(saved, "end")
    cache.said = min(number(saved, "said"), cache.end)
    kinds: dict[str, tuple[int, DTypeLike]] = {
        "cache": (head_dim, np.uint16 if dtype == mx.bfloat16 else np.float32)
    }
    if cache.bits is not None:
        kinds = {"cache": (head_dim // 4, np.uint32), "scales": (1, np.float32)}
    layers, filled = cache.num_layers, min(cache.end, cache.window)
    keys: list[mx.array] = []
    values: list[mx.array] = []
    for name, (width, kind) in kinds.items():
        if filled:
            array = checked(saved, name, (2 * layers, heads, filled, width), kind)
        else:  # there are arrays all the same
            array = np.zeros((2 * layers, heads, 1, width), kind)
        both = mx.split(_to_mlx(array), 2 * layers)
        keys += both[:layers]
        values += both[layers:]
    cache.put(keys + values)


def save_codec(state: CodecState) -> dict[str, np.ndarray]:
    """The first row of a codec's state."""
    carried = {f"seanet.{i}": array for i, array in enumerate(state.seanet or [])}
    carried["resample"] = state.resample
    held = {k: to_numpy(array[:1]) for k, array in carried.items() if array is not None}
    return save_cache(state.cache) | held


def restore_codec(
    state: CodecState, saved: Arrays, likes: Iterable[CodecState], rows: int
) -> None:
    """Make a fresh state the saved one, the first of so many rows.

    It is of the direction of one of ``likes``, states after a chunk.
    """
    if not number(saved, "end"):
        return
    names = [name for name in saved if name.startswith(("seanet.", "resample"))]
    carried = {name: saved[name] for name in names}
    for like in likes:
        known = save_codec(like)
        others = known.keys() - {"cache", "end", "said"}
        if others == carried.keys() and all(
            (known[k].shape, known[k].dtype) == (saved[k].shape, saved[k].dtype)
            for k in others
        ):
            break
    else:
        raise ValueError("the codec's state is none of this model")
    _, heads, _, head_dim = known["cache"].shape
    restore_cache(state.cache, saved, heads, head_dim, mx.float32)
    state.cache.put([_padded(array, rows) for array in state.cache.arrays()])
    arrays = {name: _padded(_to_mlx(array), rows) for name, array in carried.items()}
    state.resample = arrays.pop("resample")
    state.seanet = [arrays.get(f"seanet.{i}") for i in range(len(like.seanet or []))]


def _padded(x: mx.array, rows: int) -> mx.array:
    """``x`` (1, ...) with zeros behind, as ``rows``."""
    return mx.pad(x, [(0, rows - 1)] + [(0, 0)] * (x.ndim - 1)) if rows > 1 else x
