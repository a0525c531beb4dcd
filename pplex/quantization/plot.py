"""The divergence of each stream as bars."""

from __future__ import annotations

from pathlib import Path

from pplex.plots import BLUE, GREY, ORANGE, plain_numbers, plot, shortened
from pplex.quantization.compare_models import Comparison, ModelFigures

_LEAST = 1e-6  # nats; smaller is shown as this


def plot_divergence(path: Path, found: Comparison) -> None:
    """One bar a stream: mean divergence in nats a frame, on a logarithmic scale."""
    names = [stream.stream for stream in found.streams]
    values = [max(_LEAST, stream.kl) for stream in found.streams]
    with plot(path, max(7.5, 1.6 + 0.55 * len(names)), 4.2) as figure:
        axes = figure.add_subplot()
        axes.set_title(
            f"{_named(found.b)}, {found.frames} frames,\nagainst {_named(found.a)}"
        )
        axes.set_xlabel("stream")
        axes.set_ylabel("KL divergence (nats a frame)")
        axes.set_yscale("log")
        axes.grid(visible=False, axis="x")
        colours = [BLUE if name == "text" else ORANGE for name in names]
        groups = [
            name if name == "text" else "agent's audio, by codebook" for name in names
        ]
        labels = [
            "_" if group in groups[:idx] else group for idx, group in enumerate(groups)
        ]
        ticks = [name.removeprefix("agent ") for name in names]
        bars = axes.bar(ticks, values, width=0.7, color=colours, label=labels)
        for bar, name in zip(bars, names, strict=True):
            bar.set_gid(name)
        shown = [f"{stream.kl:.2g}" for stream in found.streams]
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(bars, shown, padding=2, bbox=box)
        mean = max(_LEAST, found.mean_kl)
        label = f"mean of all, {found.mean_kl:.3g}"
        axes.axhline(mean, color=GREY, ls="--", lw=1, label=label)
        axes.set_ylim(min(values) / 2, max(values) * 2)
        axes.margins(x=0.02)
        plain_numbers(axes)
        figure.legend(loc="outside lower center", ncols=3)


def _named(model: ModelFigures) -> str:
    return f"{shortened(model.name, 48)} ({model.lm_bytes / 1e9:.3g} GB)"
