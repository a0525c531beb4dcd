"""A batch: many recordings with one load of the model, in a folder that tells all.

Recordings are read ahead and results written behind by threads of their own, while the
model answers as many side by side as fit. Every result is on disk, whole, before the
manifest says so; whatever ends a run, the next one goes on where it stopped.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from pplex.batch.decoding import (
    KEPT_ROLES,
    Answered,
    Decoder,
    Failure,
    Job,
    Size,
    load_for,
)
from pplex.batch.describe import Description
from pplex.batch.lock import FolderLock
from pplex.batch.outcome import Report, Summary
from pplex.batch.prepare import (
    Batch,
    check_outputs_free,
    choose,
    durations,
    make_workload,
    remove_leftovers,
)
from pplex.batch.records import Read, done_line, failed_line, read_task, write_task
from pplex.batch.tasks import Task
from pplex.conversation.worker import num_cores
from pplex.errors import PplexError
from pplex.respond.manifest import Line, Manifest
from pplex.respond.stats import Outcome

# On a large machine a batch starts with a hundred recordings at once.
_READERS = min(8, max(2, num_cores() // 2))
_READ_AHEAD = 2 * _READERS
_WRITERS = 2
_WRITE_BEHIND = 8
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class Engine(Protocol):
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
        choice = choose(batch, work, manifest)
        check_outputs_free(choice.todo, manifest, lock.begun, batch.overwrite)
        if removed := remove_leftovers(work, batch.outdir, batch.shard is None):
            report.note(f"removed {removed} temporary files of a run that was killed")
        manifest.open()
        summary = Summary(
            skipped=len(choice.skipped),
            failed=dict(choice.failed),
            failed_before=len(choice.failed),
        )
        run = _Run(batch, work.model, manifest, lock, report, summary)
        try:
            run.all(choice.todo)
        except _Stop:
            summary.not_run = len(choice.todo) - summary.done - len(run.failed)
        summary.total_s = time.perf_counter() - start
        lock.release(ended=True)
        return summary
    finally:
        manifest.close()
        lock.release()


class _Run:
    """The work on the tasks that are left."""

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

    def all(self, tasks: list[Task]) -> None:
        """Answer ``tasks``, the longest first: short ones fill the rows at the end."""
        known = durations(tasks)
        good = [t for t in tasks if not isinstance(known[t.key], PplexError)]
        self._seconds = {
            t.key: seconds if isinstance(seconds := known[t.key], float) else 0.0
            for t in tasks
        }
        if tasks:
            self._report.starting(len(tasks), sum(self._seconds.values()))
        for task in tasks:
            if isinstance(error := known[task.key], PplexError):
                self._fail(task, str(error))
        if not good:
            return
        rate = self._model.config.frame_rate
        longest = max(self._seconds[t.key] for t in good)
        unknown = any(known[t.key] is None for t in good)
        window = self._model.config.lm.window
        frames = window if unknown else int(longest * rate) + 1
        total = sum(int(self._seconds[t.key] * rate) + 1 for t in good)
        total = len(good) * frames if unknown else total
        size = Size(self._batch.batch_size, frames, len(good), total)
        start = time.perf_counter()
        engine = self._engine(size)
        self._summary.load_s = time.perf_counter() - start
        start = time.perf_counter()
        try:
            self._answer(engine, self._ordered(good))
        finally:
            self._summary.run_s = time.perf_counter() - start
            self._summary.batch_size = engine.batch_size

    def _ordered(self, tasks: list[Task]) -> list[Task]:
        roles = {(t.settings.voice, t.settings.text): 0 for t in tasks}
        if len(roles) > KEPT_ROLES:  # else all prompts stay computed
            roles = {role: idx for idx, role in enumerate(roles)}
        return sorted(
            tasks,
            key=lambda t: (
                roles[t.settings.voice, t.settings.text],
                -self._seconds[t.key],
            ),
        )

    def _engine(self, size: Size) -> Engine:
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
        model, choice = load_for(self._model.local, size, self._batch.compute)
        self._report.computing(str(choice))
        return Decoder(model, sampling, size, self._report.note)

    def _answer(self, engine: Engine, tasks: list[Task]) -> None:
        by_key = {task.key: task for task in tasks}
        writes: deque[tuple[Task, Read, Future]] = deque()
        outcomes = engine.run(self._jobs(tasks))
        with ThreadPoolExecutor(_WRITERS) as pool:
            try:
                for outcome in outcomes:
                    if isinstance(outcome, Failure):
                        self._reads.pop(outcome.key, None)
                        self._fail(by_key[outcome.key], outcome.error)
                        continue
                    task = by_key[str(outcome.result.key)]
                    read = self._reads.pop(task.key)
                    files = task.outputs.files().values()
                    self._lock.begin(self._manifest.relative(p) for p in files)
                    peak = self._summary.peak_memory_gb
                    self._summary.peak_memory_gb = max(
                        peak, outcome.facts.peak_memory_gb
                    )
                    writes.append(
                        (
                            task,
                            read,
                            pool.submit(self._write, task, read, outcome),
                        )
                    )
                    while writes and (
                        writes[0][2].done() or len(writes) > _WRITE_BEHIND
                    ):
                        self._written(*writes.popleft())
            finally:
                # Also where the run is cut short: what was answered is kept.
                while writes:
                    self._written(*writes.popleft())

    def _write(
        self, task: Task, read: Read, outcome: Answered
    ) -> tuple[dict[str, float], list[Outcome], dict[str, Line]]:
        check = self._batch.check
        seconds, checks = write_task(self._model, task, read, outcome, check)
        return seconds, checks, self._manifest.describe(task.outputs.files())

    def _written(self, task: Task, read: Read, future: Future) -> None:
        try:
            seconds, checks, outputs = future.result()
        except PplexError as e:
            cause = e.__cause__
            if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
                raise  # the next ones would fare no better
            self._fail(task, str(e))
            return
        line = done_line(self._model, task, read, outputs, seconds)
        self._manifest.append(line)
        self._summary.done += 1
        self._summary.audio_s += line["audio_s"]
        self._report.finished(task.key, self._seconds[task.key])
        if checks:
            self._summary.checked += 1
            self._summary.checks_failed += not all(check.passed for check in checks)
            self._report.checked(checks, task.key)

    def _fail(self, task: Task, error: str) -> None:
        self.failed.add(task.key)
        self._summary.failed[task.key] = error
        self._manifest.append(failed_line(self._model, task, error))
        self._report.failed(task.key, error, self._seconds[task.key])
        if self._batch.fail_fast:
            raise _Stop

    def _jobs(self, tasks: list[Task]) -> Iterator[Job]:
        rate = self._model.config.sample_rate
        for task, future in _ahead(lambda t: read_task(t, rate), tasks):
            try:
                read = future.result()
            except PplexError as e:
                self._fail(task, str(e))
                continue
            except MemoryError:
                self._fail(task, f"{task.source} is too long for this memory")
                continue
            self._reads[task.key] = read
            settings = task.settings
            voice = self._model.voice_of(task)
            pcm = read.recording.pcm
            yield Job(task.key, pcm, voice, settings.text, settings.seed)


def _ahead(
    work: Callable[[Task], Read], tasks: list[Task]
) -> Iterator[tuple[Task, Future[Read]]]:
    """Do ``work`` on threads, a few tasks ahead of whoever asks; in order."""
    waiting: deque[tuple[Task, Future[Read]]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            for task in tasks:
                waiting.append((task, pool.submit(work, task)))
                if len(waiting) > _READ_AHEAD:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(cancel_futures=True)
