"""The codec's work beside the steps: how far ahead, what is left when it ends."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import reference_driver
from small import converse_live, speech

from pplex.audio.files import Samples
from pplex.conversation.prompts import make_role
from pplex.conversation.scheduler import converse, converse_many
from pplex.conversation.tracks import Conversation
from pplex.conversation.worker import (
    Urgency,
    codec_worker,
    group_worker,
    one_ahead,
)
from pplex.engine.base import Codec, Engine
from pplex.engine.mlx.codec import MlxCodec
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


class Beside:
    """A codec that claims to run beside the steps."""

    concurrent, launcher = True, None


@contextmanager
def launching():
    """The same with a thread for groups."""
    codec = Beside()
    with ThreadPoolExecutor(1) as codec.launcher:
        yield codec


def with_codec(engine: Engine, codec: Codec) -> Engine:
    """The same engine with another codec."""
    other = copy.copy(engine)
    other.codec = codec
    return other


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture(scope="module")
def engine(small_model):
    return small_model.engine


@pytest.fixture(scope="module")
def start(small_model):
    return small_model.engine.prefill(make_role(small_model, None, "hello").prompt)


def replies(engine, start, chunks, **options):
    return converse(engine, start, 0, chunks, GREEDY, **options)


def conversations(start):
    pcm = speech(40).reshape(-1)
    return [Conversation(str(idx), Samples(pcm), start, idx) for idx in range(5)]


def test_the_next_call_is_under_way_while_a_result_is_used():
    started = []
    second = threading.Event()

    def double(x: int) -> int:
        started.append(x)
        if x == 1:
            second.set()
        return 2 * x

    with codec_worker(Beside(), beside=1) as worker:
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

    with codec_worker(Beside(), beside=2) as worker:
        calls = [worker.submit(made_by) for _ in range(6)]
        assert calls[-1].result() is main
        go_on.set()
        assert sum(call.result() is main for call in calls) >= 4


def test_a_call_that_fails_fails_for_who_asked_for_it():
    def fail(kind: str) -> None:
        raise Fails(kind)

    with codec_worker(Beside(), beside=3) as worker:
        calls = [worker.submit(fail, str(idx)) for idx in range(5)]
        assert worker.submit(str, 7).result() == "7"
        for idx, call in enumerate(calls):
            with pytest.raises(Fails, match=str(idx)):
                call.result()


def test_of_groups_the_most_urgent_call_is_begun_first():
    go_on, begun = threading.Event(), []

    def begin(name: str):
        begun.append(name)
        go_on.wait(60)
        return lambda: name.upper()

    with launching() as codec, group_worker(codec) as worker:
        calls = [worker.begin(Urgency.LATER, begin, name) for name in "ab"]
        calls += [worker.begin(Urgency.SOON, begin, name) for name in "cd"]
        calls += [worker.begin(Urgency.NOW, begin, name) for name in "ef"]
        go_on.set()
        assert [call.result() for call in calls] == [*"ABCDEF"]
    assert begun in ([*"aefcdb"], [*"efcdab"])  # the first had begun, or not


def test_calls_of_groups_that_nobody_waits_for_any_more_are_dropped():
    go_on, begun = threading.Event(), []

    def begin(name: str):
        begun.append(name)
        go_on.wait(60)
        return lambda: name

    with launching() as codec:
        with group_worker(codec) as worker:
            call = worker.begin(Urgency.NOW, begin, "a")
            while not begun:
                time.sleep(0.001)
            worker.begin(Urgency.LATER, begin, "b")
            threading.Timer(0.05, go_on.set).start()
        assert call.result(0) == "a" and begun == ["a"]
        with group_worker(codec) as worker:
            assert worker.begin(Urgency.SOON, begin, "c").result(60) == "c"


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
    with codec_worker(MlxCodec(None, on_gpu=False), beside=beside) as worker:
        assert worker is None
    with codec_worker(Beside(), beside=beside) as worker:
        assert (worker is None) == (beside == 0)


@pytest.mark.parametrize("decode_frames", [1, 7, 16, 99])
def test_beside_the_steps_the_answer_is_the_same(engine, start, decode_frames):
    frames = speech(50, seed=3)
    chunks = [frames[i : i + 9] for i in range(0, 50, 9)]
    live = converse_live(engine, start, frames)
    found = list(replies(engine, start, chunks, decode_frames=decode_frames))
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
def test_what_fails_in_the_codec_fails_in_the_conversation(engine, start, kind):
    failing = with_codec(engine, Failing(engine.codec, kind))
    with pytest.raises(Fails, match=kind):
        list(replies(failing, start, np.split(speech(30), 6), decode_frames=5))
    failing = with_codec(engine, Failing(engine.codec, kind))
    with pytest.raises(Fails, match=kind):
        converse_live(failing, start, speech(30))


@pytest.mark.parametrize("kind", ["encode", "decode"])
def test_what_fails_in_the_codec_fails_in_a_batch(engine, start, kind):
    failing = with_codec(engine, Failing(engine.codec, kind))
    with pytest.raises(Fails, match=kind):
        list(converse_many(failing, conversations(start), GREEDY, batch_size=3))


def test_a_conversation_that_is_given_up_leaves_no_thread(engine, start):
    found = replies(engine, start, np.split(speech(60), 6), decode_frames=10)
    next(found)
    found.close()
    results = converse_many(engine, conversations(start), GREEDY, batch_size=2)
    next(results)
    results.close()


def test_a_recording_that_cannot_be_read_on_stops_the_conversation(engine, start):
    def chunks():
        yield speech(10)
        yield speech(10)
        raise OSError("unplugged")

    with pytest.raises(OSError, match="unplugged"):
        list(replies(engine, start, chunks(), decode_frames=10))


def test_with_mlxs_codec_the_answer_is_the_same(small_model, engine, start):
    codec = MlxCodec(reference_driver.spec_mimi(small_model), on_gpu=False)
    mlx = with_codec(engine, codec)
    chunks = np.split(speech(48, seed=8), 6)
    expected, found = (
        list(replies(one, start, chunks, decode_frames=12)) for one in (mlx, engine)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.user, other.user)
        np.testing.assert_array_equal(one.agent, other.agent)
        np.testing.assert_allclose(one.pcm, other.pcm, atol=1e-5)


def test_waiting_for_the_codec_is_what_is_counted(engine, start):
    found = replies(engine, start, np.split(speech(60), 6), decode_frames=10)
    timings = list(found)[-1].timings
    assert len(timings.steps) == 60
    assert timings.encode_s > 0 and timings.decode_s > 0
