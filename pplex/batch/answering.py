"""Recordings read ahead of a loaded model, and its answers written behind it.

What a batch does on one device, here or on a machine of a cluster. Outputs are whole
under hidden names when they are handed on; who keeps the manifest gives them theirs.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pplex.batch.decoding import Answered, Decoder, Failure, Job
from pplex.batch.describe import Description
from pplex.batch.records import (
    Read,
    Task,
    Written,
    read_request,
    sound_writer,
    write_answer,
)
from pplex.engine.device import num_cores
from pplex.errors import PplexError
from pplex.files import Together
from pplex.respond.outputs import SoundWriter
from pplex.respond.run import check_script

# On a large machine a batch starts with a hundred recordings at once.
_READERS = min(8, max(2, num_cores() // 2))
READ_AHEAD = 2 * _READERS
_AHEAD_S = 3600.0  # of sound, which takes 350 MB
WRITERS = _READERS
_WRITTEN = 4 * WRITERS  # at a time, as a rule
_WRITE_BEHIND, _BEHIND_S = 8 * _WRITTEN, 3 * 3600.0  # 2 GB of both sides
_GROUPS = 6  # being encoded, waiting for a place, for others to be decoded, to be given
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}

Result = Written | Failure
T = TypeVar("T")


class Behind(Generic[T]):
    """Work that threads do, whose results are taken in order, by one thread."""

    def __init__(self, pool: ThreadPoolExecutor, take: Callable[[T], None]) -> None:
        self._pool, self._take = pool, take
        self._waiting: deque[Future[T]] = deque()

    def add(
        self, work: Callable[..., T], *args: Any, most: int = _WRITE_BEHIND
    ) -> None:
        """Begin some more, and take what is done; wait where over ``most`` are not."""
        waiting = self._waiting
        waiting.append(self._pool.submit(work, *args))
        while waiting and (waiting[0].done() or len(waiting) > most):
            self._take(waiting.popleft().result())

    def rest(self) -> None:
        """Take all that is left, also where taking one ends the run."""
        if self._waiting:
            try:
                self._take(self._waiting.popleft().result())
            finally:
                self.rest()


@dataclass(frozen=True)
class _Begun:
    """A recording that is answered, and what writes its answer."""

    task: Task
    read: Read
    writer: SoundWriter
    drafts: Together


class Answering:
    """Answers recordings with one model."""

    def __init__(
        self, model: Description, decoder: Decoder, note: Callable[[str], None]
    ) -> None:
        """``note`` is told what is odd about a recording."""
        self._model, self._decoder, self._note = model, decoder, note
        self._begun: dict[str, _Begun] = {}

    @property
    def batch_size(self) -> int:
        """How many are answered at a time: all there are."""
        return self._decoder.choose_batch_size()

    rows = batch_size

    @property
    def ahead(self) -> int:
        """How many it may have beyond those, so that it never waits for another.

        All that are answered may end, and others begin, before one of them is decoded.
        """
        group, rows = self._decoder.group, self.rows
        waiting = _GROUPS * group if group > 1 else 2
        return rows + most_ahead(rows, 0.0) + _WRITTEN + waiting

    def run(self, tasks: Iterator[Task], done: Callable[[Result], None]) -> None:
        """Answer ``tasks``; ``done`` is told of each, in any order."""
        with ThreadPoolExecutor(WRITERS) as pool:
            writing = Behind(pool, done)
            try:
                for result in self._decoder.run(self._jobs(tasks, done)):
                    begun = self._begun.pop(result.key, None)
                    if isinstance(result, Answered):
                        assert begun is not None
                        most = _most(
                            _WRITTEN, _WRITE_BEHIND, _BEHIND_S, begun.task.seconds
                        )
                        writing.add(self._write, begun, result, most=most)
                        continue
                    if begun is not None:
                        begun.writer.abandon()
                    done(result)
            finally:
                # Also where the run is cut short: what was answered is kept.
                try:
                    writing.rest()
                finally:
                    for begun in self._begun.values():
                        begun.writer.abandon()
                    self._begun.clear()

    def _write(self, begun: _Begun, answered: Answered) -> Result:
        task = begun.task
        try:
            return write_answer(
                self._model, task, begun.read, begun.writer, begun.drafts, answered
            )
        except PplexError as e:
            begun.drafts.discard()
            return Failure(answered.key, str(e), ends_all=is_disk_full(e))

    def _jobs(
        self, tasks: Iterator[Task], done: Callable[[Result], None]
    ) -> Iterator[Job]:
        rate = self._model.config.sample_rate
        coming = _ahead(
            lambda task: read_request(task.local, rate),
            tasks,
            lambda seconds: most_ahead(self.rows, seconds),
        )
        for task, future, more_takes in coming:
            key, source = task.request.key, str(task.request.source)
            try:
                read = future.result()
                script = self._model.script_of(task.request)
                samples = read.recording.num_samples
                check_script(script, task.request.settings, samples, self._model.config)
            except PplexError as e:
                done(Failure(key, str(e).replace(str(task.local.source), source)))
                continue
            except MemoryError:
                done(Failure(key, f"{source} is too long for this memory"))
                continue
            drafts = Together()
            writer = sound_writer(task, drafts, rate)
            self._begun[key] = _Begun(task, read, writer, drafts)
            for warning in read.recording.warnings:
                self._note(warning.replace(str(task.local.source), source))
            settings = task.local.settings
            yield Job(
                key=key,
                sound=read.recording,
                voice=settings.voice or "",
                text=settings.text or "",
                seed=settings.seed,
                until_quiet=settings.tail == "auto",
                write=writer,
                script=script,
                resume=settings.resume,
                saves=task.local.outputs.state is not None,
                more_takes=more_takes,
            )


def is_disk_full(error: PplexError) -> bool:
    """Whether the next recordings would fare no better."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _DISK_FULL


def most_ahead(rows: int, seconds: float) -> int:
    """How many recordings are read ahead of ``rows``, of so many seconds on average.

    Rows that began together may end together: what is to begin then is read before.
    """
    return _most(READ_AHEAD, rows, _AHEAD_S, seconds)


def _most(least: int, most: int, total_s: float, seconds: float) -> int:
    """As many recordings of so many seconds as have ``total_s``, between two counts."""
    return max(least, min(most, int(total_s / max(seconds, 1.0))))


def _ahead(
    work: Callable[[Task], Read], tasks: Iterator[Task], most: Callable[[float], int]
) -> Iterator[tuple[Task, Future[Read], bool]]:
    """Do ``work`` on threads, ahead of whoever asks; in order.

    With whether the next is another take of the recording, which is read once for all.
    ``most`` says for how many, of so many seconds on average.
    """
    waiting: deque[tuple[Task, Future[Read]]] = deque()
    waiting_s = 0.0

    def first() -> tuple[Task, Future[Read], bool]:
        nonlocal waiting_s
        task, future = waiting.popleft()
        waiting_s -= task.seconds
        return task, future, bool(waiting) and waiting[0][1] is future

    with ThreadPoolExecutor(_READERS) as pool:
        try:
            last: tuple[object, Future[Read]] | None = None
            for task in tasks:
                heard = task.local.heard
                if last is None or last[0] != heard:
                    last = heard, pool.submit(work, task)
                waiting.append((task, last[1]))
                waiting_s += task.seconds
                if len(waiting) > most(waiting_s / len(waiting)):
                    yield first()
            while waiting:
                yield first()
        finally:
            pool.shutdown(cancel_futures=True)
