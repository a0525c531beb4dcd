"""What the system gives a program: standard streams, closed or full, and signals."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from types import FrameType

from pplex.respond.stopping import Stop, Stopped

CLOSED_PIPE = 128 + 13  # what a shell reports for a program ended by SIGPIPE
_NULL_FLAGS = (os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)  # what is written to 1 is missed


def open_standard_streams() -> None:
    """Open closed descriptors 0 to 2 on the null device, and make stderr patient.

    Else the first files that are opened would take their numbers, and what is meant
    for a stream would be read from them or written into them. Reading stdin then gives
    nothing, writing to stdout is an error, and what goes to stderr is gone.
    """
    for fd, flags in enumerate(_NULL_FLAGS):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, flags)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False, encoding="utf-8")
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False, encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name may hold bytes that are not text.
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_Patient(2, "wb", closefd=False)),
            encoding=sys.stderr.encoding if sys.stderr else "utf-8",
            errors="backslashreplace",
            line_buffering=True,
        )


def give_up_stdout() -> bool:
    """Let go of what stdout does not take, if so; else it fails again at the end."""
    try:
        sys.stdout.flush()
        return False
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
        return True


def explain(error: OSError) -> str:
    """What the system refused, in a sentence."""
    reason = error.strerror or str(error)
    if give_up_stdout():
        return f"cannot write stdout: {reason}"
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the current folder is not there any more; change to another one"
    return f"{error.filename or 'cannot read or write'}: {reason}"


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn the signals that end a program into requests, while the body runs."""
    stop = Stop()

    def handle(signum: int, frame: FrameType | None) -> None:
        if _loads_an_extension(frame):
            again = threading.Timer(0.02, os.kill, (os.getpid(), signum))
            again.daemon = True
            again.start()
        else:
            stop.request(signum)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    ending = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # that is nohup's
        ending.append(signal.SIGHUP)
    before = {signum: signal.signal(signum, handle) for signum in ending}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _loads_an_extension(frame: FrameType | None) -> bool:
    """Whether a module in C++ is being imported: MLX aborts if that is interrupted."""
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False


def exit_code(error: KeyboardInterrupt) -> int:
    """129 for SIGHUP, 130 for SIGINT, 143 for SIGTERM, as shells have it."""
    return 128 + (error.signum if isinstance(error, Stopped) else signal.SIGINT)


class _Patient(io.FileIO):
    """A stream whose end is no reason to stop: messages are lost, results are not."""

    def write(self, content: object) -> int:
        view = memoryview(content)  # type: ignore[arg-type]
        try:
            written = super().write(view)
        except OSError:
            written = None
        return view.nbytes if written is None else written
