"""The step loop: what it leaves out, long recordings, conversations side by side."""

from __future__ import annotations

import copy
import functools
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from small import SMALL, converse, live_frames, speech

from pplex.checkpoint.folder import CheckpointFolder
from pplex.checkpoint.weights import codec_tensors, lm_tensors, make_lm
from pplex.conversation import scheduler
from pplex.conversation.prompts import make_role
from pplex.engine.base import Start
from pplex.engine.mlx.engine import Frame, MlxEngine
from pplex.model.cache import KvCache
from pplex.model.prompt import make_prompt
from pplex.model.sampling import GREEDY, Sampler, SamplingConfig
from pplex.model.streams import shift, unshift


@pytest.fixture(scope="module")
def full_lm(small_folder):
    """The same language model with all sixteen depformer steps."""
    tensors = lm_tensors(CheckpointFolder(small_folder), SMALL.lm, 16)
    return make_lm(SMALL.lm, tensors, mx.float32)


@pytest.fixture
def start(each_engine, small_model) -> Start:
    """A prompt that each engine read."""
    return each_engine.prefill(make_role(small_model, None, "hello").prompt)


class Literal:
    """The reference's generator written out: a grid, a call a frame, nothing saved.

    Every call runs all sixteen depformer steps; the temporal transformer sees its
    window through a mask over the whole history.
    """

    def __init__(self, lm, config):
        self.lm, self.config = lm, config
        self.grid = np.full((17, 4000), -9)
        self.given = np.zeros((17, 4000), bool)
        self.calls = 0
        self.inputs: list[mx.array] = []

    def call(self, frame: dict[int, int]) -> np.ndarray | None:
        lm, delays, s = self.lm, self.config.delays, self.calls
        for row, token in frame.items():
            self.grid[row, s + delays[row]] = token
            self.given[row, s + delays[row]] = True
        for row, delay in enumerate(delays):
            if s <= delay:
                initial = self.config.card if row else self.config.text_card
                self.grid[row, s], self.given[row, s] = initial, True
        self.calls += 1
        if s == 0:
            return None
        self.inputs.append(lm.embed(mx.array(self.grid[None, :, s - 1 : s])))
        hidden, logits = lm.head(self.temporal()[:, -1])
        target = np.where(self.given[:, s], self.grid[:, s], -2)[None]
        text = mx.argmax(logits, axis=-1)
        text = text if target[0, 0] == -2 else mx.array(target[:, 0])
        codes = lm.depformer(
            hidden,
            text,
            lambda logits, _: mx.argmax(logits, axis=-1),
            mx.array(target[:, 1:]),
        )
        column = np.concatenate([np.array(ids) for ids in (text, *codes)])
        self.grid[:, s] = np.where(self.given[:, s], self.grid[:, s], column)
        if s <= (largest := max(delays)):
            return None
        return np.array([self.grid[r, s - largest + delays[r]] for r in range(9)])

    def temporal(self):
        """The last ``context - 1`` positions, all layers at once would see more."""
        x = mx.concatenate(self.inputs, axis=1)
        total = x.shape[1]
        ages = np.arange(total)[:, None] - np.arange(total)[None]
        mask = (ages >= 0) & (ages < self.config.context - 1)

        class Whole(KvCache):
            def mask(self, t):
                return mx.array(mask)

            def update(self, layer, keys, values):
                return keys, values

        return self.lm.temporal(x, Whole(self.config.num_layers, 1))


def literal_run(lm, config, voice_codes, text_ids, user) -> np.ndarray:
    """Prompt and conversation, call by call, as the reference makes them."""
    machine = Literal(lm, config.lm)
    silence = dict(enumerate(config.silence_codes, 1))
    sine = dict(enumerate(config.sine_codes, 9))
    for column in voice_codes.T:
        machine.call({0: 3, **dict(enumerate(column, 1)), **sine})
    for token in [3] * 6 + list(text_ids) + [3] * 6:
        machine.call({0: token, **silence, **sine})
    outputs = [machine.call(dict(enumerate(column, 9))) for column in user.T]
    return np.stack(outputs, axis=1)


def test_shortcuts_equal_the_whole_computation(each_engine, full_lm):
    rng = np.random.default_rng(5)
    voice = rng.integers(0, 64, (8, 14)).astype(np.int32)
    text_ids = [7, 90, 33, 100]
    prompt = make_prompt(SMALL, text_ids, voice_codes=voice)
    found, user, _ = converse(each_engine, each_engine.prefill(prompt), speech(70))
    expected = literal_run(full_lm, SMALL, voice, text_ids, user)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "delays",
    [[0] * 17, [0] * 10 + [1] * 7, [0, 0] + [1] * 7 + [0] * 8, [0] + [1] * 16],
    ids=["none", "the user", "the agent", "all audio"],
)
def test_other_delays_equal_the_whole_computation(each_engine, full_lm, delays):
    config = replace(SMALL, lm=replace(SMALL.lm, delays=tuple(delays)))
    engine = copy.copy(each_engine)
    engine.config = config
    rng = np.random.default_rng(8)
    voice = rng.integers(0, 64, (8, 9)).astype(np.int32)
    start = engine.prefill(make_prompt(config, [7, 90], voice_codes=voice))
    found, user, _ = converse(engine, start, speech(40), chunk=7)
    expected = literal_run(full_lm, config, voice, [7, 90], user)
    np.testing.assert_array_equal(found, expected)


