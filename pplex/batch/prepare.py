"""Before a batch runs: what is to be done, what is done already, what is in the way."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pplex.audio.probe import probe
from pplex.batch.describe import Description, describe
from pplex.batch.plan import Selection, make_plan
from pplex.batch.records import check_name
from pplex.batch.tasks import Task, Wanted, in_shard
from pplex.checkpoint.hub import resolve
from pplex.conversation.compute import Compute
from pplex.errors import PplexError
from pplex.respond.manifest import Manifest
from pplex.respond.settings import Settings
from pplex.respond.stats import Check

_LEFTOVER = re.compile(r"\.(.{0,48})\.pplex-[0-9a-f]{8}\.tmp", re.DOTALL)
_PROBES = 4  # at a time


@dataclass(frozen=True)
class Batch:
    """One call of ``pplex batch``.

    ``batch_size`` None is as many as fit, ``shard`` (K, N) the K-th of N parts, ``ray``
    a cluster's address or ``"local"``.
    """

    selection: Selection
    outdir: Path
    wanted: Wanted
    settings: Settings
    model_name: str
    offline: bool = False
    batch_size: int | None = None
    overwrite: bool = False
    retry_failed: bool = False
    fail_fast: bool = False
    shard: tuple[int, int] | None = None
    ray: str | None = None
    compute: Compute = "auto"
    check: Check | None = None


@dataclass(frozen=True)
class Workload:
    """All tasks of a run and of its siblings, and the model they are for."""

    tasks: list[Task]
    others: list[Task]
    model: Description


@dataclass
class Choice:
    """What to do with each task; ``failed`` has those that failed before, and why."""

    todo: list[Task] = field(default_factory=list)
    skipped: list[Task] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def make_workload(batch: Batch, progress: bool) -> Workload:
    """Find the recordings and the model's files, and check the settings of all."""
    planned = make_plan(batch.selection, batch.outdir, batch.wanted, batch.settings)
    shard = batch.shard
    tasks = [t for t in planned if shard is None or in_shard(t.key, shard)]
    own = {task.key for task in tasks}
    others = [task for task in planned if task.key not in own]
    model = describe(
        resolve(batch.model_name, offline=batch.offline, progress=progress)
    )
    for one in {task.settings.voice: task for task in tasks}.values():
        model.voice_file(model.voice_of(one))
    return Workload(tasks, others, model)


def choose(batch: Batch, work: Workload, manifest: Manifest) -> Choice:
    """Tell what is left to do from what the manifest says."""
    choice = Choice()
    for task in work.tasks:
        digest = work.model.settings_digest(task)
        files = task.outputs.files().values()
        if batch.overwrite:
            choice.todo.append(task)
        elif manifest.is_done(task.key, digest, task.source, files):
            choice.skipped.append(task)
        elif not batch.retry_failed and manifest.has_failed(
            task.key, digest, task.source
        ):
            choice.failed[task.key] = manifest.last[task.key]["error"]
        else:
            choice.todo.append(task)
    return choice


def check_outputs_free(
    tasks: Iterable[Task], manifest: Manifest, begun: set[str], overwrite: bool
) -> None:
    """Refuse to replace files that no run of pplex batch has written."""
    foreign = []
    for task in tasks:
        for path in task.outputs.files().values():
            if os.path.isdir(path):  # no error for a name too long: it fails alone
                raise PplexError(f"cannot write {path}: it is a folder")
            if overwrite or not os.path.lexists(path):
                continue
            name = manifest.relative(path)
            if name not in manifest.outputs and name not in begun:
                foreign.append(path)
    if foreign:
        more = f" and {len(foreign) - 1} more exist" if len(foreign) > 1 else " exists"
        raise PplexError(
            f"{foreign[0]}{more} already and did not come from pplex batch; choose "
            "another folder or give --overwrite"
        )


def remove_leftovers(work: Workload, outdir: Path, alone: bool) -> int:
    """Remove temporary files of a run that was killed; how many there were.

    Where other shards may be at work (not ``alone``), theirs are left.
    """
    own = {part(p) for t in work.tasks for p in t.outputs.files().values()}
    theirs = {part(p) for t in work.others for p in t.outputs.files().values()}
    removed = 0
    for folder in {outdir, *(folder for folder, _ in own)}:
        if not folder.is_dir():
            continue
        for entry in os.scandir(folder):
            match = _LEFTOVER.fullmatch(entry.name)
            name = (folder, match[1]) if match else None
            if name and (alone or (name in own and name not in theirs)):
                Path(entry.path).unlink(missing_ok=True)
                removed += 1
    return removed


def part(path: Path) -> tuple[Path, str]:
    """The folder and the part of a name that ``atomic_write`` keeps."""
    return path.parent, path.name[:48]


def durations(tasks: list[Task]) -> dict[str, float | None | PplexError]:
    """Seconds of each recording with its tail, None if unknown, or why it is bad."""

    def look(task: Task) -> float | None | PplexError:
        try:
            check_name(task)
            seconds = probe(task.source, task.settings.channel).duration_s
        except PplexError as e:
            return e
        return None if seconds is None else seconds + task.settings.tail_s

    with ThreadPoolExecutor(_PROBES) as pool:
        return dict(zip((t.key for t in tasks), pool.map(look, tasks), strict=True))
