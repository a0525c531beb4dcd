"""The codec's work beside the steps: how far ahead, what is left when it ends."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from small import SMALL, speech

from pplex.checkpoint.weights import load_mimi
from pplex.codec.codec import MlxCodec
from pplex.conversation.many import Item, converse_many
from pplex.conversation.prompt import prefill
from pplex.conversation.session import Conversation, make_role
from pplex.conversation.worker import codec_worker, one_ahead
from pplex.model.sampling import GREEDY


class Fails(Exception):
    """What a codec of these tests raises."""


class Failing:
    """A codec beside the steps whose calls of one kind fail from the third on."""

    concurrent = True

    def __init__(self, codec, kind: str) -> None:
        self._codec, self._kind, self._left = codec, kind, 2

    def __getattr__(self, name: str):
        return getattr(self._codec, name)

    def _call(self, kind: str, *arguments):
        if kind == self._kind:
            self._left -= 1
            if self._left < 0:
                raise Fails(kind)
        return getattr(self._codec, kind)(*arguments)

    def encode(self, frames, state):
        return self._call("encode", frames, state)

    def decode(self, codes, state):
        return self._call("decode", codes, state)


class Beside(MlxCodec):
    """A codec that claims to run beside the steps."""

    concurrent = True


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture(scope="module")
def prefilled(small_model):
    return prefill(small_model.lm, make_role(small_model, None, "hello").prompt)


def replies(model, prefilled, chunks, **options):
    return Conversation(model, prefilled, GREEDY, 0).run(chunks, **options)


def test_the_next_call_is_under_way_while_a_result_is_used():
    started = []
    second = threading.Event()

    def double(x: int) -> int:
        started.append(x)
        if x == 1:
            second.set()
        return 2 * x

    with codec_worker(Beside(None), beside=1) as worker:
        results = one_ahead(worker, double, range(6))
        assert next(results) == 0
        assert second.wait(60)
        assert started == [0, 1]
        assert list(results) == [2, 4, 6, 8, 10]


def test_who_waits_for_a_result_makes_the_calls_that_wait_for_a_thread():
    main, go_on = threading.current_thread(), threading.Event()

    def made_by() -> threading.Thread:
        if threading.current_thread() is not main:
            go_on.wait(60)
        return threading.current_thread()

    with codec_worker(Beside(None), beside=2) as worker:
        calls = [worker.submit(made_by) for _ in range(6)]
        assert calls[-1].result() is main
        go_on.set()
        assert sum(call.result() is main for call in calls) >= 4


def test_a_call_that_fails_fails_for_who_asked_for_it():
    def fail(kind: str) -> None:
        raise Fails(kind)

    with codec_worker(Beside(None), beside=3) as worker:
        calls = [worker.submit(fail, str(idx)) for idx in range(5)]
        assert worker.submit(str, 7).result() == "7"
        for idx, call in enumerate(calls):
            with pytest.raises(Fails, match=str(idx)):
                call.result()


def test_without_a_worker_items_are_asked_for_one_by_one():
    asked = []

    def items():
        for idx in range(3):
            asked.append(idx)
            yield idx

    results = one_ahead(None, lambda x: x, items())
    for idx, result in enumerate(results):
        assert asked == list(range(idx + 1)) and result == idx


@pytest.mark.parametrize("beside", [0, 1, 5])
def test_a_codec_that_must_wait_its_turn_gets_no_thread(beside):
    with codec_worker(MlxCodec(None), beside=beside) as worker:
        assert worker is None
    with codec_worker(Beside(None), beside=beside) as worker:
        assert (worker is None) == (beside == 0)


@pytest.mark.parametrize("decode_frames", [1, 7, 16, 99])
def test_beside_the_steps_the_answer_is_the_same(small_model, prefilled, decode_frames):
    frames = speech(50, seed=3)
    chunks = [frames[i : i + 9] for i in range(0, 50, 9)]
    live = list(
        replies(
            small_model,
            prefilled,
            [frame[None] for frame in frames],
            ahead=False,
            decode_frames=1,
        )
    )
    found = list(replies(small_model, prefilled, chunks, decode_frames=decode_frames))
    lengths = [len(reply.text) for reply in found]
    full, rest = divmod(50, decode_frames)
    assert lengths == [decode_frames] * full + [rest] * (rest > 0)
    for part in ("pcm", "text", "agent", "user"):
        joined, expected = (
            np.concatenate([getattr(reply, part) for reply in some], axis=-1)
            for some in (found, live)
        )
        np.testing.assert_array_equal(joined, expected)


@pytest.mark.parametrize("kind", ["encode", "decode"])
@pytest.mark.parametrize("ahead", [True, False])
def test_what_fails_in_the_codec_fails_in_the_conversation(
    small_model, prefilled, kind, ahead
):
    model = replace(small_model, codec=Failing(small_model.codec, kind))
    chunks = np.split(speech(30), 6)
    found = replies(model, prefilled, chunks, ahead=ahead, decode_frames=5)
    with pytest.raises(Fails, match=kind):
        list(found)


@pytest.mark.parametrize("kind", ["encode", "decode"])
def test_what_fails_in_the_codec_fails_in_a_batch(small_model, prefilled, kind):
    model = replace(small_model, codec=Failing(small_model.codec, kind))
    items = [Item(idx, speech(40).reshape(-1), prefilled, idx) for idx in range(5)]
    with pytest.raises(Fails, match=kind):
        list(converse_many(model, items, GREEDY, batch_size=3))


def test_a_conversation_that_is_given_up_leaves_no_thread(small_model, prefilled):
    found = replies(small_model, prefilled, np.split(speech(60), 6), decode_frames=10)
    next(found)
    found.close()
    items = [Item(idx, speech(40).reshape(-1), prefilled, idx) for idx in range(5)]
    results = converse_many(small_model, items, GREEDY, batch_size=2)
    next(results)
    results.close()


def test_a_recording_that_cannot_be_read_on_stops_the_conversation(
    small_model, prefilled
):
    def chunks():
        yield speech(10)
        yield speech(10)
        raise OSError("unplugged")

    with pytest.raises(OSError, match="unplugged"):
        list(replies(small_model, prefilled, chunks(), decode_frames=10))


def test_with_mlx_alone_the_answer_is_the_same(small_model, prefilled):
    path = next(small_model.local.path.glob("tokenizer-*.safetensors"))
    mlx = replace(small_model, codec=MlxCodec(load_mimi(path, SMALL.mimi)))
    chunks = np.split(speech(48, seed=8), 6)
    expected, found = (
        list(replies(model, prefilled, chunks, decode_frames=12))
        for model in (mlx, small_model)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.user, other.user)
        np.testing.assert_array_equal(one.agent, other.agent)
        np.testing.assert_allclose(one.pcm, other.pcm, atol=1e-5)


def test_waiting_for_the_codec_is_what_is_counted(small_model, prefilled):
    conversation = Conversation(small_model, prefilled, GREEDY, 0)
    list(conversation.run(np.split(speech(60), 6), decode_frames=10))
    timings = conversation.timings
    assert len(timings.steps) == 60
    assert timings.encode_s > 0 and timings.decode_s > 0
