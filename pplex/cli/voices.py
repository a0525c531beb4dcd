"""``pplex voices``: the voices of a model."""

from __future__ import annotations

import click

from pplex.cli.options import model_options
from pplex.errors import PplexError


@click.group()
def voices() -> None:
    """List the voices that a model can speak with."""


@voices.command("list", epilog="Example: pplex voices list --model mini")
@model_options
def list_voices(model_name: str, offline: bool) -> None:
    """Print the names of a model's voices, one a line.

    Nothing is downloaded for this: the model must be on this machine.
    """
    from pplex.checkpoint.hub import list_models, resolve
    from pplex.checkpoint.voices import find_voices

    for entry in list_models():
        if entry.name == model_name and entry.repo and not entry.complete:
            raise PplexError(
                f"the model {model_name} is not on this machine; get it with "
                f"`pplex models pull {model_name}`"
            )
    local = resolve(model_name, offline=True)
    for name in find_voices(local.path):
        click.echo(name)
