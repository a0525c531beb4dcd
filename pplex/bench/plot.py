"""How long each frame of a recording took, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pplex.plots import LINES, RED, plain_numbers, plot, shortened, thinned


def plot_frames(
    path: Path, title: str, runs: Mapping[str, Sequence[float]], frame_rate: float
) -> None:
    """Draw the milliseconds of each frame over seconds of audio, a line a run.

    The scale is logarithmic, with a line at the milliseconds that a frame lasts.
    """
    with plot(path, 9, 4.5) as figure:
        axes = figure.add_subplot()
        axes.set_title(shortened(title))
        axes.set_xlabel("audio (s)")
        axes.set_ylabel("time a frame took (ms)")
        axes.set_yscale("log")
        for idx, (name, frame_ms) in enumerate(runs.items()):
            times, slowest = thinned(frame_ms)
            colour = LINES[idx % len(LINES)]
            width = 1.5 if len(times) < 300 else 0.8
            (line,) = axes.plot(
                times / frame_rate, slowest, color=colour, lw=width, label=name
            )
            line.set_gid(name)
        budget_ms = 1000.0 / frame_rate
        limit = f"{budget_ms:.0f} ms, a frame's length"
        axes.axhline(budget_ms, color=RED, ls="--", label=limit, gid="limit", zorder=3)
        axes.set_xlim(0, max(map(len, runs.values())) / frame_rate)
        values = np.maximum(np.concatenate(list(runs.values())), 1e-3)
        # The last frame of a run may have nothing left to wait for: it is cut off.
        low = min(float(np.percentile(values, 1)), budget_ms)
        axes.set_ylim(low / 1.5, max(float(values.max()), budget_ms) * 1.5)
        plain_numbers(axes)
        figure.legend(loc="outside lower center", ncols=min(4, len(runs) + 1))
