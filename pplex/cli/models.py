"""``pplex models``: the models known and those on disk."""

from __future__ import annotations

import click


@click.group()
def models() -> None:
    """Models that pplex can run."""


@models.command("list", epilog="Example: pplex models list")
def list_models() -> None:
    """Print what is known and what is on this machine's disk; never goes online."""
    from pplex.checkpoint.hub import list_models as entries

    rows = [("NAME", "ON DISK", "DOWNLOAD", "MEMORY", "WHAT")]
    for entry in entries():
        rows.append(
            (
                entry.name,
                _size(entry.size_bytes, entry.complete),
                _gb(entry.download_gb),
                _gb(entry.memory_gb),
                entry.description,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        cells = [cell.ljust(w) for cell, w in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[4]]).rstrip())


def _size(size_bytes: int | None, complete: bool) -> str:
    if size_bytes is None:
        return "-"
    return _gb(size_bytes / 1e9) + ("" if complete else " (incomplete)")


def _gb(size: float | None) -> str:
    return "-" if size is None else f"{size:.1f} GB"
