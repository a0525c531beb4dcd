"""The tasks of a batch: a recording each, and the files that it becomes.

No two tasks write the same file, on any file system, and none writes a recording.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pplex.batch.identity import digest_of, number_of
from pplex.errors import PplexError
from pplex.respond.run import Layout, Outputs
from pplex.respond.settings import Settings


@dataclass(frozen=True)
class Wanted:
    """What is written for each recording.

    ``transcript`` is a format such as ``"srt"``; ``name`` replaces the file name.
    """

    layout: Layout = "stereo"
    transcript: str | None = None
    stats: bool = False
    tokens: bool = False
    name: str | None = None


@dataclass(frozen=True)
class Task:
    """One recording: its name in this batch, how it is answered, what is written.

    ``key`` is unique in the batch; ``settings.seed`` is the recording's own.
    """

    key: str
    source: Path
    outputs: Outputs
    settings: Settings
    extra: dict[str, Any] = field(default_factory=dict)


def in_shard(key: str, shard: tuple[int, int]) -> bool:
    """Whether a recording belongs to part ``shard[0]`` (from 1) of ``shard[1]``."""
    number, count = shard
    return number_of("shard", key) % count == number - 1


def outputs_of(audio: Path, wanted: Wanted) -> Outputs:
    """No name ends in ``output.json``: Full-Duplex-Bench writes one of its own."""
    stem = audio.with_suffix("")
    kind = wanted.transcript
    suffix = ".transcript.json" if kind == "json" else f".{kind}"
    return Outputs(
        audio=audio,
        layout=wanted.layout,
        transcript=stem.with_name(stem.name + suffix) if kind else None,
        stats=stem.with_name(f"{stem.name}.stats.json") if wanted.stats else None,
        tokens=stem.with_name(f"{stem.name}.npz") if wanted.tokens else None,
    )


def outputs_apart(tasks: list[Task], wanted: Wanted) -> list[Task]:
    """Tasks whose outputs would be the same file write to names with a hash."""
    shared = _sharing(tasks)
    if shared and wanted.name is not None:
        one, other = next(iter(shared.values()))[:2]
        raise PplexError(
            f"{one.source} and {other.source} would both be written to "
            f"{one.outputs.audio}; pick one of them with --glob"
        )
    colliding = {task.key for group in shared.values() for task in group}
    apart = []
    for task in tasks:
        if task.key in colliding:
            audio = task.outputs.audio
            name = audio.with_name(with_hash(audio.name, task.key))
            task = replace(task, outputs=outputs_of(name, wanted))
        apart.append(task)
    if colliding and (still := _sharing(apart)):
        one, other = next(iter(still.values()))[:2]
        raise PplexError(
            f"{one.source} and {other.source} would both be written to "
            f"{one.outputs.audio}; rename one of them"
        )
    return apart


def _sharing(tasks: list[Task]) -> dict[str, list[Task]]:
    """Files that more than one task would write, on any file system."""
    writers: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        for path in task.outputs.files().values():
            writers[str(path).casefold()].append(task)
    return {path: group for path, group in writers.items() if len(group) > 1}


def spare_inputs(tasks: list[Task]) -> None:
    sources = {os.path.realpath(task.source) for task in tasks}
    for task in tasks:
        for path in task.outputs.files().values():
            if os.path.realpath(path) in sources:
                raise PplexError(
                    f"{path} is a recording of this batch and would be overwritten; "
                    "choose another output folder, or other names with --output-name"
                )


def with_hash(name: str, details: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem}-{digest_of(details)[:8]}{path.suffix}"))
