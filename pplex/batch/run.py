"""A batch: many recordings with one load of the model, in a folder that tells all.

Recordings are read ahead and results written behind by threads of their own, while the
model answers as many side by side as fit. Every result is on disk, whole, before the
manifest says so; whatever ends a run, the next one goes on where it stopped.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from pplex.batch.decoding import (
    KEPT_ROLES,
    Answered,
    Decoder,
    Failure,
    Job,
    Size,
)
from pplex.batch.describe import Description
from pplex.batch.lock import FolderLock
from pplex.batch.prepare import (
    Batch,
    check_outputs_free,
    durations,
    make_workload,
    remaining,
    remove_leftovers,
)
from pplex.batch.records import (
    Read,
    failed_line,
    read_request,
    write_answer,
)
from pplex.checkpoint.hub import LocalModel
from pplex.conversation.session import load
from pplex.conversation.worker import num_cores
from pplex.errors import PplexError
from pplex.respond.manifest import Line, Manifest
from pplex.respond.request import Request
from pplex.respond.stats import Outcome

# On a large machine a batch starts with a hundred recordings at once.
_READERS = min(8, max(2, num_cores() // 2))
_READ_AHEAD = 2 * _READERS
_WRITERS = 2
_WRITE_BEHIND = 8
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class Report(Protocol):
    """Who is told how a batch gets on."""

    shows_bars: bool

    def note(self, message: str) -> None:
        """Something worth a line happened."""

    def loading(self, local: LocalModel) -> None:
        """The model's files are there and will be loaded."""

    def computing(self, how: str) -> None:
        """The model is loaded and computes in this form, for this reason."""

    def starting(self, count: int, audio_s: float) -> None:
        """So many recordings, of so many seconds in all, will be answered."""

    def finished(self, key: str, audio_s: float) -> None:
        """A recording's outputs are written."""

    def checked(self, outcomes: Sequence[Outcome], key: str) -> None:
        """A recording's outputs were checked."""

    def failed(self, key: str, error: str, audio_s: float) -> None:
        """A recording cannot be answered."""


@dataclass
class Summary:
    """How a batch went; ``failed`` says why, ``failed_before`` counts earlier ones.

    ``checks_failed`` of the recordings that were ``checked`` did not pass.

    ``audio_s`` is what was answered now, in ``run_s`` seconds after loading.
    """

    done: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    failed_before: int = 0
    not_run: int = 0
    checked: int = 0
    checks_failed: int = 0
    audio_s: float = 0.0
    load_s: float = 0.0
    run_s: float = 0.0
    total_s: float = 0.0
    batch_size: int | None = None
    peak_memory_gb: float = 0.0


class Workers(Protocol):
    """What answers jobs: a model here, or many on a cluster."""

    batch_size: int | None

    def run(self, jobs: Iterator[Job]) -> Iterator[Answered | Failure]:
        """Yield an answer or a failure for each job, in any order."""


class _Stop(Exception):
    """--fail-fast: a recording failed."""


def run_batch(batch: Batch, report: Report) -> Summary:
    """Answer every recording that is not answered yet."""
    start = time.perf_counter()
    work = make_workload(batch, report.shows_bars)
    try:
        batch.outdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise PplexError(f"cannot write to {batch.outdir}: {e.strerror or e}") from e
    lock = FolderLock(batch.outdir, batch.shard)
    manifest = Manifest(batch.outdir, batch.shard)
    try:
        left = remaining(batch, work, manifest)
        check_outputs_free(left.todo, manifest, lock.begun, batch.overwrite)
        if removed := remove_leftovers(work, batch.outdir, batch.shard is None):
            report.note(f"removed {removed} temporary files of a run that was killed")
        manifest.open()
        summary = Summary(
            skipped=len(left.skipped),
            failed=dict(left.failed),
            failed_before=len(left.failed),
        )
        run = _Run(batch, work.model, manifest, lock, report, summary)
        try:
            run.all(left.todo)
        except _Stop:
            summary.not_run = len(left.todo) - summary.done - len(run.failed)
        summary.total_s = time.perf_counter() - start
        lock.release(ended=True)
        return summary
    finally:
        manifest.close()
        lock.release()


