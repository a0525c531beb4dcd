"""The codec's work beside the steps: encoding ahead of them, decoding behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from pplex.codec.codec import Codec

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def codec_worker(codec: Codec, *, beside: int) -> Iterator[Executor | None]:
    """Threads for the codec's work on ``beside`` conversations beside their steps.

    None for 0, and where the codec must wait its turn.

    At most a thread a core, and one a conversation: the steps of many wait for the
    codec more than they are disturbed by it. When the block is left, for whatever
    reason, what has not begun is dropped, what has is waited for, and the threads end.
    """
    if not (beside and codec.concurrent):
        yield None
        return
    threads = min(beside, _num_cores())
    worker = ThreadPoolExecutor(threads, thread_name_prefix="codec")
    try:
        yield worker
    finally:
        worker.shutdown(wait=True, cancel_futures=True)


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
