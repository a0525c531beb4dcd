"""The codec's work beside the steps: encoding ahead of them, decoding behind."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from enum import IntEnum
from functools import partial
from queue import Empty, PriorityQueue
from typing import Any, TypeVar

from pplex.engine.base import Codec
from pplex.engine.device import num_cores

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def codec_worker(codec: Codec, *, beside: int) -> Iterator[Executor | None]:
    """Threads for the codec's work on ``beside`` conversations beside their steps.

    None for 0, and where the codec must wait its turn.

    One conversation has one thread. Of many, the codec's work is more than that of the
    steps: theirs take part in it where they would wait for it, so that with a thread
    for each of the other cores all have work, and none is fought for.

    When the block is left, for whatever reason, what has not begun is dropped, what
    has is waited for, and the threads end.
    """
    if not (beside and codec.concurrent):
        yield None
        return
    threads = max(1, min(beside, num_cores() - 1))
    worker: Executor = ThreadPoolExecutor(threads, thread_name_prefix="codec")
    try:
        yield worker if beside == 1 else _Shared(worker)
    finally:
        worker.shutdown(wait=True, cancel_futures=True)


@contextmanager
def group_worker(codec: Codec) -> Iterator[GroupWorker | None]:
    """The same for recordings that are coded together."""
    if codec.launcher is None:
        yield None
        return
    worker = GroupWorker(codec.launcher)
    try:
        yield worker
    finally:
        worker.end()


class Urgency(IntEnum):
    """Who waits for a call: all that step, all soon, or nobody."""

    NOW, SOON, LATER = range(3)


class GroupWorker:
    """Calls begun by one thread, which give what another one calls to wait for them.

    Meanwhile the next is begun: on a GPU that takes as long as computing it. The most
    urgent is begun first: a chunk of every group is due at once where all began
    together, and a group that joins then would wait for them.
    """

    def __init__(self, launcher: Executor) -> None:
        """``launcher`` has the thread."""
        self._calls: PriorityQueue[tuple[Urgency, int, Future[Any], Callable[[], Any]]]
        self._calls, self._count = PriorityQueue(), itertools.count()
        self._launcher = launcher
        self._waiting = ThreadPoolExecutor(1, thread_name_prefix="codec results")

    def begin(
        self,
        urgency: Urgency,
        function: Callable[..., Callable[[], Result]],
        *arguments: Any,
    ) -> Future[Result]:
        """The result of what ``function`` gives."""
        call: Future[Result] = Future()
        item = urgency, next(self._count), call, partial(function, *arguments)
        self._calls.put(item)
        self._launcher.submit(self._begin_next)
        return call

    def _begin_next(self) -> None:
        try:
            _, _, call, function = self._calls.get_nowait()
        except Empty:  # dropped
            return
        try:
            wait = function()
        except BaseException as e:
            call.set_exception(e)
        else:
            self._waiting.submit(_settle, call, wait)

    def end(self) -> None:
        """Drop what has not begun, wait for what has, end the thread that waits."""
        with suppress(Empty):
            while True:
                self._calls.get_nowait()
        with suppress(RuntimeError):  # the interpreter ends, as the thread has
            self._launcher.submit(int).result()
        self._waiting.shutdown(wait=True, cancel_futures=True)


def _settle(call: Future[Result], function: Callable[[], Result]) -> None:
    """Make the call."""
    try:
        call.set_result(function())
    except BaseException as e:
        call.set_exception(e)


class _Shared(Executor):
    """Calls made by threads, and by whoever waits for the result of one."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._waiting: deque[tuple[Future[Any], Callable[[], object]]] = deque()

    def submit(
        self, function: Callable[..., Result], /, *arguments: Any, **named: Any
    ) -> Future[Result]:
        call: Future[Result] = _Awaited(self._make_next)
        self._waiting.append((call, partial(function, *arguments, **named)))
        self._threads.submit(self._make_next)
        return call

    def _make_next(self) -> bool:
        """Make the call that has waited longest; whether there was one."""
        try:
            call, function = self._waiting.popleft()
        except IndexError:
            return False
        _settle(call, function)
        return True


class _Awaited(Future[Any]):
    """A call whose result is waited for by making others."""

    def __init__(self, make_next: Callable[[], bool]) -> None:
        super().__init__()
        self._make_next = make_next

    def result(self, timeout: float | None = None) -> Any:
        while not self.done() and self._make_next():
            pass
        return super().result(timeout)


def begin(
    worker: Executor | None, function: Callable[..., Result], *arguments: Any
) -> Future[Result]:
    """A call that a ``worker`` will make; without one it is made at once."""
    if worker is not None:
        return worker.submit(function, *arguments)
    call: Future[Result] = Future()
    call.set_result(function(*arguments))
    return call


def begin_late(
    worker: GroupWorker | None,
    urgency: Urgency,
    function: Callable[..., Callable[[], Result]],
    *arguments: Any,
) -> Future[Result]:
    """The same of a call that gives what waits for its result, and of that."""
    if worker is None:
        return begin(None, lambda: function(*arguments)())
    return worker.begin(urgency, function, *arguments)


def one_ahead(
    worker: Executor | None,
    function: Callable[[Item], Result],
    items: Iterable[Item],
) -> Iterator[Result]:
    """``map``; with a ``worker`` the next call is under way while a result is used.

    One call at a time, the first at once. Without, an item is asked for when its
    result is.
    """
    if worker is None:
        return map(function, items)
    waiting = iter(items)

    def start() -> Future[Result] | None:
        for item in waiting:
            return worker.submit(function, item)
        return None

    def results(call: Future[Result] | None) -> Iterator[Result]:
        while call is not None:
            result = call.result()
            call = start()
            yield result

    return results(start())
