"""The ``pplex`` command: its subcommands and the errors they have in common."""

from __future__ import annotations

import errno
import importlib.metadata
import logging
import platform
import sys
from pathlib import Path
from typing import Any

import click

from pplex.cli.batch import batch
from pplex.cli.bench import bench
from pplex.cli.check import check
from pplex.cli.doctor import doctor
from pplex.cli.help import help_
from pplex.cli.models import models
from pplex.cli.options import Group
from pplex.cli.report import report
from pplex.cli.respond import respond
from pplex.cli.results import results
from pplex.cli.roles import roles
from pplex.cli.score import score
from pplex.cli.standard import (
    CLOSED_PIPE,
    exit_code,
    explain,
    give_up_stdout,
    open_standard_streams,
    stop_on_signals,
)
from pplex.cli.talk import talk
from pplex.cli.voices import voices
from pplex.errors import PplexError


class _Cli(Group):
    """A group that shows a ``PplexError`` as one line and exits with 1."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program, whatever its standard streams are."""
        open_standard_streams()
        try:
            return super().main(*args, **kwargs)
        except OSError as e:  # of what click itself prints
            click.echo(f"Error: {explain(e)}", err=True)
            sys.exit(1)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse what is not text: it could be neither printed nor written as JSON."""
        for arg in args:
            if any("\ud800" <= character <= "\udfff" for character in arg):
                raise click.UsageError(
                    f"the argument {arg!r} is not UTF-8 text; rename such a file"
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command line."""
        try:
            with stop_on_signals() as ctx.obj:
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result
        except KeyboardInterrupt as e:
            ctx.exit(exit_code(e))
        except BrokenPipeError:
            give_up_stdout()
            ctx.exit(CLOSED_PIPE)
        except PplexError as e:
            raise click.ClickException(str(e)) from e
        except OSError as e:
            message = explain(e)
            if e.errno == errno.ENAMETOOLONG:
                # Before there is a file: Python's tests whether a name is there do so.
                message = f"the name {e.filename!r} is longer than names can be"
            raise click.ClickException(message) from e
        except MemoryError as e:
            raise click.ClickException("the memory does not suffice") from e
        except ImportError as e:
            if not _is_mlx(e):
                raise
            raise click.ClickException(_without_mlx(e)) from e


def _is_mlx(error: ImportError) -> bool:
    """Whether MLX, or the part of it that computes, is what could not be imported."""
    package = (error.name or "").partition(".")[0]
    return package == "mlx" or "mlx" in Path(error.path or "").parts


def _without_mlx(error: ImportError) -> str:
    if sys.platform == "linux":
        how = "install pplex[cpu], or pplex[cuda] for an NVIDIA GPU"
    elif platform.machine() != "arm64":
        how = "this Python is one for Intel; take one for Apple silicon (arm64)"
    else:
        how = "install pplex again"
    return f"MLX cannot be loaded ({error}): {how}"


@click.group(
    cls=_Cli,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: pplex respond call.wav -o reply.wav --model mini",
)
@click.version_option(importlib.metadata.version("pplex"), prog_name="pplex")
def cli() -> None:
    """PersonaPlex on recordings: the user's side in, the agent's side out.

    Everything is computed on this machine. The network is used only to download a
    model, and never with --offline.
    """
    # The libraries below log what their exceptions say again.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


for command in (respond, batch, talk, results, report, score, check):
    cli.add_command(command)
for command in (voices, roles, models, doctor, bench, help_):
    cli.add_command(command)
