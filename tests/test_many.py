"""Many recordings at once: nobody's answer depends on the company."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from small import converse, speech

import pplex.conversation.many as many
from pplex.checkpoint.weights import load_mimi
from pplex.codec.codec import MlxCodec
from pplex.conversation.many import (
    Item,
    auto_batch_size,
    converse_many,
    rows_on_cpu,
)
from pplex.conversation.prompt import prefill
from pplex.conversation.session import make_role
from pplex.layers.cache import GROWTH, KvCache, SlotCache, scaled_attention
from pplex.layers.cuda.cache import SharedCache
from pplex.layers.rotary import rotate
from pplex.model.config import LmConfig
from pplex.model.sampling import GREEDY, SamplingConfig

LENGTHS = [40, 3, 1, 75, 20, 33, 2, 120, 9]


@pytest.fixture
def items(small_model):
    """Prompts are read by what makes the steps: ask for ``mlx_steps`` before these."""
    prompts = [
        prefill(small_model.lm, make_role(small_model, None, text).prompt)
        for text in ("hello", "a rather longer role than that")
    ]
    return [
        Item(
            key=idx,
            pcm=speech(frames, seed=idx).reshape(-1)[: frames * 1920 - 100 * idx],
            prefilled=prompts[idx % 2],
            seed=1000 + idx,
        )
        for idx, frames in enumerate(LENGTHS)
    ]


def alone(model, item, sampling):
    frames = np.pad(item.pcm, (0, -len(item.pcm) % 1920)).reshape(-1, 1920)
    tokens, user, pcm = converse(
        model, item.prefilled, frames, sampling, item.seed, chunk=32
    )
    return tokens, user, pcm[: len(item.pcm)]


@pytest.mark.parametrize(
    "sampling", [GREEDY, SamplingConfig()], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_answers_equal_those_given_alone_bit_for_bit(
    small_model,
    each_way,
    items,
    sampling,
    batch_size,
):
    results = list(converse_many(small_model, items, sampling, batch_size=batch_size))
    assert sorted(r.key for r in results) == list(range(len(LENGTHS)))
    for result in results:
        tokens, user, pcm = alone(small_model, items[result.key], sampling)
        found = np.concatenate([result.text[None], result.agent])
        np.testing.assert_array_equal(found, tokens)
        np.testing.assert_array_equal(result.user, user)
        np.testing.assert_array_equal(result.agent_pcm, pcm)
        assert len(result.timings.steps) == LENGTHS[result.key]


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_answers_from_a_shared_ring_equal_those_given_alone(
    small_model,
    mlx_steps,
    items,
    batch_size,
    monkeypatch,
):
    """The way of GPUs, here on the CPU: tokens agree, rounding may differ."""
    seats = many._Rows._change_seats
    monkeypatch.setattr(many._Rows, "_come_and_go", seats)
    results = list(
        converse_many(small_model, items, SamplingConfig(), batch_size=batch_size)
    )
    assert len(results) == len(LENGTHS)
    for result in results:
        tokens, user, pcm = alone(small_model, items[result.key], SamplingConfig())
        found = np.concatenate([result.text[None], result.agent])
        np.testing.assert_array_equal(found, tokens)
        np.testing.assert_allclose(result.agent_pcm, pcm, atol=1e-5)


@pytest.mark.parametrize("batch_size", [3, 9])
def test_recordings_coded_in_groups_equal_those_given_alone(
    small_model, mlx_steps, items, batch_size, monkeypatch
):
    """The way of GPUs, here on the CPU: tokens agree, rounding may differ."""
    path = next(small_model.local.path.glob("tokenizer-*.safetensors"))
    mimi = load_mimi(path, small_model.config.mimi)
    model = dataclasses.replace(small_model, codec=MlxCodec(mimi))
    monkeypatch.setattr(many, "GROUP", 4)
    monkeypatch.setattr(many, "in_groups", lambda model: True)
    monkeypatch.setattr(many._Rows, "_come_and_go", many._Rows._change_seats)
    results = list(converse_many(model, items, SamplingConfig(), batch_size=batch_size))
    assert sorted(result.key for result in results) == list(range(len(LENGTHS)))
    for result in results:
        tokens, user, pcm = alone(small_model, items[result.key], SamplingConfig())
        found = np.concatenate([result.text[None], result.agent])
        np.testing.assert_array_equal(found, tokens)
        np.testing.assert_array_equal(result.user, user)
        np.testing.assert_allclose(result.agent_pcm, pcm, atol=1e-5)
        assert len(result.timings.steps) == LENGTHS[result.key]


def test_items_are_asked_for_as_rows_become_free(small_model, items):
    asked, answered, many = [], 0, 6 * items

    def lazily():
        for item in many:
            asked.append(item.key)
            yield item

    for _ in converse_many(small_model, lazily(), GREEDY, batch_size=2):
        # Two in rows, one encoded ahead, three at most still to be decoded.
        assert len(asked) - answered <= 6
        answered += 1
    assert answered == len(many)


def test_nothing_to_answer_is_no_result(small_model):
    assert list(converse_many(small_model, [], GREEDY, batch_size=4)) == []


def test_batch_size_follows_the_number_of_recordings(small_model):
    assert auto_batch_size(small_model, 400, 3) == 3
    assert 1 <= auto_batch_size(small_model, 400, 10_000) < 10_000


def test_a_batch_keeps_to_what_a_cache_holds_unless_weights_take_more():
    small = dataclasses.replace(LmConfig(), num_layers=5, dim=256)
    assert rows_on_cpu(small, 100, 0) == 8
    assert rows_on_cpu(small, 100, 8e6) == 8  # of 10 240 bytes a frame
    assert rows_on_cpu(small, 1000, 8e6) == 8
    assert rows_on_cpu(small, 1500, 8e6) == 6
    assert rows_on_cpu(small, 2900, 8e6) == 4
    assert rows_on_cpu(LmConfig(), 1000, 8e6) == 4
    assert rows_on_cpu(LmConfig(), 1000, 8e9) == 7  # of 1 MB a frame
    assert rows_on_cpu(LmConfig(), 1000, 32e9) == 16


def attend_as_the_kernel(qkv, ring, prompts, rows, tiles, slot, window, max_period):
    """What ``attend_rows`` is said to do, a position at a time."""
    heads = qkv.shape[1] // 3
    in_tiles = [
        (row, number) for number, *some in tiles.tolist() for row in some if row >= 0
    ]
    numbers = enumerate(rows[:, 3].tolist())
    assert sorted(in_tiles) == [(row, n) for row, n in numbers if rows[row, 1] > 0]
    outputs = []
    for row, (count, in_prompt, first_kept, prompt) in enumerate(rows.tolist()):
        rotated = rotate(qkv[row : row + 1, : 2 * heads], max_period, count)
        ring[0][row, :, slot] = rotated[0, heads:, 0]
        ring[1][row, :, slot] = qkv[row, 2 * heads :, 0]
        seen = []
        for position in range(max(first_kept, count + 1 - window), count + 1):
            if position < in_prompt:
                seen.append([p[prompt, :, position - first_kept] for p in prompts])
            else:
                at = (slot - (count - position)) % ring[0].shape[2]
                seen.append([r[row, :, at] for r in ring])
        keys, values = (mx.stack(a, axis=1)[None] for a in zip(*seen, strict=True))
        outputs.append(scaled_attention(rotated[:, :heads], keys, values, None))
    return mx.concatenate(outputs)


@pytest.mark.parametrize("kind", [SlotCache, SharedCache])
@pytest.mark.parametrize("window", [30, GROWTH + 50])
def test_ring_for_many_rows_equals_caches_apart(window, kind, monkeypatch):
    monkeypatch.setattr("pplex.layers.cuda.cache.attend_rows", attend_as_the_kernel)
    rng = np.random.default_rng(0)
    heads, dim = 2, 8

    def qkv(t):
        return mx.array(rng.standard_normal((1, 3 * heads, t, dim)).astype(np.float32))

    apart: list[KvCache] = []
    ring = None
    for step in range(2 * window + 40):
        if step in (0, 7, window, window + 20):
            cache = KvCache(1, window)
            prompt = qkv(5 + step % 50)
            cache.attend(0, prompt, 10000.0, cache.mask(prompt.shape[2]))
            cache.advance(prompt.shape[2])
            ring = ring or kind(cache, 2)
            row = len(apart) if step < window else step % 2
            ring.put(row, cache.copy())
            if step == 0:
                ring.put(1, cache.copy())  # until it is taken
            apart[row : row + 1] = [cache]
        new = [qkv(1) for _ in range(2)]
        found = ring.attend(0, mx.concatenate(new), 10000.0, ring.mask(1))
        ring.advance(1)
        for idx, (cache, one) in enumerate(zip(apart, new, strict=False)):
            expected = cache.attend(0, one, 10000.0, cache.mask(1))
            cache.advance(1)
            np.testing.assert_allclose(
                np.array(found[idx]), np.array(expected[0]), atol=1e-5
            )
