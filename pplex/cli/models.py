"""``pplex models``: the models known, those on disk, and how one gets there."""

from __future__ import annotations

import click

from pplex.cli.options import complete_model
from pplex.cli.progress import size


@click.group()
def models() -> None:
    """List models, or download one."""


@models.command("pull", epilog="Example: pplex models pull 4bit")
@click.argument("model", shell_complete=complete_model)
def pull_model(model: str) -> None:
    """Download MODEL if it is not on this machine yet; print where it lies.

    MODEL is 8bit, 4bit, bf16 or owner/name[@revision]. A download that was cut off
    goes on where it stopped.
    """
    from pplex.checkpoint.hub import resolve

    click.echo(resolve(model, offline=False).path)


@models.command("list", epilog="Example: pplex models list")
def list_models() -> None:
    """Print the known models and those on this machine; never goes online."""
    from pplex.checkpoint.hub import list_models as entries

    rows = [("NAME", "DISK", "DOWNLOAD", "MEMORY", "WHAT")]
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
    return size(size_bytes / 1e9) + ("" if complete else " (part)")


def _gb(size_gb: float | None) -> str:
    return size(size_gb) if size_gb else "-"
