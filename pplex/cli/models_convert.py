"""``pplex models convert`` and ``calibrate``: any checkpoint at the bits wanted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from pplex.cli.options import (
    FILE,
    NEW_MODEL,
    FiniteRange,
    OneOf,
    complete_model,
    complete_voice,
    offline_option,
    quiet_option,
    replies_option,
    study_options,
)
from pplex.cli.progress import QUIET, Lines
from pplex.units import size

if TYPE_CHECKING:
    from pplex.checkpoint.layouts import Matrix
    from pplex.checkpoint.source import Source
    from pplex.quantization.convert import Conversion
    from pplex.quantization.recipe import Recipe

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class SizeType(click.ParamType):
    """A number of bytes such as ``5.3GB``."""

    name = "SIZE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Turn the option's text into its value."""
        match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([KMG]?B?)", str(value).upper())
        unit = match[2] if match else None
        if match is None or unit not in _UNITS:
            self.fail(f"{value!r} is not a size such as 5.3GB or 700MB", param, ctx)
        return int(float(match[1]) * _UNITS[unit])


@click.command(
    epilog="Example: pplex models convert bf16 ./mixed --bits 4 --recipe mixed"
)
@click.argument("source", metavar="SRC", shell_complete=complete_model)
@click.argument("target", metavar="DST", type=NEW_MODEL)
@click.option(
    "--bits", type=OneOf(["3", "4", "8", "16"]), required=True, help="Bits a weight."
)
@click.option(
    "--group-size",
    type=OneOf(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="Weights that share a scale.",
)
@click.option(
    "--recipe",
    metavar="uniform|mixed|FILE",
    default="uniform",
    show_default=True,
    help="uniform: both transformers alike, tables and heads in 16 bits. mixed: more "
    "bits where they matter most. FILE: JSON, name patterns to bits.",
)
@click.option(
    "--max-size",
    type=SizeType(),
    help="The most that the language model may take, for mixed: such as 5.3GB.  "
    "[default: what uniform takes]",
)
@click.option(
    "--sensitivity",
    metavar="FILE",
    type=FILE,
    help="What `pplex models sensitivity` measured, for mixed.",
)
@click.option(
    "--refine",
    is_flag=True,
    help="Fit scales by least squares: smaller errors, a slower conversion.",
)
@click.option(
    "--calibration",
    metavar="DIR",
    type=FILE,
    help="Round by what matrices are multiplied with, as `pplex models calibrate` kept "
    "it: the smallest loss, a conversion of minutes (mini) to hours (7B).",
)
@click.option(
    "--distill",
    metavar="ROUNDS",
    type=FiniteRange(min=0.0),
    default=0.0,
    show_default=True,
    help="Then learn codes and scales together, so often over the calibration: needs "
    "memory for the gradients of the whole model.",
)
@click.option(
    "--measure",
    metavar="FILE",
    multiple=True,
    type=FILE,
    help="Answer this recording with SRC, force both through it, and put into the card "
    "how far DST's choices are from SRC's; again for more.",
)
@replies_option("Put into the card how many replies")
@offline_option
@quiet_option
def convert(
    source: str, target: Path, offline: bool, quiet: bool, **options: Any
) -> None:
    """Write the model SRC, in any layout, as the new folder DST; print its path.

    DST has the three files of the MLX conversions, codec, tokenizer, voices, a card
    README.md on how it was made, and SHA256SUMS. Matrices are converted one at a
    time: a few hundred MB of memory are enough for any model, and with --calibration
    what a layer takes.
    """
    made = _conversion(options)
    from pplex.checkpoint.hub import resolve
    from pplex.quantization.convert import convert as run

    local = resolve(source, offline=offline, progress=not quiet)
    Lines(QUIET if quiet else 0).ignoring(local)
    with tqdm(unit="B", unit_scale=True, disable=quiet or None, leave=False) as bar:
        done = run(local, target, made, bar.reset, bar.update)
    click.echo(done.folder)
    if not quiet:
        click.echo(
            f"language model {size(done.source_lm_bytes)} -> {size(done.lm_bytes)}",
            err=True,
        )


def _conversion(options: dict[str, Any]) -> Conversion:
    """What the options ask for."""
    from pplex.checkpoint.layouts import Quantization
    from pplex.quantization.convert import Conversion
    from pplex.quantization.costs import mixed_recipe, read_costs
    from pplex.quantization.recipe import from_file, uniform

    recipe, max_size = options["recipe"], options["max_size"]
    costs_file, refine = options["sensitivity"], options["refine"]
    calibration, distill = options["calibration"], options["distill"]
    if recipe != "mixed" and (max_size is not None or costs_file is not None):
        raise click.UsageError("--max-size and --sensitivity are for --recipe mixed")
    if distill and calibration is None:
        raise click.UsageError("--distill learns from a --calibration")
    bits, group_size = int(options["bits"]), int(options["group_size"])
    form = None if bits == 16 else Quantization(bits, group_size)
    words = ["pplex models convert SRC DST --bits", str(bits)]
    if form is not None:
        words += ["--group-size", str(group_size)]
    words += ["--recipe", shlex.quote(recipe)]
    words += ["--max-size", str(max_size)] if max_size is not None else []
    words += ["--sensitivity", shlex.quote(str(costs_file))] if costs_file else []
    words += ["--refine"] if refine else []
    words += ["--calibration", shlex.quote(str(calibration))] if calibration else []
    words += ["--distill", f"{distill:g}"] if distill else []
    costs = read_costs(costs_file)

    def make_recipe(source: Source, matrices: list[Matrix]) -> Recipe:
        if recipe == "uniform":
            return uniform(matrices, form)
        if recipe == "mixed":
            return mixed_recipe(source.config, matrices, form, max_size, costs)
        return from_file(Path(recipe), matrices, form)

    name = recipe if recipe in ("uniform", "mixed") else Path(recipe).name
    measured, replies = options["measure"], options["replies"]
    made_by = " ".join(words)
    return Conversion(
        make_recipe, name, made_by, refine, calibration, distill, measured, replies
    )


@click.command(epilog="Example: pplex models calibrate mini calls/*.wav -o kept")
@click.argument("model", shell_complete=complete_model)
@click.argument("recordings", nargs=-1, required=True, type=FILE)
@click.option(
    "-o",
    "--output",
    "target",
    metavar="DIR",
    required=True,
    type=FILE,
    help="The new folder for the tokens.",
)
@click.option(
    "--voice",
    "voices",
    metavar="NAME|FILE",
    multiple=True,
    shell_complete=complete_voice,
    help="A voice to draw from; again for more.  [default: all of the model]",
)
@click.option(
    "--prompt",
    "texts",
    metavar="TEXT",
    multiple=True,
    help="A role to draw from; again for more.  [default: the published ones]",
)
@click.option(
    "--minutes",
    type=FiniteRange(min=0.01),
    default=30.0,
    show_default=True,
    help="How much to answer; recordings are used again where they are shorter.",
)
@study_options
@quiet_option
def calibrate(
    model: str,
    recordings: tuple[Path, ...],
    target: Path,
    offline: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Let MODEL answer RECORDINGS, and keep the tokens for `convert --calibration`.

    MODEL should be the best there is, before any conversion. Each answer has a voice,
    a role and a seed of its own. DIR has tokens.safetensors, and calibration.json on
    what was asked; no sound is kept. Prints DIR.
    """
    from pplex.checkpoint.hub import resolve
    from pplex.quantization.calibration import Settings
    from pplex.quantization.calibration import calibrate as run

    local = resolve(model, offline=offline, progress=not quiet)
    settings = Settings(**options)
    with tqdm(
        total=60 * settings.minutes, unit="s", disable=quiet or None, leave=False
    ) as bar:
        for more in run(local, recordings, target, settings):
            bar.update(more)
    click.echo(target)