class _Run:
    """The work on the requests that are left."""

    def __init__(
        self,
        batch: Batch,
        model: Description,
        manifest: Manifest,
        lock: FolderLock,
        report: Report,
        summary: Summary,
    ) -> None:
        self._batch = batch
        self._model = model
        self._manifest = manifest
        self._lock = lock
        self._report = report
        self._summary = summary
        self._seconds: dict[str, float] = {}
        self._reads: dict[str, Read] = {}
        self.failed: set[str] = set()

    def all(self, requests: list[Request]) -> None:
        """Answer them, the longest first: short ones fill the rows at the end."""
        known = durations(requests)
        good = [r for r in requests if not isinstance(known[r.key], PplexError)]
        self._seconds = {
            r.key: seconds if isinstance(seconds := known[r.key], float) else 0.0
            for r in requests
        }
        if requests:
            self._report.starting(len(requests), sum(self._seconds.values()))
        for request in requests:
            if isinstance(error := known[request.key], PplexError):
                self._fail(request, str(error))
        if not good:
            return
        lengths = [s for s in known.values() if not isinstance(s, PplexError)]
        size = Size.of(self._batch.batch_size, lengths, self._model.config)
        start = time.perf_counter()
        workers = self._workers(size)
        self._summary.load_s = time.perf_counter() - start
        start = time.perf_counter()
        try:
            self._answer(workers, self._ordered(good))
        finally:
            self._summary.run_s = time.perf_counter() - start
            self._summary.batch_size = workers.batch_size

    def _ordered(self, requests: list[Request]) -> list[Request]:
        roles = {(r.settings.voice, r.settings.text): 0 for r in requests}
        if len(roles) > KEPT_ROLES:  # else all prompts stay computed
            roles = {role: idx for idx, role in enumerate(roles)}
        return sorted(
            requests,
            key=lambda r: (
                roles[r.settings.voice, r.settings.text],
                -self._seconds[r.key],
            ),
        )

    def _workers(self, size: Size) -> Workers:
        sampling = self._batch.settings.sampling
        if self._batch.ray is not None:
            from pplex.batch.cluster import Cluster

            return Cluster(
                self._batch.ray,
                self._batch.offline,
                self._model,
                sampling,
                size,
                self._batch.compute,
                self._report.note,
            )
        self._report.loading(self._model.local)
        model = load(self._model.local, compute=self._batch.compute, many=size.many)
        self._report.computing(str(model.form))
        return Decoder(model, sampling, size, self._report.note)

    def _answer(self, workers: Workers, requests: list[Request]) -> None:
        by_key = {request.key: request for request in requests}
        writes: deque[tuple[Request, Future[tuple[Line, list[Outcome]]]]] = deque()
        outcomes = workers.run(self._jobs(requests))
        with ThreadPoolExecutor(_WRITERS) as pool:
            try:
                for outcome in outcomes:
                    if isinstance(outcome, Failure):
                        self._reads.pop(outcome.key, None)
                        self._fail(by_key[outcome.key], outcome.error)
                        continue
                    request = by_key[outcome.key]
                    read = self._reads.pop(request.key)
                    files = request.outputs.files().values()
                    self._lock.begin(self._manifest.relative(p) for p in files)
                    self._summary.peak_memory_gb = max(
                        self._summary.peak_memory_gb, outcome.info.peak_memory_gb
                    )
                    future = pool.submit(
                        write_answer,
                        self._model,
                        self._manifest,
                        request,
                        read,
                        outcome,
                        self._batch.check,
                    )
                    writes.append((request, future))
                    while writes and (
                        writes[0][1].done() or len(writes) > _WRITE_BEHIND
                    ):
                        self._written(*writes.popleft())
            finally:
                # Also where the run is cut short: what was answered is kept.
                while writes:
                    self._written(*writes.popleft())

    def _written(
        self, request: Request, future: Future[tuple[Line, list[Outcome]]]
    ) -> None:
        try:
            line, checks = future.result()
        except PplexError as e:
            cause = e.__cause__
            if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
                raise  # the next ones would fare no better
            self._fail(request, str(e))
            return
        self._manifest.append(line)
        self._summary.done += 1
        self._summary.audio_s += line["audio_s"]
        self._report.finished(request.key, self._seconds[request.key])
        if checks:
            self._summary.checked += 1
            self._summary.checks_failed += not all(check.passed for check in checks)
            self._report.checked(checks, request.key)

    def _fail(self, request: Request, error: str) -> None:
        self.failed.add(request.key)
        self._summary.failed[request.key] = error
        self._manifest.append(failed_line(self._model, request, error))
        self._report.failed(request.key, error, self._seconds[request.key])
        if self._batch.fail_fast:
            raise _Stop

    def _jobs(self, requests: list[Request]) -> Iterator[Job]:
        rate = self._model.config.sample_rate
        for request, future in _ahead(lambda r: read_request(r, rate), requests):
            try:
                read = future.result()
            except PplexError as e:
                self._fail(request, str(e))
                continue
            except MemoryError:
                self._fail(request, f"{request.source} is too long for this memory")
                continue
            self._reads[request.key] = read
            settings = request.settings
            voice = self._model.voice_of(request)
            pcm = read.recording.pcm
            yield Job(request.key, pcm, voice, settings.text, settings.seed)


def _ahead(
    work: Callable[[Request], Read], requests: list[Request]
) -> Iterator[tuple[Request, Future[Read]]]:
    """Do ``work`` on threads, a few requests ahead of whoever asks; in order."""
    waiting: deque[tuple[Request, Future[Read]]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            for request in requests:
                waiting.append((request, pool.submit(work, request)))
                if len(waiting) > _READ_AHEAD:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)
