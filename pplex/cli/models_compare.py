"""``pplex models compare`` and ``sensitivity``: what fewer bits cost."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from pplex.cli.options import FiniteRange, complete_model, complete_voice
from pplex.cli.progress import size
from pplex.cli.tables import echo_json, echo_table
from pplex.conversation.roles import DEFAULT_SEED
from pplex.files import check_new

if TYPE_CHECKING:
    from pplex.quantization.compare_models import Comparison, Settings

_FILE = click.Path(path_type=Path)


def _conversation(command: Any) -> Any:
    """Options that decide the conversation that is compared."""
    for option in (
        click.option("--offline", is_flag=True, help="Never use the network."),
        click.option(
            "--seconds",
            type=FiniteRange(min=0.2),
            default=60.0,
            show_default=True,
            help="How much of each recording to use.",
        ),
        click.option(
            "--seed",
            type=int,
            default=DEFAULT_SEED,
            show_default=True,
            help="For the random draws.",
        ),
        click.option(
            "--prompt",
            metavar="TEXT",
            help="The agent's role in words.  [default: the teacher's]",
        ),
        click.option(
            "--voice",
            metavar="NAME|FILE",
            shell_complete=complete_voice,
            help="The agent's voice.",
        ),
    ):
        command = option(command)
    return command


@click.command(epilog="Example: pplex models compare bf16 4bit call.wav --plot kl.svg")
@click.argument("a", shell_complete=complete_model)
@click.argument("b", shell_complete=complete_model)
@click.argument("recordings", nargs=-1, type=_FILE)
@_conversation
@click.option("--plot", metavar="FILE", type=_FILE, help="Draw bars: .png, .svg, .pdf.")
@click.option("--overwrite", is_flag=True, help="Replace existing outputs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(
    a: str,
    b: str,
    recordings: tuple[Path, ...],
    offline: bool,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how far model B's choices lie from those of model A.

    A answers each of RECORDINGS once (silence, if none is given); then both models
    read the very same tokens, and at every frame what B would have said is compared
    with what A would have said.

    \b
    KL      divergence of B from A, nats a frame
    TOP-1   frames in which the likeliest token is the same
    DIFFER  frames whose sampled token differs even with the same luck
    PPL     perplexity of A's own tokens under A and under B
    """
    from pplex.checkpoint.hub import resolve
    from pplex.plots import check_plot_path
    from pplex.quantization.compare_models import compare_models
    from pplex.quantization.plot import plot_divergence

    if plot is not None:
        check_plot_path(plot)
        check_new(plot, overwrite)
    first, second = (resolve(name, offline=offline) for name in (a, b))
    found = compare_models(first, second, recordings, _settings(options))
    if plot is not None:
        plot_divergence(plot, found)
    if as_json:
        echo_json(asdict(found))
    else:
        _echo(found)


def _settings(options: dict[str, Any]) -> Settings:
    from pplex.model.sampling import SamplingConfig
    from pplex.quantization.compare_models import Settings

    return Settings(
        voice=options["voice"],
        text=options["prompt"],
        seed=options["seed"],
        seconds=options["seconds"],
        sampling=SamplingConfig(),
    )


def _echo(found: Comparison) -> None:
    rows = [("", "MODEL", "BITS", "SIZE", "A FRAME READS", "MS A FRAME")]
    for letter, model in (("A", found.a), ("B", found.b)):
        rows.append(
            (
                letter,
                model.name,
                ",".join(str(bits) for bits in model.bits),
                size(model.lm_bytes / 1e9),
                size(model.bytes_per_frame / 1e9),
                f"{model.ms_per_frame:.1f}",
            )
        )
    echo_table(rows, right=(3, 4, 5))
    click.echo(f"\n{found.frames} frames, mean KL {found.mean_kl:.3g} nats\n")
    rows = [("STREAM", "KL", "TOP-1", "DIFFER", "PPL A", "PPL B")]
    for stream in found.streams:
        rows.append(
            (
                stream.stream,
                f"{stream.kl:.3g}",
                f"{stream.top1:.1%}",
                f"{stream.differ:.1%}",
                f"{stream.perplexity_a:.2f}",
                f"{stream.perplexity_b:.2f}",
            )
        )
    echo_table(rows, right=(1, 2, 3, 4, 5))


@click.command(epilog="Example: pplex models sensitivity mini call.wav -o parts.json")
@click.argument("model", shell_complete=complete_model)
@click.argument("recordings", nargs=-1, type=_FILE)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=_FILE,
    required=True,
    help="The JSON file to write.",
)
@_conversation
@click.option("--overwrite", is_flag=True, help="Replace existing outputs.")
def sensitivity(
    model: str,
    recordings: tuple[Path, ...],
    output: Path,
    offline: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Measure what each part of MODEL costs when it alone is rounded to 4 bits.

    MODEL must not be quantized yet. OUT is JSON: for each part the mean divergence
    from the model itself, in nats a frame. `pplex models convert --recipe mixed
    --sensitivity OUT` makes its choice from it.
    """
    from pplex.checkpoint.hub import resolve
    from pplex.quantization.sensitivity import measure, write_costs

    check_new(output, overwrite)
    local = resolve(model, offline=offline)
    costs = {}
    with tqdm(unit="part", disable=None, leave=False) as bar:
        for part, cost in measure(local, recordings, _settings(options)):
            costs[part] = cost
            bar.update()
    write_costs(output, local, costs)
    rows = [("PART", "KL")]
    rows += [(part, f"{cost:.3g}") for part, cost in costs.items()]
    echo_table(rows, right=(1,))
