"""Before a batch runs: what is to be done, what is done already, what is in the way."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pplex.audio.files import probe
from pplex.audio.folders import LeftOut
from pplex.batch.describe import Description, describe
from pplex.batch.plan import OutputOptions, Selection, in_shard, make_plan
from pplex.batch.records import check_name
from pplex.checkpoint.hub import resolve
from pplex.conversation.quiet import longest
from pplex.engine.choose import Compute
from pplex.errors import PplexError
from pplex.files import composed
from pplex.respond.manifest import Manifest
from pplex.respond.request import Request, Settings
from pplex.respond.stats import Check

_PROBES = 4  # at a time


@dataclass(frozen=True)
class Batch:
    """One call of ``pplex batch``.

    ``batch_size`` None is as many as fit, ``shard`` (K, N) the K-th of N parts, ``ray``
    a cluster's address or ``"local"``.
    """

    selection: Selection
    outdir: Path
    outputs: OutputOptions
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
    kv_bits: int | None = None
    check: Check | None = None


@dataclass(frozen=True)
class Workload:
    """All requests of a run and of its sibling shards, and the model they are for."""

    requests: list[Request]
    others: list[Request]
    model: Description
    left_out: LeftOut


@dataclass
class Kept:
    """Recordings that are not answered, so that what is there is not replaced.

    By their names: those whose outputs have ``other_settings``, those of which somebody
    ``changed`` one, and those where the outputs of ``others`` are.
    """

    other_settings: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.other_settings) + len(self.changed) + len(self.others)


@dataclass
class Remaining:
    """What is to be done with each request of a run.

    ``failed`` has those that failed before, and why; of those to do, ``replaced`` have
    outputs already.
    """

    todo: list[Request] = field(default_factory=list)
    skipped: list[Request] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)
    replaced: int = 0


def make_workload(batch: Batch, progress: bool) -> Workload:
    """Find the recordings and the model's files, and check the settings of all."""
    plan = make_plan(batch.selection, batch.outdir, batch.outputs, batch.settings)
    shard = batch.shard
    own = [r for r in plan.requests if shard is None or in_shard(r.key, shard)]
    others = [
        r for r in plan.requests if shard is not None and not in_shard(r.key, shard)
    ]
    model = describe(
        resolve(batch.model_name, offline=batch.offline, progress=progress)
    )
    for idx, request in enumerate(own):
        try:
            own[idx] = model.with_role(request)
        except PplexError as e:
            where = request.where
            raise PplexError(f"{where}: {e}" if where else str(e)) from e
    return Workload(own, others, model, plan.left_out)


def remaining(batch: Batch, work: Workload, manifest: Manifest) -> Remaining:
    """Tell what is left to do from what the manifest says."""
    left = Remaining()
    for request in work.requests:
        key, source = request.key, request.source
        digest = work.model.settings_digest(request)
        files = request.outputs.files().values()
        there = [path for path in files if os.path.lexists(path)]
        if not batch.overwrite:
            # Names that no run has written are for check_outputs_free.
            ours = [path for path in there if manifest.has_written(path)]
            origins = [manifest.origin_of(path) for path in ours]
            known = [origin for origin in origins if origin is not None]
            if len(known) < len(ours):
                left.kept.changed.append(key)
                continue
            if any(composed(recording) != composed(key) for recording, _ in known) or (
                ours and manifest.answers_another(key, source)
            ):
                left.kept.others.append(key)
                continue
            if any(settings != digest for _, settings in known):
                left.kept.other_settings.append(key)
                continue
            if manifest.is_done(key, digest, source, files):
                left.skipped.append(request)
                continue
            if not batch.retry_failed and manifest.has_failed(key, digest, source):
                line = manifest.line_of(key)
                assert line is not None
                left.failed[key] = line["error"] or "it failed"
                continue
        left.todo.append(request)
        left.replaced += bool(there)
    return left


def check_outputs_free(
    requests: Iterable[Request], manifest: Manifest, overwrite: bool
) -> None:
    """Refuse to replace files that no run of pplex batch has written."""
    foreign = []
    for path in files_of(requests):
        if os.path.isdir(path):  # no error for a name too long: it fails alone
            raise PplexError(f"cannot write {path}: it is a folder")
        if overwrite or not os.path.lexists(path):
            continue
        if not manifest.has_written(path):
            foreign.append(path)
    if foreign:
        more = f" and {len(foreign) - 1} more exist" if len(foreign) > 1 else " exists"
        raise PplexError(
            f"{foreign[0]}{more} already and did not come from pplex batch; choose "
            "another folder or give --overwrite"
        )


def files_of(requests: Iterable[Request]) -> list[Path]:
    """All outputs of some requests."""
    return [path for one in requests for path in one.outputs.files().values()]


def durations(requests: list[Request]) -> dict[str, float | None | PplexError]:
    """Seconds of each recording with its tail at its longest, None if unknown.

    Or why it is bad.
    """

    def probed(request: Request) -> float | None | PplexError:
        try:
            check_name(request)
            seconds = probe(request.source, request.settings.channel).duration_s
        except PplexError as e:
            return e
        return None if seconds is None else seconds + longest(request.settings.tail)

    with ThreadPoolExecutor(_PROBES) as pool:
        return dict(
            zip((r.key for r in requests), pool.map(probed, requests), strict=True)
        )
