"""The step loop: what it leaves out, long recordings, conversations side by side."""

from __future__ import annotations

import shutil

import mlx.core as mx
import numpy as np
import pytest
from small import SMALL, converse, speech

from pplex.checkpoint.weights import load_lm
from pplex.conversation.generate import generate, make_sampler
from pplex.conversation.prompt import prefill
from pplex.conversation.session import Conversation, load, make_role
from pplex.layers.cache import KvCache
from pplex.model.sampling import GREEDY, SamplingConfig
from pplex.model.streams import shift, unshift


@pytest.fixture(scope="module")
def full_lm(small_folder):
    """The same language model with all sixteen depformer steps."""
    return load_lm(small_folder, SMALL.lm, mx.float32, num_steps=16).lm


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
        column = np.concatenate([np.array(text), np.array(codes)[0]])
        self.grid[:, s] = np.where(self.given[:, s], self.grid[:, s], column)
        if s <= 1:
            return None
        return np.array([self.grid[r, s - 1 + delays[r]] for r in range(9)])

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


def test_shortcuts_equal_the_whole_computation(small_model, full_lm, each_way):
    from pplex.conversation.prompt import make_prompt

    rng = np.random.default_rng(5)
    voice = rng.integers(0, 64, (8, 14)).astype(np.int32)
    text_ids = [7, 90, 33, 100]
    prompt = make_prompt(SMALL, text_ids, voice_codes=voice)
    state = prefill(small_model.lm, prompt)
    found, user, _ = converse(small_model, state, speech(70))
    expected = literal_run(full_lm, SMALL, voice, text_ids, user)
    np.testing.assert_array_equal(found, expected)


def test_past_both_windows_it_equals_the_whole_computation(
    small_model, full_lm, each_way
):
    from pplex.conversation.prompt import make_prompt

    rng = np.random.default_rng(6)
    voice = rng.integers(0, 64, (8, 20)).astype(np.int32)
    prompt = make_prompt(SMALL, [], voice_codes=voice)
    frames = speech(5 * SMALL.lm.context, seed=2)
    found, user, _ = converse(small_model, prefill(small_model.lm, prompt), frames)
    assert user.shape[1] > 4 * SMALL.lm.window
    expected = literal_run(full_lm, SMALL, voice, [], user)
    np.testing.assert_array_equal(found, expected)


def test_state_does_not_grow_past_the_windows(small_model, each_way):
    role = make_role(small_model, None, "hello")
    conversation = Conversation(
        small_model, prefill(small_model.lm, role.prompt), GREEDY, 0
    )
    sizes = set()
    chunks = (speech(1) for _ in range(200))
    for count, _ in enumerate(conversation.run(chunks, decode_frames=1, ahead=False)):
        if count > 2 * SMALL.lm.context:
            state = conversation._state
            sizes.add(sum(a.nbytes for a in state.cache.arrays()))
    assert len(sizes) == 1


def test_chunk_sizes_do_not_change_the_answer(small_model, each_way):
    role = make_role(small_model, None, "hello")
    state = prefill(small_model.lm, role.prompt)
    frames = speech(60)
    results = [
        converse(small_model, state, frames, SamplingConfig(), 3, chunk)
        for chunk in (1, 7, 60)
    ]
    for tokens, user, pcm in results[1:]:
        np.testing.assert_array_equal(tokens, results[0][0])
        np.testing.assert_array_equal(user, results[0][1])
        np.testing.assert_array_equal(pcm, results[0][2])


def test_interleaved_conversations_equal_the_same_two_apart(small_model, each_way):
    role = make_role(small_model, None, "hello")
    state = prefill(small_model.lm, role.prompt)
    frames = [speech(30, seed) for seed in (1, 2)]
    apart = [
        converse(small_model, state, f, SamplingConfig(), seed, 1)[0]
        for seed, f in enumerate(frames)
    ]
    running = [
        Conversation(small_model, state, SamplingConfig(), seed).run(
            (frame[None] for frame in f), decode_frames=1, ahead=False
        )
        for seed, f in enumerate(frames)
    ]
    together: list[list[np.ndarray]] = [[], []]
    for _ in range(30):
        for idx, conversation in enumerate(running):
            reply = next(conversation)
            together[idx].append(np.concatenate([reply.text[None], reply.agent]))
    for idx in range(2):
        np.testing.assert_array_equal(np.concatenate(together[idx], 1), apart[idx])


def test_the_seed_alone_decides_what_is_drawn(small_model, each_way):
    role = make_role(small_model, None, "hello")
    state = prefill(small_model.lm, role.prompt)
    frames = speech(20)
    first, again, other = (
        converse(small_model, state, frames, SamplingConfig(), seed)[0]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_without_looking_ahead_frames_are_answered_one_by_one(
    small_model,
    each_way,
):
    role = make_role(small_model, None, "hello")
    asked = []

    def columns():
        for idx in range(5):
            asked.append(idx)
            yield mx.zeros((1, 8), mx.int32)

    sampler = make_sampler(SMALL.lm, GREEDY)
    state = prefill(small_model.lm, role.prompt).start(SMALL.lm, seed=0)
    steps = generate(small_model.lm, state, columns(), sampler, ahead=False)
    for count, _ in enumerate(steps, 1):
        assert len(asked) == count


@pytest.mark.skipif(not shutil.which("g++"), reason="MLX compiles with g++ on a CPU")
@pytest.mark.parametrize(
    "sampling", [GREEDY, SamplingConfig()], ids=["greedy", "drawn"]
)
def test_compiled_frames_give_the_same_tokens(
    small_model, sampling, mlx_steps, monkeypatch
):
    role = make_role(small_model, None, "hello")
    prefilled = prefill(small_model.lm, role.prompt)
    plain, _, _ = converse(small_model, prefilled, speech(70), sampling, 4)
    compiled = load(small_model.local)
    compiled.lm.compile()
    monkeypatch.setattr("pplex.conversation.generate.on_cpu", lambda: False)
    found, _, _ = converse(compiled, prefilled, speech(70), sampling, 4)
    np.testing.assert_array_equal(found, plain)


def test_delays_shift_and_unshift():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 99, (3, 6))
    before = np.array([50, 51, 52])
    shifted = shift(codes, (0, 1, 1), before)
    np.testing.assert_array_equal(shifted[0], codes[0])
    np.testing.assert_array_equal(shifted[1:, 1:], codes[1:, :-1])
    np.testing.assert_array_equal(shifted[1:, 0], before[1:])
    columns = np.concatenate([shifted, codes[:, -1:]], axis=1)
    np.testing.assert_array_equal(unshift(columns, (0, 1, 1)), codes)
