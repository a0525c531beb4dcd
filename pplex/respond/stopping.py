"""A request to stop, as a signal makes it: at once, or when the frame is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopped(KeyboardInterrupt):
    """The run was asked to stop by the signal ``signum``."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


class Stop:
    """Whether a run was asked to stop, and what then happens.

    A request raises ``Stopped`` where it finds the program. Under ``deferred`` the
    first one is only noted.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._notify: Callable[[], None] | None = None

    def request(self, signum: int) -> None:
        """Ask to stop; what a signal handler calls."""
        is_first, self.signum = self.signum is None, signum
        if self._notify is None or not is_first:
            raise Stopped(signum)
        self._notify()

    @contextmanager
    def deferred(self, notify: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Let the body end in peace; ``notify`` tells it of the first request."""
        self._notify = notify
        try:
            yield
        finally:
            self._notify = None

    def check(self) -> None:
        """Raise ``Stopped`` if there was a request."""
        if self.signum is not None:
            raise Stopped(self.signum)
