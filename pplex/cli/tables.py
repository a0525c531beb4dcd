"""Tables, JSON, and what may hold names that are not text, as they are printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click


def printable(text: str) -> str:
    """A text as a terminal takes it: a file name may hold bytes that are none."""
    return text.encode("utf-8", "backslashreplace").decode()


def echo_table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Print rows of cells, the first a heading; columns in ``right`` to the right."""
    columns = range(len(rows[0]))
    widths = [max(len(row[i]) for row in rows) for i in columns]
    for row in rows:
        cells = [
            row[i].rjust(widths[i]) if i in right else row[i].ljust(widths[i])
            for i in columns
        ]
        click.echo("  ".join(cells).rstrip())


def echo_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))
