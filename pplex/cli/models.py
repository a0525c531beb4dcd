"""``pplex models``: what is known and on disk; get, look at, check, make, compare."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import click

from pplex.cli.foresee import foresee
from pplex.cli.models_check import info, verify
from pplex.cli.models_compare import compare, sensitivity
from pplex.cli.models_convert import calibrate, convert
from pplex.cli.options import Group, complete_model, json_option
from pplex.cli.tables import echo_json, echo_table
from pplex.units import duration, size

if TYPE_CHECKING:
    from pplex.checkpoint.hub_cache import ModelEntry


@click.group(cls=Group)
def models() -> None:
    """Get, check, convert and compare models."""


for command in (info, verify, calibrate, convert, compare, sensitivity):
    models.add_command(command)


@models.command("pull", epilog="Example: pplex models pull 4bit")
@click.argument("model", shell_complete=complete_model)
@click.option("--revision", metavar="REV", help="A branch, tag or commit.")
def pull_model(model: str, revision: str | None) -> None:
    """Download MODEL if it is not on this machine yet; print where it lies.

    MODEL is 8bit, 4bit, bf16 or owner/name[@revision]. A download that was cut off
    goes on with the files that are not whole.
    """
    from pplex.checkpoint.hub import resolve
    from pplex.errors import PplexError

    try:
        foresee(model)
    except PplexError as e:  # it may be for another machine
        click.echo(f"warning: {e}", err=True)
    click.echo(resolve(model, offline=False, revision=revision).path)


@models.command("path", epilog="Example: pplex models path 8bit")
@click.argument("model", shell_complete=complete_model)
def path(model: str) -> None:
    """Print where MODEL lies on this machine; never goes online."""
    from pplex.checkpoint.hub import resolve

    click.echo(resolve(model, offline=True).path)


@models.command("remove", epilog="Example: pplex models remove bf16")
@click.argument("model", shell_complete=complete_model)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def remove(model: str, yes: bool) -> None:
    """Delete the downloaded MODEL, every revision of it, from this machine."""
    from pplex.checkpoint.hub import downloaded_repo
    from pplex.checkpoint.hub_cache import remove_from_cache

    repo = downloaded_repo(model)
    if not yes:
        click.confirm(f"Delete {model} from this machine?", abort=True, err=True)
    freed = remove_from_cache(repo)
    click.echo(f"{model} is removed, {size(freed)} are free again", err=True)


@models.command("list", epilog="Example: pplex models list")
@json_option
def list_models(as_json: bool) -> None:
    """Print the known models and those on this machine; never goes online.

    MEMORY is what a conversation takes here; FITS says whether this machine has it.
    A MINUTE is how long a minute of sound takes here, from a short measurement.
    """
    from pplex.checkpoint.hub import list_models as known
    from pplex.engine.device import available_gb

    memory_gb = available_gb()
    entries = [_here(entry) for entry in known()]
    if as_json:
        echo_json([_as_json(entry, memory_gb) for entry in entries])
        return
    rows = [
        (
            *("NAME", "DISK", "DOWNLOAD", "MEMORY", "FITS", "A MINUTE"),
            *("WHAT", "LICENCE OF THE WEIGHTS"),
        )
    ]
    for entry in entries:
        fits = _fits(entry, memory_gb)
        speed = "-" if fits is False else _speed(entry)
        rows.append(
            (
                entry.name,
                _size(entry.size_bytes, entry.complete),
                _gb(entry.download_gb),
                _gb(entry.memory_gb),
                "-" if fits is None else "yes" if fits else "no",
                speed,
                entry.description,
                entry.licence or "-",
            )
        )
    echo_table(rows)


def _here(entry: ModelEntry) -> ModelEntry:
    """With what a published model takes on the engine that this machine has."""
    from pplex.bench.estimate import published_need_gb

    need_gb = published_need_gb(entry.name)
    return replace(entry, memory_gb=need_gb) if need_gb else entry


def _speed(entry: ModelEntry) -> str:
    from pplex.bench.estimate import estimate_published

    factor = estimate_published(entry.name)
    return "-" if factor is None else duration(60 * factor)


def _fits(entry: ModelEntry, memory_gb: float | None) -> bool | None:
    if memory_gb is None or not entry.memory_gb:
        return None
    return entry.memory_gb <= memory_gb


def _as_json(entry: ModelEntry, memory_gb: float | None) -> dict[str, object]:
    path = None if entry.path is None else str(entry.path)
    return asdict(entry) | {"path": path, "fits": _fits(entry, memory_gb)}


def _size(size_bytes: int | None, complete: bool) -> str:
    if size_bytes is None:
        return "-"
    return size(size_bytes) + ("" if complete else " (part)")


def _gb(size_gb: float | None) -> str:
    return size(1e9 * size_gb) if size_gb else "-"
