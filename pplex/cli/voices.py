"""``pplex voices``: the voices of a model."""

from __future__ import annotations

import click

from pplex.cli.options import model_options


@click.group()
def voices() -> None:
    """Voices that a model can speak with."""


@voices.command("list", epilog="Example: pplex voices list --model mini")
@model_options
def list_voices(model_name: str, offline: bool) -> None:
    """Print the names of the model's voices, one a line."""
    from pplex.checkpoint.hub import resolve
    from pplex.checkpoint.voices import find_voices

    local = resolve(model_name, offline=offline)
    for name in find_voices(local.path):
        click.echo(name)