def test_past_both_windows_it_equals_the_whole_computation(each_engine, full_lm):
    rng = np.random.default_rng(6)
    voice = rng.integers(0, 64, (8, 20)).astype(np.int32)
    prompt = make_prompt(SMALL, [], voice_codes=voice)
    frames = speech(3 * SMALL.lm.context, seed=2)
    found, user, _ = converse(each_engine, each_engine.prefill(prompt), frames)
    assert user.shape[1] > 2 * SMALL.lm.window
    expected = literal_run(full_lm, SMALL, voice, [], user)
    np.testing.assert_array_equal(found, expected)


def test_state_does_not_grow_past_the_windows(each_engine, start):
    rows = each_engine.rows(1, GREEDY)
    rows.join(start, seed=0)
    user = np.random.default_rng(7).integers(0, 64, (200, 1, 8), np.int32)
    sizes = set()
    for count, column in enumerate(user):
        rows.step(column).tokens()
        if count > 2 * SMALL.lm.context:
            cache = rows._cache if hasattr(rows, "_cache") else rows._caches[0]
            sizes.add(sum(a.nbytes for a in cache.arrays()))
    assert len(sizes) == 1


def test_chunk_sizes_do_not_change_the_answer(each_engine, start):
    frames = speech(60)
    results = [
        converse(each_engine, start, frames, SamplingConfig(), 3, chunk)
        for chunk in (1, 7, 60)
    ]
    for tokens, user, pcm in results[1:]:
        np.testing.assert_array_equal(tokens, results[0][0])
        np.testing.assert_array_equal(user, results[0][1])
        np.testing.assert_array_equal(pcm, results[0][2])


def test_interleaved_conversations_equal_the_same_two_apart(each_engine, start):
    frames = [speech(30, seed) for seed in (1, 2)]
    apart = [
        converse(each_engine, start, f, SamplingConfig(), seed, 1)[0]
        for seed, f in enumerate(frames)
    ]
    running = [
        scheduler.converse_live(
            each_engine, start, seed, live_frames(f), SamplingConfig()
        )
        for seed, f in enumerate(frames)
    ]
    together: list[list[np.ndarray]] = [[], []]
    for _ in range(30):
        for idx, conversation in enumerate(running):
            _, reply = next(conversation)
            together[idx].append(np.concatenate([reply.text[None], reply.agent]))
    for idx in range(2):
        np.testing.assert_array_equal(np.concatenate(together[idx], 1), apart[idx])


def test_the_seed_alone_decides_what_is_drawn(each_engine, start):
    frames = speech(20)
    first, again, other = (
        converse(each_engine, start, frames, SamplingConfig(), seed)[0]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_what_is_said_of_a_frame_does_not_depend_on_it(each_engine, start):
    """Another sound in one of the user's frames alters the next reply first."""
    frames, after = speech(20), []
    expected, _, _ = converse(each_engine, start, frames, SamplingConfig(), 3)
    for changed in (0, 1, 5, 14):
        other = frames.copy()
        other[changed] = speech(1, seed=9)
        found, _, _ = converse(each_engine, start, other, SamplingConfig(), 3)
        differs = (found != expected).any(axis=0)
        after.append(int(np.flatnonzero(differs)[0]) - changed)
    assert min(after) == 1


def test_a_reply_is_made_before_its_frame_comes(each_engine, start):
    """All work on a frame is done when the next is asked for, that on its reply too."""
    codec, done = each_engine.codec, []

    def frames():
        for idx, frame in enumerate(live_frames(speech(5))):
            assert done == ["decode"] + ["encode", "decode"] * idx
            yield frame

    class Watched:
        concurrent, chunk_frames, group = False, 1, 1
        make_state = staticmethod(codec.make_state)

        def encode(self, frames, state):
            done.append("encode")
            return codec.encode(frames, state)

        def decode(self, codes, state):
            done.append("decode")
            return codec.decode(codes, state)

    engine = copy.copy(each_engine)
    engine.codec = Watched()
    replies = scheduler.converse_live(engine, start, 0, frames(), GREEDY)
    for count, (_, reply) in enumerate(replies):
        assert done == ["decode"] + ["encode", "decode"] * count
        assert len(reply.text) == 1
    assert count == 4


class Compiled(MlxEngine):
    """MLX's engine on a CPU, compiled as on a GPU."""

    def __init__(self, *tensors) -> None:
        super().__init__(*tensors, on_gpu=False)
        self._compiled_joints = [mx.compile(joint) for joint in self._joints]

    def make_frame(self, sampler: Sampler) -> Frame:
        """All of a frame after the temporal transformer."""
        return mx.compile(self.plain_frame(sampler))


@pytest.mark.skipif(not shutil.which("g++"), reason="MLX compiles with g++ on a CPU")
@pytest.mark.parametrize(
    "sampling", [GREEDY, SamplingConfig()], ids=["greedy", "drawn"]
)
def test_compiled_frames_give_the_same_tokens(small_model, sampling):
    folder, said = small_model.local.folder, []
    for make in (functools.partial(MlxEngine, on_gpu=False), Compiled):
        engine = make(
            SMALL, lm_tensors(folder, SMALL.lm), codec_tensors(folder, SMALL.mimi)
        )
        start = engine.prefill(make_role(small_model, None, "hello").prompt)
        said.append(converse(engine, start, speech(70), sampling, 4)[0])
    np.testing.assert_array_equal(*said)


def test_delays_shift_and_unshift():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 99, (3, 6))
    before = np.array([50, 51, 52])
    shifted = shift(codes, (0, 1, 1), before)
    np.testing.assert_array_equal(shifted[0], codes[0])
    np.testing.assert_array_equal(shifted[1:, 1:], codes[1:, :-1])
    np.testing.assert_array_equal(shifted[1:, 0], before[1:])
    columns = np.concatenate([shifted, codes[:, -1:]], axis=1)
    np.testing.assert_array_equal(unshift(columns, (0, 1, 1), 1), codes)
