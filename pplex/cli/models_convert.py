"""``pplex models convert``: any checkpoint to a folder at the bits that are wanted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from pplex.cli.options import OneOf, complete_model
from pplex.cli.progress import QUIET, Lines
from pplex.units import size

if TYPE_CHECKING:
    from pplex.quantization.convert import Conversion

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class SizeType(click.ParamType):
    """A number of bytes such as ``5.3GB``."""

    name = "SIZE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Turn the option's text into its value."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", str(value).upper())
        unit = match[2] if match else None
        if match is None or unit not in _UNITS:
            self.fail(f"{value!r} is not a size such as 5.3GB or 700MB", param, ctx)
        return int(float(match[1]) * _UNITS[unit])


@click.command(
    epilog="Example: pplex models convert bf16 ./mixed --bits 4 --recipe mixed"
)
@click.argument("source", metavar="SRC", shell_complete=complete_model)
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--bits", type=OneOf(["4", "8", "16"]), required=True, help="Bits a weight."
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
    type=click.Path(path_type=Path),
    help="What `pplex models sensitivity` measured, for mixed.",
)
@click.option(
    "--refine",
    is_flag=True,
    help="Fit scales by least squares: smaller errors, a slower conversion.",
)
@click.option("--offline", is_flag=True, help="Never use the network.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
def convert(
    source: str, target: Path, offline: bool, quiet: bool, **options: Any
) -> None:
    """Write the model SRC, in any layout, as the new folder DST; print its path.

    DST has the three files of the MLX conversions, codec, tokenizer, voices, a card
    README.md on how it was made, and SHA256SUMS. Matrices are converted one at a
    time: a few hundred MB of memory are enough for any model.
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
    if recipe != "mixed" and (max_size is not None or costs_file is not None):
        raise click.UsageError("--max-size and --sensitivity are for --recipe mixed")
    bits, group_size = int(options["bits"]), int(options["group_size"])
    form = None if bits == 16 else Quantization(bits, group_size)
    words = ["pplex models convert SRC DST --bits", str(bits)]
    if form is not None:
        words += ["--group-size", str(group_size)]
    words += ["--recipe", shlex.quote(recipe)]
    words += ["--max-size", str(max_size)] if max_size is not None else []
    words += ["--sensitivity", shlex.quote(str(costs_file))] if costs_file else []
    words += ["--refine"] if refine else []
    if recipe == "uniform":
        return Conversion(
            lambda _, matrices: uniform(matrices, form),
            "uniform",
            " ".join(words),
            refine,
        )
    if recipe == "mixed":
        costs = read_costs(costs_file)
        return Conversion(
            lambda source, m: mixed_recipe(source.config, m, form, max_size, costs),
            "mixed",
            " ".join(words),
            refine,
        )
    path = Path(recipe)
    return Conversion(
        lambda _, matrices: from_file(path, matrices, form),
        path.name,
        " ".join(words),
        refine,
    )
