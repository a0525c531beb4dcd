"""Many recordings at once: nobody's answer depends on the company."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from small import SharedSteps, converse, speech

from pplex.audio.files import Samples
from pplex.batch.decoding import PROMPT_FRAMES, Decoder, Size
from pplex.checkpoint.weights import codec_tensors, lm_tensors
from pplex.conversation.prompts import make_role
from pplex.conversation.scheduler import converse_many
from pplex.conversation.tracks import Conversation
from pplex.engine.base import Codec, Cost, Engine
from pplex.engine.choose import KINDS, batch_size
from pplex.engine.cuda.cache import SharedCache
from pplex.engine.mlx.codec import MlxCodec
from pplex.engine.mlx.exchange import Exchange
from pplex.engine.mlx.ring import CacheEach
from pplex.errors import PplexError
from pplex.model.cache import GROWTH, KvCache, scaled_attention
from pplex.model.config import LmConfig, ModelConfig
from pplex.model.mimi import Mimi
from pplex.model.rotary import rotate
from pplex.model.sampling import GREEDY, SamplingConfig

LENGTHS = [40, 3, 1, 75, 20, 33, 2, 60, 9]


class InGroups(SharedSteps):
    """The same whose codec works on four recordings at a time."""

    def _make_codec(self, mimi: Mimi) -> Codec:
        codec = MlxCodec(mimi, on_gpu=False)
        codec.group, codec.chunk_frames = 4, 12
        return codec


@pytest.fixture(scope="module")
def engines(small_model) -> dict[str, Engine]:
    """Engines with the weights of the small model."""
    folder, config = small_model.local.folder, small_model.config
    made = {"best": small_model.engine}
    for name, kind in (("shared", SharedSteps), ("groups", InGroups)):
        tensors = lm_tensors(folder, config.lm), codec_tensors(folder, config.mimi)
        made[name] = kind(config, *tensors)
    return made


def conversations(engine, model) -> list[Conversation]:
    starts = [
        engine.prefill(make_role(model, None, text).prompt)
        for text in ("hello", "a rather longer role than that")
    ]
    return [
        Conversation(
            key=str(idx),
            sound=Samples(
                speech(frames, seed=idx).reshape(-1)[: frames * 1920 - 100 * idx]
            ),
            start=starts[idx % 2],
            seed=1000 + idx,
        )
        for idx, frames in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def assert_as_alone():
    """Assert that recordings were answered as each is alone."""
    known: dict = {}

    def alone(engine, one, sampling):
        key = engine, one.key, sampling
        if key not in known:
            frames = np.pad(one.sound.pcm, (0, -one.sound.num_samples % 1920)).reshape(
                -1, 1920
            )
            known[key] = converse(
                engine, one.start, frames, sampling, one.seed, chunk=32
            )
        return known[key]

    def check(engine, those, results, sampling, *, atol: float = 0.0) -> None:
        assert sorted(one.key for one, _ in results) == [one.key for one in those]
        for one, answer in results:
            assert one is those[int(one.key)]
            tokens, user, pcm = alone(engine, one, sampling)
            found = np.concatenate([answer.text[None], answer.agent])
            np.testing.assert_array_equal(found, tokens)
            np.testing.assert_array_equal(answer.user, user)
            expected = pcm[: one.sound.num_samples]
            np.testing.assert_allclose(answer.pcm, expected, rtol=0, atol=atol)
            assert len(answer.timings.steps) == LENGTHS[int(one.key)]

    return check


@pytest.mark.parametrize(
    ("batch_size", "sampling"),
    [(1, SamplingConfig()), (3, GREEDY), (16, SamplingConfig())],
    ids=["1-drawn", "3-greedy", "16-drawn"],
)
def test_answers_equal_those_given_alone_bit_for_bit(
    small_model, each_engine, assert_as_alone, sampling, batch_size
):
    those = conversations(each_engine, small_model)
    results = list(converse_many(each_engine, those, sampling, batch_size=batch_size))
    assert_as_alone(each_engine, those, results, sampling)


@pytest.mark.parametrize("batch_size", [4, 9])
def test_answers_from_a_shared_ring_equal_those_given_alone(
    small_model, engines, assert_as_alone, batch_size
):
    """The way of GPUs, here on the CPU: tokens agree, rounding may differ."""
    engine, sampling = engines["shared"], SamplingConfig()
    those = conversations(engine, small_model)
    results = list(converse_many(engine, those, sampling, batch_size=batch_size))
    assert_as_alone(engine, those, results, sampling, atol=1e-5)


@pytest.mark.parametrize("batch_size", [3, 9])
def test_recordings_coded_in_groups_equal_those_given_alone(
    small_model, engines, assert_as_alone, batch_size
):
    """The way of GPUs, here on the CPU: tokens agree, rounding may differ."""
    engine, sampling = engines["groups"], SamplingConfig()
    those = conversations(engine, small_model)
    results = list(converse_many(engine, those, sampling, batch_size=batch_size))
    assert_as_alone(engine, those, results, sampling, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "times", "ahead"),
    [
        # Two have places, one is encoded ahead, three at most are still to be decoded.
        ("best", 6, 6),
        # A group that was encoded, and one that is decoded and given away.
        ("groups", 2, 8),
    ],
)
def test_recordings_are_asked_for_as_places_become_free(
    small_model, engines, name, times, ahead
):
    engine, asked, answered = engines[name], [], 0
    many = times * conversations(engine, small_model)

    def lazily():
        for one in many:
            asked.append(one.key)
            yield one

    for _ in converse_many(engine, lazily(), GREEDY, batch_size=2):
        assert len(asked) - answered <= ahead
        answered += 1
    assert answered == len(many)


def test_one_that_cannot_be_read_does_not_end_its_group(small_model, engines):
    """It was too long to be kept, and its file is another by now."""

    class Gone:
        num_samples = 5000

        @property
        def pcm(self):
            raise PplexError("it has changed")

    engine = engines["groups"]
    those = conversations(engine, small_model)[:4]
    answers = converse_many(engine, those, GREEDY, batch_size=4)
    whole = {one.key: answer for one, answer in answers}
    given = [those[0], replace(those[1], sound=Gone()), *those[2:]]
    for one, answer in converse_many(engine, given, GREEDY, batch_size=4):
        assert answer.fault == ("it has changed" if one.key == "1" else "")
        if one.key != "1":
            np.testing.assert_array_equal(answer.pcm, whole[one.key].pcm)


def test_no_group_but_the_last_is_decoded_with_idle_rows(
    small_model, engines, monkeypatch
):
    """Though all end in one step."""
    engine, sizes = engines["groups"], []
    decode_next = engine.codec.decode_next

    def noted(given, state):
        sizes.append(len(given))
        return decode_next(given, state)

    monkeypatch.setattr(engine.codec, "decode_next", noted)
    one = conversations(engine, small_model)[0]
    those = [replace(one, key=str(idx)) for idx in range(10)]
    assert len(list(converse_many(engine, those, GREEDY, batch_size=10))) == 10
    assert sizes == -(-LENGTHS[0] // 12) * [4, 4, 2]


@pytest.mark.parametrize("name", ["best", "groups"])
def test_nothing_to_answer_is_no_result(engines, name):
    assert list(converse_many(engines[name], [], GREEDY, batch_size=4)) == []


def test_batch_size_follows_the_number_of_recordings(small_model):
    def chosen(count: int) -> int:
        size = Size(None, 400, count, 400 * count)
        return Decoder(small_model, GREEDY, size, lambda note: None).choose_batch_size()

    config, cost = small_model.config, small_model.engine.cost()
    most = batch_size(config, cost, 400 + PROMPT_FRAMES)
    assert 1 <= most < 10_000
    assert chosen(10_000) == most
    assert chosen(3) == min(3, most)


def test_a_batch_has_at_least_a_row_and_counts_no_more_than_the_window(small_model):
    config, cost = small_model.config, small_model.engine.cost()
    assert batch_size(config, cost, 400, free_bytes=0) >= 1
    most = batch_size(config, cost, config.lm.window)
    assert batch_size(config, cost, 100 * config.lm.window) == most


def test_a_batch_keeps_to_what_a_cache_holds_unless_weights_take_more():
    def rows(lm: LmConfig, frames: int, weights: int) -> int:
        cost = Cost(
            step=weights, position=0, codec=0, codec_state=0, codec_work=0, held=0
        )
        return KINDS["c"].max_rows(cost, frames * ModelConfig(lm).kv_bytes(4), 0.0)

    small = replace(LmConfig(), num_layers=5, dim=256)
    assert rows(small, 100, 0) == 8
    assert rows(small, 100, 8_000_000) == 8  # of 10 240 bytes a frame
    assert rows(small, 1000, 8_000_000) == 8
    assert rows(small, 1500, 8_000_000) == 6
    assert rows(small, 2900, 8_000_000) == 4
    assert rows(LmConfig(), 1000, 8_000_000) == 4
    assert rows(LmConfig(), 1000, 8_000_000_000) == 7  # of 1 MB a frame
    assert rows(LmConfig(), 1000, 32_000_000_000) == 16


def test_takes_are_as_many_at_a_time_in_a_batch_as_of_one_recording(monkeypatch):
    monkeypatch.setattr("pplex.engine.choose.kind_here", lambda: "c")
    cost = Cost(step=0, position=1024, codec=0, codec_state=0, codec_work=0, held=0)
    size = Size(None, 100, 40, 4000)
    for given, rows in ((size, 8), (replace(size, takes=True), 16)):
        assert given.fitting(ModelConfig(), cost) == rows


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


def test_a_ring_has_room_for_what_its_rows_will_say_and_little_more(monkeypatch):
    monkeypatch.setattr("pplex.engine.cuda.cache.attend_rows", attend_as_the_kernel)
    prompt = KvCache(1, 3000)
    new = mx.zeros((1, 6, 9, 8))
    prompt.attend(0, new, 10000.0, prompt.mask(9))
    prompt.advance(9)
    prompt.said = 0
    shared = SharedCache(prompt, 2, Exchange())
    for row, frames in enumerate((375, 380)):
        shared.put(row, prompt.copy(), frames)
    for _ in range(380):
        shared.attend(0, new[:, :, :2], 10000.0, shared.mask(1))
        shared.advance(1)
    (keys, values) = shared._ring.of_layer(0)
    assert keys.shape[2] == values.shape[2] == 384


@pytest.mark.parametrize(
    "kind",
    [
        lambda like, count: CacheEach(count),
        lambda like, count: SharedCache(like, count, Exchange()),
    ],
)
@pytest.mark.parametrize("window", [30, GROWTH + 50])
def test_ring_for_many_rows_equals_caches_apart(window, kind, monkeypatch):
    monkeypatch.setattr("pplex.engine.cuda.cache.attend_rows", attend_as_the_kernel)
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
            cache.said = 0
            ring = ring or kind(cache, 2)
            row = len(apart) if step < window else step % 2
            ring.put(row, cache.copy())
            if step == 0:
                ring.put(1, cache.copy())  # until it is taken
            apart[row : row + 1] = [cache]
        new = [qkv(1) for _ in range(2)]
        found = ring.attend(0, mx.concatenate(new, axis=2), 10000.0, ring.mask(1))
        ring.advance(1)
        for idx, (cache, one) in enumerate(zip(apart, new, strict=False)):
            expected = cache.attend(0, one, 10000.0, cache.mask(1))
            cache.advance(1)
            np.testing.assert_allclose(
                np.array(found[:, :, idx : idx + 1]), np.array(expected), atol=1e-5
            )
