"""Tables and JSON, as they are printed."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any

import click

from pplex.errors import visible

_WIDTH = 80


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows of cells as lines, the first a heading; columns in ``right`` to the right.

    What 80 columns do not hold goes on in a block below, with the first column again;
    columns that hold nothing are left out.
    """
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    blocks: list[list[int]] = [[0]]
    for idx, width in enumerate(widths[1:], 1):
        if len(rows) > 1 and all(row[idx] in ("", "-") for row in rows[1:]):
            continue
        taken = sum(widths[i] + 2 for i in blocks[-1])
        if taken + width > _WIDTH and len(blocks[-1]) > 1:
            blocks.append([0])
        blocks[-1].append(idx)
    return "\n".join(_block(rows, block, widths, right) for block in blocks)


def _block(
    rows: Sequence[Sequence[str]],
    columns: Sequence[int],
    widths: Sequence[int],
    right: Sequence[int],
) -> str:
    lines = []
    for row in rows:
        cells = [
            row[i].rjust(widths[i]) if i in right else row[i].ljust(widths[i])
            for i in columns
        ]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def wrapped(text: str) -> str:
    """A text in lines of 80 columns."""
    return textwrap.fill(text, _WIDTH, break_long_words=False)


def echo_table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Print a ``table``."""
    click.echo(table(rows, right), nl=False)


def echo_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))
