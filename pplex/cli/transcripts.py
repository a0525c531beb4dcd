"""Options of transcripts: formats, and the shape of subtitles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from pplex.cli.options import Command, WholeRange, together
from pplex.errors import did_you_mean
from pplex.files import is_descriptor
from pplex.respond.request import transcript_beside
from pplex.respond.transcript import FORMATS, SUBTITLES, CueShape


def formats(value: Any) -> tuple[str, ...]:
    """Formats with commas between them, or ``all``, in the order of ``FORMATS``."""
    if isinstance(value, tuple):
        return value
    asked = FORMATS if value == "all" else [one.strip() for one in value.split(",")]
    for one in asked:
        if one not in FORMATS:
            known = f"there are {', '.join(FORMATS)}, and all"
            text = f"{one!r} is no format of a transcript; {known}"
            raise click.BadParameter(text + did_you_mean(one, FORMATS))
    return tuple(form for form in FORMATS if form in asked)


def formats_option(what: str) -> Callable[[Command], Command]:
    """``--transcript`` where outputs are named by pplex; ``what`` begins its help."""
    return click.option(
        "--transcript",
        "transcripts",
        metavar="FORMATS",
        type=formats,
        default=(),
        help=f"{what}: json, srt, vtt, tsv, txt, several with commas between them, or "
        "all.",
    )


subtitle_options = together(
    click.option(
        "--line-width",
        metavar="N",
        type=WholeRange(1, 1000),
        help="Of subtitles: the most characters of a line.  [default: "
        f"{CueShape().width}]",
    ),
    click.option(
        "--cue-lines",
        metavar="N",
        type=WholeRange(1, 10),
        help=f"Of subtitles: the most lines of a cue.  [default: {CueShape().lines}]",
    ),
)


def cue_from(
    line_width: int | None, cue_lines: int | None, asked: Sequence[str]
) -> CueShape:
    """What ``subtitle_options`` parsed, for transcripts of these formats."""
    given = {"width": line_width, "lines": cue_lines}
    shape = {key: value for key, value in given.items() if value is not None}
    if shape and not set(asked) & set(SUBTITLES):
        raise click.UsageError(
            "--line-width and --cue-lines are for subtitles: give --transcript "
            + " or ".join(SUBTITLES)
        )
    return CueShape(**shape)


def transcript_paths(asked: Sequence[Path], output: Path) -> tuple[Path, ...]:
    """The files that are named, and for formats those beside the output."""
    paths: list[Path] = []
    for one in asked:
        names = str(one).split(",")
        if one.suffix or one.parent != Path() or not {*names} & {*FORMATS, "all"}:
            paths.append(one)
            continue
        if is_descriptor(output):
            raise click.UsageError(
                f"--transcript {one}: the output has no name that the transcript's "
                "could follow; give a file name"
            )
        paths += [transcript_beside(output, form) for form in formats(str(one))]
    return tuple(paths)
