"""The ``pplex`` command and what all its commands share."""

from __future__ import annotations

import importlib.metadata
import logging

import click

from pplex.cli.models import models
from pplex.cli.respond import respond
from pplex.cli.voices import voices
from pplex.errors import PplexError


class Cli(click.Group):
    """A group that shows a ``PplexError`` as one line and exits with 1."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command line."""
        try:
            return super().invoke(ctx)
        except PplexError as e:
            raise click.ClickException(str(e)) from e


@click.group(
    cls=Cli,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Try it: pplex respond samples/teacher_sky.wav -o reply.wav --model mini",
)
@click.version_option(importlib.metadata.version("pplex"), prog_name="pplex")
def cli() -> None:
    """PersonaPlex on recordings: the user's side in, the agent's side out.

    Everything is computed on this machine. The network is used only to download a
    model, and never with --offline.
    """
    # The libraries below log what their exceptions say again.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


cli.add_command(respond)
cli.add_command(voices)
cli.add_command(models)
