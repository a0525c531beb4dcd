"""``pplex bench``: how fast a model answers here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pplex.cli.options import (
    FILE,
    OneOf,
    WholeRange,
    compute_options,
    model_options,
    overwrite_option,
    verbosity_options,
)
from pplex.cli.tables import echo_table
from pplex.files import PIPE, check_new, write_text
from pplex.units import percent, significant, size

if TYPE_CHECKING:
    from pplex.bench.compare import Change
    from pplex.bench.run import Bench, Run
    from pplex.bench.submit import Submission

_MOST_FRAMES = 1_000_000
_MOST_LATE_PERCENT = 1.0  # of frames, which a player's buffer hides
_BESIDE = ("overwrite", "quiet", "verbose")  # what --submit allows
_SAME = 0.05  # of a figure, by which runs differ without a reason


def _batch_sizes(value: str) -> tuple[int, ...]:
    """Numbers from 1, with commas between them."""
    parts = value.split(",")
    if all(re.fullmatch(r"\d{1,4}", p) and 1 <= int(p) <= 4096 for p in parts):
        return tuple(int(part) for part in parts)
    said = f"{value!r} is not a list of numbers from 1 to 4096: 1,8,32"
    raise click.BadParameter(said)


def _lengths(value: str) -> tuple[int, int]:
    """``MIN-MAX``: frames, from 1."""
    match = re.fullmatch(r"(\d{1,7})-(\d{1,7})", value)
    if match and 1 <= int(match[1]) <= int(match[2]) <= _MOST_FRAMES:
        return int(match[1]), int(match[2])
    raise click.BadParameter(f"{value!r} is not MIN-MAX in frames, such as 100-400")


@click.command(
    epilog="Example: pplex bench --random medium --batch-size 1,8 --json before.json"
)
@model_options
@compute_options
@click.option(
    "--random",
    type=OneOf(["tiny", "medium", "7b"]),
    help="Instead of --model, make one of this size with random weights, in memory.",
)
@click.option(
    "--bits",
    type=OneOf(["4", "8", "16"]),
    help="How the weights of --random are stored.  [default: 4]",
)
@click.option(
    "--batch-size",
    "batch_sizes",
    type=_batch_sizes,
    metavar="N[,N...]",
    default="1",
    show_default=True,
    help="How many recordings at a time; several sizes are measured in turn.",
)
@click.option(
    "--frames",
    type=WholeRange(1, _MOST_FRAMES),
    default=250,
    show_default=True,
    help="How long each recording is, in frames of 80 ms.",
)
@click.option(
    "--lengths",
    type=_lengths,
    metavar="MIN-MAX",
    help="Recordings of mixed lengths instead, three for each of the batch.",
)
@click.option(
    "--live",
    "live_s",
    type=WholeRange(0, 3600),
    metavar="SECONDS",
    default=0,
    help="Answer so much more as it comes, in real time: its delay.",
)
@click.option(
    "--submit",
    metavar="FILE",
    type=FILE,
    help="Measure all that is asked of a machine nobody has measured, in a quarter of "
    "an hour and without a download: JSON to attach to an issue, nothing personal.",
)
@click.option("--json", "json_file", metavar="FILE", type=FILE, help="Write JSON too.")
@click.option(
    "--plot",
    metavar="FILE",
    type=FILE,
    help="Draw each frame's time over the recording: .png, .svg or .pdf.",
)
@click.option(
    "--compare",
    metavar="FILE",
    type=FILE,
    help="The JSON of an earlier run: print what changed.",
)
@overwrite_option
@verbosity_options
@click.pass_context
def bench(
    ctx: click.Context,
    model_name: str,
    random: str | None,
    bits: str | None,
    json_file: Path | None,
    plot: Path | None,
    compare: Path | None,
    submit: Path | None,
    overwrite: bool,
    verbosity: int,
    **options: Any,
) -> None:
    """Measure how fast a model answers on this machine.

    Runs the whole loop as respond and batch do, codec included, then each part by
    itself, and compares the bytes that a frame must move with what this machine can
    copy. Nothing is read but the model, and nothing else should run meanwhile.
    """
    _check_usage(ctx)
    if submit is not None:
        _measure_all(submit, overwrite, verbosity)
        return
    from dataclasses import asdict

    from pplex.bench.compare import changes, differences, read_bench
    from pplex.bench.plot import plot_frames
    from pplex.bench.run import SCHEMA, Plan
    from pplex.bench.run import bench as measure
    from pplex.plots import check_plot

    before = None if compare is None else read_bench(compare, SCHEMA)
    check_plot(plot, overwrite)
    if json_file is not None and json_file != PIPE:
        check_new(json_file, overwrite)
    plan = Plan(model_name=model_name, random=random, bits=int(bits or 4), **options)
    found = measure(plan, lambda said: _note(said, verbosity))
    text = json.dumps(asdict(found), indent=1)
    if json_file == PIPE:
        click.echo(text)
    elif json_file is not None:
        write_text(json_file, text + "\n")
    if plot is not None:
        runs = {
            f"{run.batch_size} at a time": run.frame_ms_series or []
            for run in found.runs
        }
        plot_frames(plot, f"{found.model} on {found.device}", runs, found.frame_rate)
    if json_file != PIPE:
        _report(found)
        if before is not None:
            content = json.loads(text)
            _report_changes(differences(before, content), changes(before, content))


def _check_usage(ctx: click.Context) -> None:
    """Refuse options that do not go together."""
    given = ctx.params

    def is_given(name: str) -> bool:
        source = ctx.get_parameter_source(name)
        return source is click.core.ParameterSource.COMMANDLINE

    if is_given("submit") and any(
        is_given(name) for name in ctx.params if name not in ("submit", *_BESIDE)
    ):
        raise click.UsageError("--submit measures what it measures: no other options")
    is_random = given["random"] is not None
    if not is_random and given["bits"] is not None:
        raise click.UsageError("--bits is for --random: a model's bits are its own")
    if is_random and is_given("model_name"):
        raise click.UsageError("--random and --model exclude each other")
    if given["lengths"] and (is_given("frames") or given["plot"] is not None):
        raise click.UsageError(
            "--lengths excludes --frames and --plot: rows change hands meanwhile"
        )


def _note(said: str, verbosity: int) -> None:
    if verbosity >= 0:
        click.echo(said, err=True)


def _report(found: Bench) -> None:
    """Print what was measured: in words, then a column a batch size."""
    for run in found.runs:
        click.echo(_in_words(run, found.frame_rate))
    click.echo()
    bits = " and ".join(str(b) for b in found.bits)
    click.echo(
        f"{found.model}, {bits} bits, {found.compute} in {found.dtype} by the engine "
        f"{found.engine}\non {found.device}; pplex {found.pplex}, MLX {found.mlx}"
    )
    click.echo(
        f"ready in {found.load_s:.2f} s; voice and role ({found.prompt_frames} frames) "
        f"in {found.prefill_s:.2f} s; copies at {found.copy_bandwidth_gb_s:.0f} GB/s"
    )
    rows = [["", *(f"batch {run.batch_size}" for run in found.runs)]]
    for name, path in _ROWS:
        cells = [_cell(run, path) for run in found.runs]
        if any(cells):
            rows.append([name, *(cell or "-" for cell in cells)])
    echo_table(rows, right=range(1, len(rows[0])))
    if found.live_ms is not None:
        live = found.live_ms
        click.echo(
            f"Live: sound {_number(live.p50)} ms after a frame's end, p95 "
            f"{_number(live.p95)}, most {_number(live.max)}; {live.late_frames} frames "
            "were late."
        )
    if found.peak_process_gb is not None and not found.device.startswith("cpu"):
        click.echo(f"The process held at most {_size(found.peak_process_gb)}.")
    click.echo(f"Left out: warming up with {found.warm_up_frames} frames.")
    if found.lengths is None:
        click.echo(
            "A mean frame is split as the loop saw it; the parts alone were run apart\n"
            "and waited for."
        )


def _in_words(run: Run, frame_rate: float) -> str:
    """How fast a batch size is, and whether a live stream would be kept up with."""
    words = f"{run.batch_size} at a time: {significant(run.audio_s_per_s)} s of audio "
    words += "a second"
    if run.batch_size > 1 or run.late_percent is None:
        return words
    late = f"{percent(run.late_percent / 100)} of frames" if run.late_percent else ""
    keeps = run.late_percent <= _MOST_LATE_PERCENT
    return (
        f"{words}; live: {'keeps up' if keeps else 'does not keep up'}, "
        f"{late or 'no frame'} over {1000 / frame_rate:.0f} ms"
    )


def _number(value: float | None) -> str:
    return "" if value is None else significant(value)


def _size(value_gb: float) -> str:
    return size(1e9 * value_gb)


def _cell(run: Run, path: str) -> str:
    """A figure of a batch size, by where it lies; empty where it has none."""
    value: Any = run
    for name in path.split("."):
        value = getattr(value, name, None)
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    if path.startswith("moved_mb."):
        return size(1e6 * value)
    return _size(value) if path.endswith("_gb") else significant(value)


_ROWS = (
    ("seconds of audio a second", "audio_s_per_s"),
    ("real-time factor", "real_time_factor"),
    ("% of frames over 80 ms", "late_percent"),
    ("ms a frame, p50", "frame_ms.p50"),
    ("  p95", "frame_ms.p95"),
    ("  p99", "frame_ms.p99"),
    ("  mean", "frame_ms.mean"),
    ("    encode", "loop_ms.encode"),
    ("    step", "loop_ms.step"),
    ("    decode", "loop_ms.decode"),
    ("    rest", "loop_ms.rest"),
    ("ms alone: encode", "parts_ms.encode"),
    ("    decode", "parts_ms.decode"),
    ("peak memory", "peak_memory_gb"),
    ("a frame must move", "moved_mb.total"),
    ("    weights", "moved_mb.weights"),
    ("    keys and values", "moved_mb.kv"),
    ("    codec", "moved_mb.codec"),
    ("GB/s reached", "moved_gb_s"),
    ("% of copies", "bandwidth_percent"),
    ("recordings", "recordings"),
    ("frames", "frames"),
)


def _measure_all(path: Path, overwrite: bool, verbosity: int) -> None:
    """Write what a maintainer needs of this machine, and print a line for each case."""
    from dataclasses import asdict

    from pplex.bench.submit import submission

    if path != PIPE:
        check_new(path, overwrite)
    found = submission(lambda said: _note(said, verbosity))
    text = json.dumps(asdict(found), indent=1) + "\n"
    if path == PIPE:
        click.echo(text, nl=False)
        return
    write_text(path, text)
    _report_cases(found)


def _report_cases(found: Submission) -> None:
    """Print a line for each case that was measured."""
    rows = [["model", "bits", "rows", "ops, MB", "ms a frame", "live p95", "peak"]]
    faults = []
    for case in found.cases:
        cells = [case.model, str(case.bits), str(case.rows)]
        cells.append(", ".join(case.variables.values()))
        if case.frame_ms is None or case.peak_memory_gb is None:
            faults.append(f"{' '.join(cells[:3])}: {case.fault}")
            continue
        cells.append(_number(case.frame_ms.mean))
        cells.append("" if case.live_ms is None else _number(case.live_ms.p95))
        rows.append([*cells, _size(case.peak_memory_gb)])
    echo_table(rows, right=(1, 2, 3, 4, 5, 6))
    for said in (*faults, *found.notes):
        click.echo(said)


def _report_changes(different: list[str], found: list[Change]) -> None:
    """Print what changed since an earlier run."""
    click.echo()
    for line in different:
        click.echo(f"not the same: {line}")
    if not found:
        click.echo("the earlier run has no batch size of this one")
        return
    rows = [["", "unit", "then", "now", "change", "verdict"]]
    rows += [
        [
            f"batch {one.batch_size}, {one.figure}",
            "" if one.unit == "GB" else one.unit,
            *map(_size if one.unit == "GB" else _number, (one.before, one.now)),
            f"{one.ratio - 1:+.0%}",
            _changed(one),
        ]
        for one in found
    ]
    echo_table(rows, right=(2, 3, 4))
    click.echo(
        f"\nTwo runs of the same differ by {_SAME:.0%} and more where the machine does "
        "other things\nmeanwhile."
    )


def _changed(one: Change) -> str:
    """What a change means, unless it is one that comes and goes by itself."""
    if not abs(one.ratio - 1) > _SAME:
        return "about the same"
    is_more = one.ratio > 1
    if one.unit == "GB":
        return "more" if is_more else "less"
    return "faster" if is_more == (one.unit == "s/s") else "slower"
