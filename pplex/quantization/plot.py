"""The divergence of each stream as bars."""

from __future__ import annotations

from pathlib import Path

from pplex.plots import BLUE, GREY, ORANGE, plain_numbers, plot, shortened
from pplex.quantization.compare_models import Comparison, ModelFigures
from pplex.units import Scale, significant, size


def plot_divergence(path: Path, found: Comparison) -> None:
    """One bar a stream: mean divergence in nats a frame, on a logarithmic scale.

    It begins below the smallest that is not 0; a stream with 0 has no bar.
    """
    names = [stream.stream for stream in found.streams]
    scale = Scale(stream.kl for stream in found.streams)
    values = [scale.scaled(stream.kl) for stream in found.streams]
    positive = [value for value in values if value > 0]
    with plot(path, max(7.5, 1.6 + 0.55 * len(names)), 4.2) as figure:
        axes = figure.add_subplot()
        axes.set_title(
            f"{_named(found.b)}, {found.frames} frames,\nagainst {_named(found.a)}"
        )
        axes.set_xlabel("stream")
        axes.set_ylabel(scale.heading("KL divergence", "nats a frame"))
        if positive:
            axes.set_yscale("log")
            axes.set_ylim(min(positive) / 3, max(positive) * 3)
            plain_numbers(axes)
        else:
            axes.set_ylim(0, 1)
            axes.set_yticks([0])
        axes.grid(visible=False, axis="x")
        colours = [BLUE if name == "text" else ORANGE for name in names]
        groups = [
            name if name == "text" else "agent's audio, by codebook" for name in names
        ]
        labels = [
            "_" if group in groups[:idx] else group for idx, group in enumerate(groups)
        ]
        ticks = [name.removeprefix("agent ") for name in names]
        heights = [value or axes.get_ylim()[0] for value in values]
        bars = axes.bar(ticks, heights, width=0.7, color=colours, label=labels)
        for bar, name in zip(bars, names, strict=True):
            bar.set_gid(name)
        shown = [significant(value, 2) for value in values]
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, shown, padding=2, bbox=box)
        mean = scale.scaled(found.mean_kl)
        label = f"mean of all, {significant(mean, 2)}"
        axes.axhline(mean, color=GREY, ls="--", lw=1, label=label)
        axes.margins(x=0.02)
        figure.legend(loc="outside lower center", ncols=3)


def _named(model: ModelFigures) -> str:
    return f"{shortened(model.name, 48)} ({size(model.lm_bytes)})"
