"""SIGINT and SIGTERM as requests to stop, and what the program exits with."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pplex.respond.stopping import Stop, Stopped

CLOSED_PIPE = 128 + 13  # what a shell reports for a program ended by SIGPIPE


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn the signals that end a program into requests, while the body runs."""
    stop = Stop()

    def handle(signum: int, frame: FrameType | None) -> None:
        stop.request(signum)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def exit_code(error: KeyboardInterrupt) -> int:
    """130 for SIGINT, 143 for SIGTERM, as shells have it."""
    return 128 + (error.signum if isinstance(error, Stopped) else signal.SIGINT)
