"""What libraries print on stderr by themselves, kept from getting there unnamed."""

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2
_LOCK = threading.Lock()
# libmpg123's; it cannot be told to be quiet through libsndfile.
_FAULT = re.compile(rb"^\[?(?:src/)?libmpg123/\S* *(?:error|warning): (.*)$")
_OTHER = re.compile(rb"^(?:Note|Warning): .*$")


@contextmanager
def decoder_lines() -> Iterator[list[str]]:
    """Yield a list that gets the faults that libmpg123 prints while the body runs.

    stderr is a file meanwhile. What other threads write goes on to where it belongs
    afterwards.
    """
    faults: list[str] = []
    with _LOCK, tempfile.TemporaryFile() as kept:
        try:
            stderr = os.dup(_STDERR)
        except OSError:  # closed: nobody reads it
            yield faults
            return
        try:
            os.dup2(kept.fileno(), _STDERR)
            yield faults
        finally:
            os.dup2(stderr, _STDERR)
            kept.seek(0)
            for line in kept.read().splitlines(keepends=True):
                if fault := _FAULT.match(line.rstrip(b"\r\n")):
                    faults.append(fault[1].decode("utf-8", "replace"))
                elif not _OTHER.match(line.rstrip(b"\r\n")):
                    os.write(stderr, line)
            os.close(stderr)
