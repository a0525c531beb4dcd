"""A batch: many recordings with one load of the model, in a folder that tells all.

Recordings are read ahead and results written behind by threads of their own, while the
model answers as many side by side as fit. Every result is on disk, whole, before the
manifest says so; whatever ends a run, the next one goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pplex.audio.folders import LeftOut
from pplex.batch.answering import WRITERS, Answering, Behind, Result, is_disk_full
from pplex.batch.decoding import Decoder, Size
from pplex.batch.describe import Description
from pplex.batch.order import in_order
from pplex.batch.prepare import (
    Batch,
    Kept,
    check_outputs_free,
    durations,
    files_of,
    make_workload,
    remaining,
)
from pplex.batch.records import (
    Placing,
    Task,
    Written,
    check_again,
    failed_line,
    finish,
)
from pplex.checkpoint.hub import LocalModel
from pplex.conversation.prompts import KEPT_ROLES
from pplex.conversation.session import load
from pplex.engine.device import num_gpus
from pplex.errors import PplexError
from pplex.files import make_folder
from pplex.respond.ending import Ending
from pplex.respond.lock import FolderLock, remove_leftovers
from pplex.respond.manifest import FAILED, Line, Manifest, stopped_line
from pplex.respond.request import Request
from pplex.respond.stats import Outcome


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

    ``audio_s`` is what was answered now, in ``run_s`` seconds from the end of loading
    to the last answer.
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
    """What answers recordings: a model here, or many on a cluster."""

    @property
    def batch_size(self) -> int | None:
        """How many each of them answers at a time."""

    @property
    def rows(self) -> int:
        """How many are answered at a time in all."""

    def run(self, tasks: Iterator[Task], done: Callable[[Result], None]) -> None:
        """Answer ``tasks``; ``done`` is told of each, in any order."""


_Finished = tuple[Task, Line, list[Outcome], float]  # when, by perf_counter


class _Stop(Exception):
    """--fail-fast: a recording failed."""


def run_batch(batch: Batch, report: Report) -> Summary:
    """Answer every recording that is not answered yet."""
    start = time.perf_counter()
    work = make_workload(batch, report.shows_bars)
    make_folder(batch.outdir)
    lock = FolderLock(batch.outdir, batch.shard)
    with ExitStack() as stack:
        stack.callback(lock.release)
        manifest = Manifest(batch.outdir, batch.shard, report.note)
        stack.callback(manifest.close)
        unknown = [output for output in lock.begun if not manifest.knows(output)]
        for output in unknown:
            manifest.know(output)
        left = remaining(batch, work, manifest)
        check_outputs_free(left.todo, manifest, batch.overwrite)
        files = files_of(work.requests)
        spared = None if batch.shard is None else files_of(work.others)
        if removed := remove_leftovers(batch.outdir, files, spared):
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
        if batch.ray is not None:  # of workers that were lost
            remove_leftovers(batch.outdir, files, spared)
        summary.total_s = time.perf_counter() - start
        lock.release(ended=True)
        return summary


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
        self._tasks: dict[str, Task] = {}
        self._started = 0.0
        self._ways: list[str] = []
        self.failed: set[str] = set()

    def look_again(self, requests: list[Request]) -> None:
        """Count what is to be said of answers of earlier runs."""
        for request in requests:
            line = self._manifest.line_of(request.key)
            assert line is not None  # it was skipped for what this says
            self._compare_way(line)
            self._count_ending(line)
            if self._batch.check is not None:
                outcomes = check_again(self._manifest, request, self._batch.check)
                self._count_checks(request, outcomes)

    def all(self, requests: list[Request]) -> None:
        """Answer them, so that rows are busy to the end."""
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
                self._fail(self._task(request), str(error))
        if not good:
            return
        lengths = [s for s in known.values() if not isinstance(s, PplexError)]
        size = Size.of(
            self._batch.batch_size,
            lengths,
            self._model.config,
            takes=self._batch.outputs.takes > 1,
        )
        start = time.perf_counter()
        workers = self._workers(size)
        self._summary.load_s = time.perf_counter() - start
        self._started = time.perf_counter()
        try:
            self._answer(workers, self._ordered(good, workers.rows))
        finally:
            self._summary.batch_size = workers.batch_size

    def _ordered(self, requests: list[Request], rows: int) -> list[Request]:
        """In the order of ``in_order``, where nothing has to stay together."""
        roles = {r.opening: 0 for r in requests}
        if len(roles) > KEPT_ROLES:  # else all prompts stay computed
            roles = {role: idx for idx, role in enumerate(roles)}
        elif self._batch.outputs.takes < 2:
            rate = self._model.config.frame_rate
            frames = [int(self._seconds[r.key] * rate) + 1 for r in requests]
            return [requests[idx] for idx in in_order(frames, rows)]
        return sorted(
            requests,
            key=lambda r: (
                roles[r.opening],
                -self._seconds[r.key],
                r.source,  # takes of one recording follow each other
            ),
        )

    def _workers(self, size: Size) -> Workers:
        if self._batch.ray is not None:
            from pplex.batch.cluster import Cluster

            return Cluster(self._batch, self._model, size, self._report.note)
        self._report.loading(self._model.local)
        local, batch = self._model.local, self._batch
        model = load(local, compute=batch.compute, kv_bits=batch.kv_bits, many=True)
        self._report.computing(str(model.form))
        if (others := num_gpus() - 1) > 0:
            self._report.note(
                f"other GPUs of this machine idle ({others}); --ray=local uses them all"
            )
        sampling, note = self._batch.settings.sampling, self._report.note
        return Answering(self._model, Decoder(model, sampling, size, note), note)

    def _answer(self, workers: Workers, requests: list[Request]) -> None:
        with ThreadPoolExecutor(WRITERS) as pool:
            finishing = Behind(pool, self._take)

            def take(result: Result) -> None:
                task = self._tasks[result.key]
                if isinstance(result, Written):
                    peak_gb = max(self._summary.peak_memory_gb, result.peak_memory_gb)
                    self._summary.peak_memory_gb = peak_gb
                    finishing.add(self._finish, task, result)
                elif result.ends_all:
                    raise PplexError(result.error)
                else:
                    self._fail(task, result.error)

            try:
                workers.run(map(self._task, requests), take)
            finally:
                finishing.rest()

    def _task(self, request: Request) -> Task:
        settings = self._model.settings_digest(request)
        seconds = self._seconds.get(request.key, 0.0)
        task = Task(request, request, self._batch.outdir, settings, seconds)
        self._tasks[request.key] = task
        return task

    def _finish(self, task: Task, written: Written) -> _Finished:
        placing = Placing(self._manifest, self._lock, task, self._batch.overwrite)
        try:
            line, checks = finish(task, written, placing, self._batch.check)
        except PplexError as e:
            if is_disk_full(e):
                raise
            line, checks = failed_line(self._model, task, str(e), placing.written), []
        return task, line, checks, time.perf_counter()

    def _take(self, finished: _Finished) -> None:
        task, line, checks, end = finished
        key = task.request.key
        self._manifest.append(line)
        if line["status"] == FAILED:
            self.failed.add(key)
            self._summary.failed[key] = line["error"]
            self._report.failed(key, line["error"], task.seconds)
            if self._batch.fail_fast:
                raise _Stop
            return
        if line["unsaid"]:
            self._report.note(f"{key}: {line['unsaid']}")
        self._summary.run_s = max(self._summary.run_s, end - self._started)
        self._summary.done += 1
        self._summary.audio_s += line["audio_s"]
        self._report.finished(key, task.seconds)
        self._compare_way(line)
        self._count_ending(line)
        if checks:
            self._count_checks(task.request, checks)

    def _compare_way(self, line: Line) -> None:
        """Say it where answers are computed in different ways, each once."""
        way = ", ".join((line["computed"] or {}).values())
        if not way or way in self._ways:
            return
        if self._ways:
            self._report.note(
                f"{line['recording']} was computed on {way}; others here on "
                f"{self._ways[0]}: a recording gets other bytes by each"
            )
        self._ways.append(way)

    def _count_ending(self, line: Line) -> None:
        if line["words"] is not None:
            ending = Ending(line["words"], bool(line["cut_off"]))
            self._summary.endings.append(ending)

    def _count_checks(self, request: Request, outcomes: list[Outcome]) -> None:
        self._summary.checked += 1
        self._summary.checks_failed += not all(check.passed for check in outcomes)
        self._report.checked(outcomes, request.outputs.audio, request.key)

    def _fail(self, task: Task, error: str) -> None:
        line = failed_line(self._model, task, error, {})
        self._take((task, line, [], time.perf_counter()))
