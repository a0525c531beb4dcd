"""``--dry-run``: look at everything a batch would need, and run no model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pplex import units
from pplex.audio.files import Recording
from pplex.audio.folders import LeftOut
from pplex.batch.answering import most_ahead
from pplex.batch.decoding import PROMPT_FRAMES, Size
from pplex.batch.describe import Description
from pplex.batch.prepare import (
    Batch,
    Kept,
    check_outputs_free,
    make_workload,
    remaining,
)
from pplex.batch.records import read_request
from pplex.checkpoint.weights import lm_tensors
from pplex.conversation.quiet import longest
from pplex.engine.choose import choose_form, cost_of, need_bytes
from pplex.engine.device import available_gb, host_memory_gb, on_cpu
from pplex.errors import PplexError
from pplex.respond.lock import begun_in
from pplex.respond.manifest import DONE, Manifest
from pplex.respond.request import Request
from pplex.respond.run import MOST_KEPT, check_script

_READERS = 2
_SAMPLE_BYTES = 4
# Of a transcript, stats and tokens: a few numbers or words a frame.
_SIDE_BYTES_PER_FRAME = {"transcript": 60, "stats": 1, "tokens": 40}
_SIDE_BYTES = 4096


@dataclass
class Forecast:
    """What a run would find; sizes in GB (1e9 bytes).

    ``seconds`` follows from what this folder's manifest says of earlier answers by
    the same model; None where it says nothing.
    """

    todo: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    failed_before: int = 0
    kept: Kept = field(default_factory=Kept)
    left_out: LeftOut = field(default_factory=LeftOut)
    replaced: int = 0
    warnings: list[str] = field(default_factory=list)
    auto_tails: bool = False
    audio_s: float = 0.0
    longest_s: float = 0.0
    output_gb: float = 0.0
    disk_free_gb: float = 0.0
    weights_gb: float = 0.0
    codec_gb: float = 0.0
    row_gb: float = 0.0
    sound_gb: float = 0.0
    memory_gb: float = 0.0
    batch_size: int = 0
    seconds: float | None = None

    def problems(self) -> list[str]:
        """What speaks against a run, in sentences."""
        found = []
        if self.output_gb > self.disk_free_gb:
            found.append(
                f"the outputs need about {units.size(1e9 * self.output_gb)} and the "
                f"disk has {units.size(1e9 * self.disk_free_gb)} free"
            )
        host_gb = host_memory_gb()
        if host_gb is not None and self.sound_gb > host_gb:
            found.append(
                f"the sound of {self.batch_size} recordings at a time needs about "
                f"{self.sound_gb:.1f} GB of memory, and there are {host_gb:.1f} GB"
            )
        need_gb = self.weights_gb + self.codec_gb + self.row_gb
        if self.todo and 0.0 < self.memory_gb < need_gb:
            found.append(
                f"the model and one recording need about {need_gb:.1f} GB of memory, "
                f"and there are {self.memory_gb:.1f} GB"
            )
        return found


def forecast(batch: Batch, progress: bool) -> Forecast:
    """Check what ``run_batch`` would do; nothing is written."""
    work = make_workload(batch, progress)
    model = work.model
    manifest = Manifest(batch.outdir, batch.shard)
    for output in begun_in(batch.outdir):
        manifest.know(output)
    left = remaining(batch, work, manifest)
    check_outputs_free(left.todo, manifest, batch.overwrite)
    found = Forecast(
        skipped=len(left.skipped),
        failed=dict(left.failed),
        failed_before=len(left.failed),
        kept=left.kept,
        left_out=work.left_out,
        replaced=left.replaced,
    )
    for request, recording in _read(left.todo, model):
        if isinstance(recording, PplexError):
            found.failed[request.key] = str(recording)
            continue
        found.warnings += recording.warnings
        auto = request.settings.tail == "auto"
        seconds = recording.num_samples / recording.sample_rate
        seconds += longest(request.settings.tail) if auto else 0.0
        found.todo += 1
        found.auto_tails |= auto
        found.audio_s += seconds
        found.longest_s = max(found.longest_s, seconds)
        found.output_gb += _output_bytes(request, seconds, model) / 1e9
    outdir = batch.outdir.absolute()
    there = next(p for p in (outdir, *outdir.parents) if p.is_dir())
    found.disk_free_gb = shutil.disk_usage(there).free / 1e9
    _add_memory(found, batch, model)
    found.seconds = _estimate(found, manifest, model)
    return found


def _read(
    requests: list[Request], model: Description
) -> Iterator[tuple[Request, Recording | PplexError]]:
    """Read each recording through; what it is, or what is wrong with it."""
    config = model.config

    def look(request: Request) -> Recording | PplexError:
        try:
            found = read_request(request, config.sample_rate).recording
            script = model.script_of(request)
            check_script(script, request.settings, found.num_samples, config)
            return found
        except PplexError as e:
            return e

    with ThreadPoolExecutor(_READERS) as pool:
        yield from zip(requests, pool.map(look, requests), strict=True)


def _output_bytes(request: Request, seconds: float, model: Description) -> float:
    tracks = 1 if request.outputs.layout == "agent" else 2
    total = seconds * model.config.sample_rate * 2 * tracks
    frames = seconds * model.config.frame_rate
    for what in request.outputs.files():
        kind = what.partition("_")[0]  # of transcript_srt too
        if kind in _SIDE_BYTES_PER_FRAME:
            total += _SIDE_BYTES + frames * _SIDE_BYTES_PER_FRAME[kind]
    return total


def _add_memory(found: Forecast, batch: Batch, model: Description) -> None:
    config, local = model.config.with_kv_bits(batch.kv_bits), model.local
    frames = min(config.lm.window, int(found.longest_s * config.frame_rate) + 1)
    total = int(found.audio_s * config.frame_rate)
    takes = batch.outputs.takes > 1
    size = Size(batch.batch_size, frames, found.todo, total, takes)
    tensors = lm_tensors(local.folder, config.lm)
    form = choose_form(batch.compute, config, tensors, many=True)
    if form.dense:
        tensors = tensors.write_out()
    cost = cost_of(config, tensors, alone=form.alone)
    found.weights_gb, found.codec_gb = cost.held / 1e9, cost.codec_work / 1e9
    positions = frames + PROMPT_FRAMES
    alone_gb = need_bytes(config, cost, positions) / 1e9
    found.row_gb = alone_gb - found.weights_gb - found.codec_gb
    found.memory_gb = available_gb() or 0.0
    free = 1e9 * found.memory_gb - cost.held
    if batch.batch_size is None:
        found.batch_size = size.fitting(config, cost, free)
    else:
        found.batch_size = min(batch.batch_size, found.todo)
    found.sound_gb = _sound_bytes(found, config.sample_rate) / 1e9


def _sound_bytes(found: Forecast, sample_rate: int) -> float:
    """Of those answered and of those read ahead.

    A GPU codes recordings whole, and has both sides of each; a CPU keeps none of long
    ones.
    """
    longest = found.longest_s * sample_rate * _SAMPLE_BYTES
    kept = min(longest, MOST_KEPT * _SAMPLE_BYTES)
    most = most_ahead(found.batch_size, found.longest_s)
    ahead = min(most, max(0, found.todo - found.batch_size))
    return found.batch_size * (kept if on_cpu() else 2 * longest) + ahead * kept


def _estimate(found: Forecast, manifest: Manifest, model: Description) -> float | None:
    audio_s = spent_s = 0.0
    for line in manifest.last.values():
        if line["status"] == DONE and line.get("weights") == model.identity:
            audio_s += line["audio_s"] or 0.0
            spent_s += sum((line["timings"] or {}).values())
    return found.audio_s * spent_s / audio_s if audio_s > 0 else None
