"""``pplex results``: what a batch did with each recording, for people and scripts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from pplex.cli.options import FILE, OneOf
from pplex.cli.tables import echo_json, echo_table

_MOST_WORDS = 32  # characters of the last column


@click.command(epilog="Example: pplex results replies --format csv")
@click.argument("outdir", type=FILE)
@click.option(
    "--format",
    "form",
    type=OneOf(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="json has the lines of the manifest as they are; csv a column for each key.",
)
@click.option(
    "--status",
    type=OneOf(["done", "failed", "stopped"]),
    help="Only the recordings of which this is so.",
)
def results(outdir: Path, form: str, status: str | None) -> None:
    """List what pplex batch did with each recording of OUTDIR: its latest result."""
    import csv

    from pplex.respond.manifest import flat, latest_lines

    every = latest_lines(outdir, lambda message: click.echo(message, err=True))
    lines = [line for line in every if status in (None, line["status"])]
    if form == "json":
        echo_json(lines)
    elif form == "csv":
        keys = dict.fromkeys(key for line in every for key in flat(line))
        # No column for an object that some line lacks, whose parts have columns.
        columns = [k for k in keys if not any(key.startswith(f"{k}.") for key in keys)]
        out = csv.DictWriter(
            sys.stdout, columns, extrasaction="ignore", lineterminator="\n"
        )
        out.writeheader()
        out.writerows(flat(line) for line in lines)
    else:
        titles = ["recording", "status", "seconds", "words", "checks", "said, or error"]
        echo_table([titles, *map(_row, lines)], right=(2, 3))


def _row(line: dict[str, Any]) -> list[str]:
    from pplex.respond.manifest import passes

    passed = passes(line)
    seconds, words = line["audio_s"], line["words"]
    said = " ".join((line["error"] or line["text"] or "").split())
    return [
        line["recording"],
        line["status"],
        "" if seconds is None else f"{seconds:.1f}",
        "" if words is None else f"{words}",
        "" if passed is None else "pass" if passed else "FAIL",
        said if len(said) <= _MOST_WORDS else f"{said[: _MOST_WORDS - 3]}...",
    ]
