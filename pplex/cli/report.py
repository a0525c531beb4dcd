"""``pplex report``: a page to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from pplex.cli.options import (
    FILE,
    diarization_from,
    diarization_options,
    overwrite_option,
    vad_option,
)
from pplex.units import counted

if TYPE_CHECKING:
    from pplex.evaluation.report import Entry


@click.command(epilog="Example: pplex report replies/ -o report.html")
@click.argument("paths", nargs=-1, required=True, type=FILE)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=FILE,
    help="The page to write.  [default: report.html, in the folder if it is one]",
)
@click.option(
    "--png",
    metavar="DIR",
    type=FILE,
    help="Also write a picture of each recording into DIR.",
)
@click.option(
    "--svg",
    metavar="DIR",
    type=FILE,
    help="The same as SVG, which a slide or a paper can scale.",
)
@click.option(
    "--embed",
    is_flag=True,
    help="Put the sound into the page, so that it can be sent to someone.",
)
@vad_option("energy")
@diarization_options
@overwrite_option
def report(
    paths: tuple[Path, ...],
    output: Path | None,
    png: Path | None,
    svg: Path | None,
    embed: bool,
    vad: str,
    rttm: tuple[Path, ...],
    speaker: str | None,
    overwrite: bool,
) -> None:
    """Write one HTML page about PATHS: a batch's folder, or WAV files.

    It needs no network and no other file; the sound is played from where it lies.
    Answers of several folders are shown beside each other, recording by recording.
    """
    from pplex.evaluation.find import find
    from pplex.evaluation.measure import Method, refuse_unreadable
    from pplex.evaluation.pictures import write_picture
    from pplex.evaluation.report import (
        check_embedded,
        make_entries,
        picture_names,
        write_report,
    )
    from pplex.files import Together, check_named, plan_files, put, put_new
    from pplex.plots import check_plot
    from pplex.respond.ending import advice

    method = Method(vad, diarization=diarization_from(rttm, speaker))
    drawn = {suffix: d for suffix, d in ((".png", png), (".svg", svg)) if d is not None}
    for suffix in drawn:
        check_plot(Path(f"NAME{suffix}"))
    if output is None:
        folder = paths[0] if len(paths) == 1 and paths[0].is_dir() else Path()
        output = folder / "report.html"
    check_named(output, (".html", ".htm"), overwrite, is_text=True)
    found = find(paths)
    if embed:
        check_embedded(found.items)
    names = picture_names(found.items)
    heard = [n for n, i in zip(names, found.items, strict=True) if i.agent is not None]
    pictures = [plan_files(d, heard, suffix, overwrite) for suffix, d in drawn.items()]
    with tqdm(total=len(found.items), disable=None, unit="file") as bar:
        entries = make_entries(found, method, lambda _: bar.update())
    refuse_unreadable([(entry.status, entry.error) for entry in entries])
    title = f"pplex report: {', '.join(path.name or str(path) for path in paths[:3])}"
    measured = [entry.measured for entry in entries if entry.measured is not None]
    advised = advice([one.ending for one in measured if one.ending is not None])
    notes = [*found.notes, *advised]
    with Together() as files:
        for name, entry in zip(names, entries, strict=True):
            for planned in pictures if entry.measured is not None else ():
                write_picture(planned[name], entry, place=files)
        write_report(output, entries, notes, vad, title, embed=embed, place=files)
        files.name(put if overwrite else put_new)
    _say(output, entries, notes)


def _say(output: Path, entries: Sequence[Entry], notes: Sequence[str]) -> None:
    not_done = sum(entry.status != "done" for entry in entries)
    said = f", {not_done} of them not done" if not_done else ""
    count = counted(len(entries), "recording")
    click.echo(f"{output}: {count}{said}", err=True)
    for line in notes:
        click.echo(line, err=True)
