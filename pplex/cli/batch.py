"""``pplex batch``: many recordings."""

from __future__ import annotations

import re
import sys
from contextlib import closing, redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from pplex.cli.batch_report import (
    BatchProgress,
    failures_before,
    forecast_text,
    kept_lines,
    summary,
)
from pplex.cli.foresee import foresee
from pplex.cli.options import (
    FILE,
    FOLDER,
    batch_size_option,
    check_option,
    checks_from,
    compute_options,
    conversation_options,
    layout_option,
    model_options,
    role_text,
    settings_from,
    takes_option,
    verbosity_options,
)
from pplex.cli.tables import echo_json
from pplex.cli.transcripts import cue_from, formats_option, subtitle_options

if TYPE_CHECKING:
    from pplex.batch.forecast import Forecast
    from pplex.batch.prepare import Batch
    from pplex.batch.run import Summary

_SOME_FAILED = 3


def _shard(value: str) -> tuple[int, int]:
    """``K/N``: the K-th of N parts, counted from 1."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value)
    if match and 1 <= int(match[1]) <= int(match[2]):
        return int(match[1]), int(match[2])
    raise click.BadParameter(f"{value!r} is not K/N with K from 1 to N, such as 1/4")


def _ray_address(value: str) -> str:
    """An address of a Ray cluster; what is probably an input is refused."""
    if re.fullmatch(r"local|auto|ray://\S+|[^\s/]+:\d+", value):
        return value
    raise click.BadParameter(
        f"{value!r} is no address (auto, local, HOST:PORT or ray://HOST:PORT); "
        "for a local cluster write --ray=local"
    )


@click.command(epilog="Example: pplex batch calls -o replies --recursive --model mini")
@click.argument("inputs", nargs=-1, type=FILE)
@click.option(
    "-o",
    "--output",
    "outdir",
    metavar="OUTDIR",
    type=FOLDER,
    required=True,
    help="The folder for the results and manifest.jsonl.",
)
@click.option("--recursive", is_flag=True, help="Look in folders within folders.")
@click.option(
    "--glob",
    metavar="PATTERN",
    help="Take the files of a folder that fit, such as 'input.wav'.  [default: audio "
    "files by their suffix]",
)
@click.option(
    "--jobs",
    metavar="FILE",
    type=FILE,
    help="Recordings from a .jsonl or .csv file, with input and, where wanted, output, "
    "voice, prompt, role, seed and tail.",
)
@layout_option
@click.option(
    "--output-name",
    metavar="NAME.wav",
    help="Call every output so, in the folder of its recording within OUTDIR.",
)
@formats_option("Write what the agent said, with times, for each recording")
@subtitle_options
@click.option("--stats", is_flag=True, help="Write NAME.stats.json for each recording.")
@click.option("--tokens", is_flag=True, help="Write NAME.npz for each recording.")
@model_options
@conversation_options
@compute_options
@batch_size_option("recordings are answered")
@takes_option
@check_option
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace existing outputs, and answer again what is done.",
)
@click.option("--retry-failed", is_flag=True, help="Try again what failed before.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first failure.")
@click.option(
    "--shard",
    type=_shard,
    metavar="K/N",
    help="Do only the K-th of N parts, for job arrays.",
)
@click.option(
    "--ray",
    type=_ray_address,
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Spread the work over a Ray cluster: auto, HOST:PORT, ray://HOST:PORT, or "
    "local; needs pplex[ray].",
)
@click.option("--dry-run", is_flag=True, help="Check everything, and run no model.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object at the end: counts, seconds, speed, failures.",
)
@verbosity_options
def batch(dry_run: bool, as_json: bool, verbosity: int, **options: Any) -> None:
    """Answer many recordings with one load of the model, several at a time.

    INPUTS are files and folders; the tree under a folder is mirrored in OUTDIR. Run
    the same command again to go on where a run stopped: what is done is skipped.
    """
    if as_json and dry_run:
        raise click.UsageError("--json is about a run: leave --dry-run out")
    job = _batch_from(options)
    if not job.offline:
        foresee(job.model_name, job.kv_bits, quiet=verbosity < 0)
    with closing(BatchProgress(verbosity)) as progress:
        if dry_run:
            from pplex.batch.forecast import forecast

            found = forecast(job, progress.shows_bars)
            click.echo(forecast_text(found, verbosity > 0))
            bad = _bad_ones(found)
            code = _exit_code(found.todo + found.skipped, bad)
            code = 1 if found.problems() else code
        else:
            from pplex.batch.run import run_batch

            progress.waiting(job.model_name)
            try:
                with redirect_stdout(sys.stderr):  # Ray prints what it sees
                    done = run_batch(job, progress)
            except KeyboardInterrupt:
                progress.stopped()
                raise
            bad = _bad_ones(done)
            code = _exit_code(done.done + done.skipped, bad)
            code = code or int(done.checks_failed > 0)
            progress.close()
            _report(done, verbosity)
            if as_json:
                echo_json(_as_object(done))
    click.get_current_context().exit(code)


def _batch_from(options: dict[str, Any]) -> Batch:
    """The job that the command line describes."""
    _check_usage(options)
    text = role_text(options)
    from pplex.batch.plan import OutputOptions, Selection
    from pplex.batch.prepare import Batch

    def take(*names: str) -> dict[str, Any]:
        return {name: options.pop(name) for name in names}

    return Batch(
        selection=Selection(**take("inputs", "recursive", "glob", "jobs")),
        outputs=OutputOptions(
            name=options.pop("output_name"),
            cue=cue_from(
                options.pop("line_width"),
                options.pop("cue_lines"),
                options["transcripts"],
            ),
            takes=options.pop("takes") or 0,
            **take("layout", "transcripts", "stats", "tokens"),
        ),
        **take("outdir", "model_name", "offline", "batch_size", "overwrite"),
        **take("retry_failed", "fail_fast", "shard", "ray", "compute", "kv_bits"),
        settings=settings_from(text, options),
        check=checks_from(options["checks"]),
    )


def _check_usage(options: dict[str, Any]) -> None:
    """Refuse options that do not go together."""
    if bool(options["inputs"]) == (options["jobs"] is not None):
        raise click.UsageError("give either INPUTS or --jobs FILE")
    for name in ("recursive", "glob"):
        if options["jobs"] is not None and options[name]:
            raise click.UsageError(f"--{name} is for INPUTS, not for --jobs")
    name = options["output_name"]
    if name is not None and not re.fullmatch(r"[^/\0.][^/\0]*\.wav", name):
        raise click.UsageError("--output-name is a file name that ends in .wav")


def _bad_ones(found: Forecast | Summary) -> int:
    """How many were not answered, a folder that cannot be read being one."""
    return len(found.failed) + len(found.kept) + len(found.left_out.unreadable)


def _exit_code(good: int, bad: int) -> int:
    """0 all done, 3 some failed or were kept as they were, 1 none could be done."""
    if not bad:
        return 0
    return _SOME_FAILED if good else 1


def _as_object(done: Summary) -> dict[str, Any]:
    """What a batch did, for programs."""
    return {
        "done": done.done,
        "skipped": done.skipped,
        "failed": len(done.failed),
        "kept": len(done.kept),
        "not_run": done.not_run,
        "replaced": done.replaced,
        "checked": done.checked,
        "checks_failed": done.checks_failed,
        "audio_s": done.audio_s,
        "total_s": done.total_s,
        "load_s": done.load_s,
        "audio_s_per_s": done.audio_s / done.run_s if done.run_s > 0 else None,
        "batch_size": done.batch_size,
        "peak_memory_gb": done.peak_memory_gb,
        "failures": done.failed,
        "kept_recordings": asdict(done.kept),
    }


def _report(done: Summary, verbosity: int) -> None:
    """Say on stderr how it went; what was kept or left out even when quiet."""
    lines = [*done.left_out.sentences(), *kept_lines(done.kept, verbosity > 0)]
    if verbosity >= 0:
        lines = [*failures_before(done), *lines, summary(done)]
    for line in lines:
        click.echo(line, err=True)
