"""``pplex talk``: two agents."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pplex.cli.foresee import foresee
from pplex.cli.options import (
    FILE,
    FiniteRange,
    batch_size_option,
    compute_options,
    model_options,
    overwrite_option,
    sampling_from,
    sampling_options,
    verbosity_options,
)
from pplex.cli.progress import Progress
from pplex.cli.transcripts import formats_option
from pplex.files import is_descriptor
from pplex.respond.request import MOST_TALK_S, Outputs, transcript_beside
from pplex.units import counted

if TYPE_CHECKING:
    from pplex.respond.talk import Talk, Talked

_SIDE = "KEY=VALUE,..."


@click.command(
    epilog="Example: pplex talk -o talk.wav --model mini --first-words Hello!"
)
@click.option(
    "--left",
    metavar=_SIDE,
    default="",
    help="The agent on the left channel: voice, prompt or role, model, first-words, "
    "script.",
)
@click.option(
    "--right", metavar=_SIDE, default="", help="The agent on the right channel."
)
@click.option(
    "--seconds",
    metavar="S",
    type=FiniteRange(0.0, MOST_TALK_S, min_open=True),
    default=60.0,
    show_default=True,
    help="How long they talk.",
)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=FILE,
    required=True,
    help="The file to write, as that of respond; with --jobs a folder.",
)
@click.option(
    "--jobs",
    metavar="FILE",
    type=FILE,
    help="Many talks, from a .jsonl or .csv file with output and, where wanted, left, "
    "right, seconds and seed.",
)
@click.option(
    "--first-words",
    metavar="TEXT",
    help="Make the left agent speak first, and say this.",
)
@formats_option("Write what both said, with times, beside OUT")
@click.option("--tokens", is_flag=True, help="Write the token arrays beside OUT, .npz.")
@model_options
@sampling_options
@compute_options
@batch_size_option("pairs talk")
@overwrite_option
@verbosity_options
def talk(
    left: str,
    right: str,
    first_words: str | None,
    model_name: str,
    offline: bool,
    overwrite: bool,
    verbosity: int,
    **options: Any,
) -> None:
    """Let two agents talk: each hears what the other says, as it is said.

    Both sides are written to a stereo file, left and right.
    """
    from pplex.respond import talk as talking

    sides = [
        talking.parse_side(text, option)
        for option, text in (("--left", left), ("--right", right))
    ]
    if first_words is not None:
        if "first-words" in sides[0]:
            raise click.UsageError("--left has first-words: leave --first-words out")
        sides[0]["first-words"] = first_words
    models = [side.pop("model", model_name) for side in sides]
    if not offline:
        for name in dict.fromkeys(models):
            foresee(name, options["kv_bits"], quiet=verbosity < 0)
    talks = _talks(sides, options)
    config = talking.Config(
        model_names=(models[0], models[1]),
        offline=offline,
        overwrite=overwrite,
        compute=options["compute"],
        kv_bits=options["kv_bits"],
        batch_size=options["batch_size"],
        folder=None if options["jobs"] is None else options["output"],
    )
    start = time.perf_counter()
    done = []
    with closing(Progress(verbosity, channel_chosen=True)) as progress:
        for talked in talking.talk(talks, config, progress):
            done.append(talked)
            if len(talks) > 1:
                progress.say(_summary(talked), 1)
    if verbosity >= 0:
        if num_before := len(talks) - len(done):
            click.echo(f"{num_before} done before", err=True)
        for line in _lines(done, time.perf_counter() - start) if done else ():
            click.echo(line, err=True)


def _talks(sides: list[dict[str, str]], options: dict[str, Any]) -> list[Talk]:
    """What the command line, or a jobs file, asks for."""
    from pplex.respond import talk as talking

    sampling, seed, seconds = (
        sampling_from(options),
        options["seed"],
        options["seconds"],
    )

    def outputs(audio: Path) -> Outputs:
        return Outputs(
            audio,
            "stereo",
            tuple(transcript_beside(audio, form) for form in options["transcripts"]),
            tokens=audio.with_suffix(".npz") if options["tokens"] else None,
        )

    if options["jobs"] is not None:
        return talking.read_talks(
            options["jobs"],
            options["output"],
            (sides[0], sides[1]),
            seconds,
            sampling,
            seed,
            outputs,
        )
    follow = options["transcripts"] or options["tokens"]
    if follow and is_descriptor(options["output"]):
        raise click.UsageError(
            "a stream has no name that --transcript and --tokens could follow: give -o "
            "a file"
        )
    left, right = (
        talking.settings_of(side, sampling, talking.side_seed(seed, idx), f"--{name}")
        for idx, (name, side) in enumerate(zip(talking.SIDES, sides, strict=True))
    )
    return [talking.Talk((left, right), seconds, outputs(options["output"]))]


def _summary(talked: Talked) -> str:
    sides = ", ".join(
        f"{name} {settings.voice or 'its own voice'} {counted(len(words), 'word')}"
        for name, settings, words in zip(
            ("left", "right"), talked.talk.sides, talked.words, strict=True
        )
    )
    seed = talked.talk.sides[0].seed
    files = ", ".join(map(str, talked.talk.outputs.files().values()))
    return f"{files}: {talked.audio_s:.1f} s, {sides}, seed {seed}"


def _lines(done: list[Talked], took_s: float) -> list[str]:
    """What was written and how long it took."""
    audio_s = sum(talked.audio_s for talked in done)
    what = (
        [_summary(done[0])]
        if len(done) == 1
        else [f"{len(done)} talks, {audio_s:.1f} s"]
    )
    return [
        *what,
        f"{took_s:.1f} s in all, loading included; {audio_s / took_s:.1f} s of "
        "audio a second",
    ]
