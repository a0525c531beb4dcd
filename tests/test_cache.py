"""The KV cache: windows, rings and chunks, against attention written out in full."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from pplex.engine.mlx.ring import FastCache, rope
from pplex.model.cache import GROWTH, KvCache, quantize_vectors, written_out
from pplex.model.rotary import rotate
from pplex.model.transformer import TemporalLayer, run_layers

DIM, HEADS = 32, 2


def visible(total: int, window: int, block: int) -> np.ndarray:
    """Which keys each query may see, from the rule in words.

    The last position written counts: a query sees back to ``window`` positions before
    the end of its own block, and never ahead of itself.
    """
    mask = np.zeros((total, total), bool)
    for query in range(total):
        end_of_block = query - query % block + block
        for key in range(total):
            mask[query, key] = end_of_block - window <= key <= query
    return mask


def outputs(
    layers, x: mx.array, sizes: list[int], window: int, block: int, kind=KvCache
):
    cache = kind(len(layers), window, block)
    parts, start = [], 0
    for size in sizes:
        parts.append(run_layers(layers, x[:, start : start + size], cache, 1e4))
        mx.eval(parts[-1])
        start += size
    return np.array(mx.concatenate(parts, axis=1)), cache


@pytest.fixture(scope="module")
def layers():
    mx.random.seed(3)
    made = [TemporalLayer(DIM, HEADS, 64) for _ in range(2)]
    mx.eval([layer.parameters() for layer in made])
    return made


class WholeCache(KvCache):
    """No cache at all: one call, an explicit mask."""

    def mask(self, t):
        return mx.array(visible(t, self.window, self.block))

    def update(self, layer, keys, values):
        return keys, values


@pytest.mark.parametrize("kind", [KvCache, FastCache])
@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("window", [9, 24, 399])
@pytest.mark.parametrize("pattern", ["steps", "chunks", "mixed", "prefill"])
def test_any_way_of_feeding_equals_attention_without_a_cache(
    layers, kind, block, window, pattern
):
    total = 80
    x = mx.random.normal((2, total, DIM), key=mx.random.key(1))
    whole = np.array(run_layers(layers, x, WholeCache(2, window, block), 1e4))
    sizes = {
        "steps": [block] * (total // block),
        "chunks": [16] * 5,
        "mixed": [30, *[block] * (20 // block), 4, 6, *[block] * (20 // block)],
        "prefill": [60, *[block] * (20 // block)],
    }[pattern]
    found, cache = outputs(layers, x, sizes, window, block, kind)
    assert cache.end == total
    np.testing.assert_allclose(found, whole, atol=2e-5)


def test_cache_stops_growing_at_its_window(layers):
    window = GROWTH + 40
    x = mx.random.normal((1, 3 * window, DIM))
    _, cache = outputs(layers, x, [1] * (3 * window), window, 1)
    assert {a.shape[2] for a in cache.arrays()} == {window}


def test_copy_goes_its_own_way(layers):
    x = mx.random.normal((1, 40, DIM))
    _, cache = outputs(layers, x[:, :20], [20], 16, 1)
    other = cache.copy()
    first = np.array(run_layers(layers, x[:, 20:21], cache, 1e4))
    run_layers(layers, x[:, 30:31], other, 1e4)
    again = np.array(run_layers(layers, x[:, 21:22], cache, 1e4))
    expected, _ = outputs(layers, x[:, :22], [20, 1, 1], 16, 1)
    np.testing.assert_allclose(first, expected[:, 20:21], atol=1e-6)
    np.testing.assert_allclose(again, expected[:, 21:22], atol=1e-6)


@pytest.mark.parametrize("rotate", [rotate, rope])
@pytest.mark.parametrize("offset", [0, 7, 2999, 45000])
def test_rotation_of_a_position_does_not_depend_on_how_many_come_with_it(
    offset, rotate
):
    x = mx.random.normal((1, 4, 6, 16), key=mx.random.key(3))
    together = np.array(rotate(x, 10000.0, offset))
    for idx in range(6):
        apart = np.array(rotate(x[:, :, idx : idx + 1], 10000.0, offset + idx))
        np.testing.assert_allclose(apart[:, :, 0], together[:, :, idx], atol=1e-6)


def test_at_8_bits_a_vector_is_rounded_to_the_nearest_of_255_numbers():
    x = mx.random.normal((2, 3, 5, 32), key=mx.random.key(2))
    x[0, 0, 0] = 0
    words, scales = quantize_vectors(x)
    assert words.nbytes + scales.nbytes == 30 * (32 + 4)
    kept, found = np.array(x), np.array(written_out((words, scales), mx.float32))
    largest = np.abs(kept).max(axis=-1, keepdims=True)
    assert (np.abs(found - kept) <= largest / 127 * 0.501).all()
    np.testing.assert_allclose(np.abs(found).max(axis=-1), largest[..., 0], rtol=1e-6)


def test_rotation_far_from_the_start_is_the_references():
    """Interleaved pairs; the angles' rounding to float32 shows there.

    Expected: the published formula in PyTorch, position 44321, width 8.
    """
    x = mx.array([1.0, 0.0] * 4).reshape(1, 1, 1, 8)
    expected = [
        0.8314095,
        -0.5556602,
        -0.7727557,
        0.6347036,
        -0.9700336,
        -0.2429708,
        0.943188,
        0.3322595,
    ]
    found = np.array(rotate(x, 10000.0, 44_321))
    np.testing.assert_allclose(found[0, 0, 0], expected, atol=1e-6)
