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
from pathlib import Path
from typing import Protocol

from pplex.audio.folders import LeftOut
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
    Kept,
    check_outputs_free,
    durations,
    make_workload,
    remaining,
    remove_leftovers,
)
from pplex.batch.records import (
    Placing,
    Read,
    check_again,
    failed_line,
    read_request,
    sound_writer,
    stopped_line,
    write_answer,
)
from pplex.checkpoint.hub import LocalModel
from pplex.conversation.session import load
from pplex.engine.device import num_cores, num_gpus
from pplex.errors import PplexError
from pplex.respond.ending import Ending
from pplex.respond.manifest import Line, Manifest
from pplex.respond.outputs import SoundWriter
from pplex.respond.request import Request
from pplex.respond.stats import Outcome

# On a large machine a batch starts with a hundred recordings at once.
_READERS = min(8, max(2, num_cores() // 2))
READ_AHEAD = 2 * _READERS
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

    def checked(self, outcomes: Sequence[Outcome], audio: Path, key: str) -> None:
        """A recording's outputs, ``audio`` and others, were checked."""

    def failed(self, key: str, error: str, audio_s: float) -> None:
        """A recording cannot be answered."""


@dataclass
class Summary:
    """How a batch went; ``failed`` says why, ``failed_before`` counts earlier ones.

    ``checks_failed`` of the recordings that were ``checked`` did not pass. Of those
    that were done ``replaced`` had outputs before. ``endings`` are those of what is
    done, now or before.

    ``audio_s`` is what was answered now, in ``run_s`` seconds after loading.
    """

    done: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    failed_before: int = 0
    not_run: int = 0
    kept: Kept = field(default_factory=Kept)
    left_out: LeftOut = field(default_factory=LeftOut)
    replaced: int = 0
    endings: list[Ending] = field(default_factory=list)
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
        unknown = [output for output in lock.begun if not manifest.knows(output)]
        for output in unknown:
            manifest.know(output)
        left = remaining(batch, work, manifest)
        check_outputs_free(left.todo, manifest, batch.overwrite)
        if removed := remove_leftovers(work, batch.outdir, batch.shard is None):
            report.note(f"removed {removed} temporary files of a run that was killed")
        manifest.open()
        own = {request.key for request in work.requests}
        for output in unknown:  # other shards may be alive
            if batch.shard is None or output["recording"] in own:
                manifest.append(stopped_line(output))
        summary = Summary(
            skipped=len(left.skipped),
            failed=dict(left.failed),
            failed_before=len(left.failed),
            kept=left.kept,
            left_out=work.left_out,
            replaced=left.replaced,
        )
        run = _Run(batch, work.model, manifest, lock, report, summary)
        run.look_again(left.skipped)
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


@dataclass(frozen=True)
class _Reading:
    """A recording that is answered, and what writes its answer."""

    read: Read
    placing: Placing
    writer: SoundWriter


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
        self._reads: dict[str, _Reading] = {}
        self.failed: set[str] = set()

    def look_again(self, requests: list[Request]) -> None:
        """Count what is to be said of answers of earlier runs."""
        for request in requests:
            self._count_ending(self._manifest.last[request.key])
            if self._batch.check is not None:
                outcomes = check_again(self._manifest, request, self._batch.check)
                self._count_checks(request, outcomes)

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
        model = load(self._model.local, compute=self._batch.compute, many=True)
        self._report.computing(str(model.form))
        if (others := num_gpus() - 1) > 0:
            self._report.note(
                f"other GPUs of this machine idle ({others}); --ray=local uses them all"
            )
        return Decoder(model, sampling, size, self._report.note)

    def _answer(self, workers: Workers, requests: list[Request]) -> None:
        by_key = {request.key: request for request in requests}
        writes: deque[tuple[Request, Placing, Future[tuple[Line, list[Outcome]]]]] = (
            deque()
        )
        outcomes = workers.run(self._jobs(requests))
        with ThreadPoolExecutor(_WRITERS) as pool:
            try:
                for outcome in outcomes:
                    if isinstance(outcome, Failure):
                        if reading := self._reads.pop(outcome.key, None):
                            reading.writer.abandon()
                        self._fail(by_key[outcome.key], outcome.error)
                        continue
                    request = by_key[outcome.key]
                    reading = self._reads.pop(request.key)
                    self._summary.peak_memory_gb = max(
                        self._summary.peak_memory_gb, outcome.info.peak_memory_gb
                    )
                    future = pool.submit(
                        write_answer,
                        self._model,
                        reading.placing,
                        reading.writer,
                        request,
                        reading.read,
                        outcome,
                        self._batch.check,
                    )
                    writes.append((request, reading.placing, future))
                    while writes and (
                        writes[0][2].done() or len(writes) > _WRITE_BEHIND
                    ):
                        self._written(*writes.popleft())
            finally:
                # Also where the run is cut short: what was answered is kept.
                while writes:
                    self._written(*writes.popleft())
                for reading in self._reads.values():
                    reading.writer.abandon()

    def _written(
        self,
        request: Request,
        placing: Placing,
        future: Future[tuple[Line, list[Outcome]]],
    ) -> None:
        try:
            line, checks = future.result()
        except PplexError as e:
            cause = e.__cause__
            if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
                raise  # the next ones would fare no better
            self._fail(request, str(e), placing)
            return
        self._manifest.append(line)
        self._summary.done += 1
        self._summary.audio_s += line["audio_s"]
        self._report.finished(request.key, self._seconds[request.key])
        self._count_ending(line)
        if checks:
            self._count_checks(request, checks)

    def _count_ending(self, line: Line) -> None:
        if line["words"] is not None:
            ending = Ending(line["words"], bool(line["cut_off"]))
            self._summary.endings.append(ending)

    def _count_checks(self, request: Request, outcomes: list[Outcome]) -> None:
        self._summary.checked += 1
        self._summary.checks_failed += not all(check.passed for check in outcomes)
        self._report.checked(outcomes, request.outputs.audio, request.key)

    def _fail(
        self, request: Request, error: str, placing: Placing | None = None
    ) -> None:
        self.failed.add(request.key)
        self._summary.failed[request.key] = error
        written = placing.outputs(request.outputs.files()) if placing else {}
        self._manifest.append(failed_line(self._model, request, error, written))
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
            placing = Placing(
                self._manifest,
                self._lock,
                request.key,
                self._model.settings_digest(request),
                self._batch.overwrite,
            )
            writer = sound_writer(request, placing, rate)
            self._reads[request.key] = _Reading(read, placing, writer)
            for warning in read.recording.warnings:
                self._report.note(warning)
            settings = request.settings
            yield Job(
                key=request.key,
                sound=read.recording,
                voice=settings.voice or "",
                text=settings.text or "",
                seed=settings.seed,
                until_quiet=settings.tail == "auto",
                write=writer,
            )


def _ahead(
    work: Callable[[Request], Read], requests: list[Request]
) -> Iterator[tuple[Request, Future[Read]]]:
    """Do ``work`` on threads, a few requests ahead of whoever asks; in order."""
    waiting: deque[tuple[Request, Future[Read]]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            for request in requests:
                waiting.append((request, pool.submit(work, request)))
                if len(waiting) > READ_AHEAD:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)
