"""``pplex respond``: one recording."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pplex.cli.options import (
    conversation_options,
    model_options,
    role_text,
    settings_from,
    verbosity_options,
)
from pplex.cli.progress import Progress, size

if TYPE_CHECKING:
    from pplex.insight.stats import Stats

_FILE = click.Path(path_type=Path)


@click.command(
    epilog="Example: pplex respond call.wav -o reply.wav --model mini --role teacher"
)
@click.argument("input", type=_FILE)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=_FILE,
    required=True,
    help="The WAV file to write.",
)
@click.option(
    "--layout",
    type=click.Choice(["stereo", "agent", "separate"]),
    default="stereo",
    show_default=True,
    help="stereo: user left, agent right; agent: mono; separate: OUT becomes "
    "NAME.user.wav and NAME.agent.wav.",
)
@model_options
@conversation_options
@click.option(
    "--transcript",
    metavar="FILE",
    type=_FILE,
    help="Write what the agent said, with times: .json, .srt, .vtt or .txt.",
)
@click.option(
    "--stats",
    metavar="FILE",
    type=_FILE,
    help="Write timings and settings as JSON.",
)
@click.option(
    "--tokens",
    metavar="FILE",
    type=_FILE,
    help="Write the token arrays user, agent and text as .npz.",
)
@click.option("--overwrite", is_flag=True, help="Replace existing outputs.")
@verbosity_options
def respond(
    input: Path,
    output: Path,
    layout: Any,
    model_name: str,
    offline: bool,
    transcript: Path | None,
    stats: Path | None,
    tokens: Path | None,
    overwrite: bool,
    verbosity: int,
    **options: Any,
) -> None:
    """Let the agent answer the recording INPUT and write both sides to a WAV file.

    The agent hears the recording as it would a call, 80 ms at a time, and speaks when
    it sees fit; its track is as long as the recording and in time with it.
    """
    text = role_text(
        options.pop("prompt"), options.pop("prompt_file"), options.pop("role")
    )
    from pplex.backend import use_fast_blas

    use_fast_blas()
    from pplex.jobs import respond as job

    channel = options.pop("channel")
    run = job.Run(
        source=input,
        outputs=job.Outputs(output, layout, transcript, stats, tokens),
        settings=settings_from(text, channel or 1, options),
        model_name=model_name,
        offline=offline,
        overwrite=overwrite,
    )
    with Progress(verbosity, channel_chosen=channel is not None) as progress:
        done = job.respond(run, progress)
    if verbosity >= 0:
        click.echo(summary(done), err=True)


def summary(stats: Stats) -> str:
    """What a run wrote and how long it took, in two lines."""
    step = stats.step_ms
    return (
        f"{', '.join(stats.outputs.values())}: {stats.audio_s:.1f} s, "
        f"voice {stats.voice}, seed {stats.seed}\n"
        f"{stats.total_s:.1f} s in all, {stats.load_s:.1f} s of it loading; real-time "
        f"factor {stats.real_time_factor:.2f} without that; step p50 {step.p50:.1f} "
        f"ms, p95 {step.p95:.1f} ms; {size(stats.peak_memory_gb)}"
    )
