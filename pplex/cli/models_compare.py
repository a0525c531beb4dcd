"""``pplex models compare`` and ``sensitivity``: what fewer bits cost."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from pplex.cli.options import (
    FILE,
    complete_model,
    complete_voice,
    json_option,
    kv_bits_option,
    overwrite_option,
    replies_option,
    study_options,
    together,
)
from pplex.cli.tables import echo_json, echo_table
from pplex.files import check_new
from pplex.units import Scale, percent, significant, size

if TYPE_CHECKING:
    from pplex.quantization.compare_models import Comparison, Settings


# What decides the conversation that is compared.
_conversation = together(
    click.option(
        "--voice",
        metavar="NAME|FILE",
        shell_complete=complete_voice,
        help="The agent's voice.",
    ),
    click.option(
        "--prompt",
        metavar="TEXT",
        help="The agent's role in words.  [default: the teacher's]",
    ),
    study_options,
)


@click.command(epilog="Example: pplex models compare bf16 4bit call.wav --plot kl.svg")
@click.argument("a", shell_complete=complete_model)
@click.argument("b", shell_complete=complete_model)
@click.argument("recordings", nargs=-1, type=FILE)
@_conversation
@replies_option("Count how many replies")
@kv_bits_option("Keep B's keys and values at 8 bits: A and B may be one model.")
@click.option("--plot", metavar="FILE", type=FILE, help="Draw bars: .png, .svg, .pdf.")
@overwrite_option
@json_option
def compare(
    a: str,
    b: str,
    recordings: tuple[Path, ...],
    offline: bool,
    replies: Path | None,
    kv_bits: int | None,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how far model B's choices lie from those of model A.

    A answers each of RECORDINGS once (silence, if none is given); then both models
    read the very same tokens, and at every frame what B would have said is compared
    with what A would have said. A verdict in words comes first.

    \b
    FIRST CHOICE  frames in which the likeliest token is the same
    DRAWN APART   frames whose sampled token differs even with the same luck
    KL            divergence of B from A, nats a frame
    PERPLEXITY    of A's own tokens, under A and under B

    Where recordings are longer than half a minute, first choices and KL follow for
    each half minute of the conversations.
    """
    from pplex.checkpoint.hub import resolve
    from pplex.plots import check_plot
    from pplex.quantization.compare_models import compare_models
    from pplex.quantization.plot import plot_divergence

    check_plot(plot, overwrite)
    first, second = (resolve(name, offline=offline) for name in (a, b))
    settings = _settings(options)
    found = compare_models(first, second, recordings, settings, kv_bits, replies)
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


# What a listener notices: a rule of thumb, held against right replies and word errors
# of the built-in model at 8 and 4 bits (`pplex help quantizing`). The least share of
# equal first choices in any stream, and the largest of tokens that are drawn apart.
_VERDICTS = (
    (1.0, 0.0, "no difference: the same choices everywhere"),
    (0.99, 0.01, "no difference you would notice"),
    (0.95, 0.05, "a small difference: another word or sound now and then"),
    (0.0, 1.0, "a difference you would hear: other answers; `pplex score` judges them"),
)


def _verdict(found: Comparison) -> str:
    text, *agent = found.streams
    sound = min(stream.top1 for stream in agent)
    same, apart = min(text.top1, sound), max(s.differ for s in found.streams)
    words = next(w for least, most, w in _VERDICTS if same >= least and apart <= most)
    return (
        f"{words}\n(same first choice: text {percent(text.top1)}, sound "
        f"{percent(sound)} at least; drawn apart {percent(apart)} at most)"
    )


def _echo(found: Comparison) -> None:
    click.echo(
        f"{_verdict(found)}\n\n{found.frames} frames of 80 ms, mean KL "
        f"{found.mean_kl:.2g} nats\n"
    )
    kl = Scale(stream.kl for stream in found.streams)
    shares = ("FIRST CHOICE", "DRAWN APART")
    titles = ("STREAM", *shares, kl.heading("KL", "nats"), "PERPLEXITY A", "B")
    rows = [
        (
            *(stream.stream, percent(stream.top1), percent(stream.differ)),
            kl.text(stream.kl),
            *(f"{stream.perplexity_a:.2f}", f"{stream.perplexity_b:.2f}"),
        )
        for stream in found.streams
    ]
    echo_table([titles, *rows], right=(1, 2, 3, 4, 5))
    click.echo()
    if len(found.depths) > 1:
        _echo_depths(found)
    if (replies := found.replies) is not None:
        right = f"A {replies.right_a}, B {replies.right_b} of {replies.asked}"
        click.echo(f"Right replies: {right}\n")
    titles = ("", "BITS", "SIZE", "READ A FRAME", "TIME A FRAME", "MODEL")
    rows = [
        (
            *(letter, ",".join(map(str, model.bits)), size(model.lm_bytes)),
            size(model.bytes_per_frame),
            *(f"{significant(model.ms_per_frame, 2)} ms", model.name),
        )
        for letter, model in (("A", found.a), ("B", found.b))
    ]
    echo_table([titles, *rows], right=(2, 3, 4))


def _echo_depths(found: Comparison) -> None:
    """Whether the difference grows with a conversation."""
    kl = Scale(depth.mean_kl for depth in found.depths)
    rows = [("FROM", "FRAMES", "TEXT", "SOUND", kl.heading("KL", "nats"))]
    for depth in found.depths:
        choices = percent(depth.text.top1), percent(depth.agent.top1)
        from_s, frames = f"{depth.start_s:.0f} s", str(depth.frames)
        rows.append((from_s, frames, *choices, kl.text(depth.mean_kl)))
    echo_table(rows, right=(0, 1, 2, 3, 4))
    click.echo()


@click.command(epilog="Example: pplex models sensitivity mini call.wav -o parts.json")
@click.argument("model", shell_complete=complete_model)
@click.argument("recordings", nargs=-1, type=FILE)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=FILE,
    required=True,
    help="The JSON file to write.",
)
@_conversation
@overwrite_option
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
    _echo_costs(costs)


def _echo_costs(costs: dict[str, float]) -> None:
    """Print parts, the dearest first, each with its share of the sum."""
    kl, whole = Scale(costs.values()), sum(costs.values()) or 1.0
    rows = [("PART", kl.heading("KL", "nats"), "SHARE", "SO FAR")]
    so_far, half = 0.0, 0
    for part, cost in sorted(costs.items(), key=lambda pair: -pair[1]):
        half += so_far < whole / 2
        so_far += cost
        shares = percent(cost / whole), percent(so_far / whole)
        rows.append((part, kl.text(cost), *shares))
    echo_table(rows, right=(1, 2, 3))
    click.echo(
        f"\nHalf of what 4 bits cost comes from {half} of {len(costs)} parts: "
        "--recipe\nmixed spends its bits there."
    )
