"""How long each frame of a recording took, as a picture: SVG or PNG.

Milliseconds on a logarithmic scale over seconds of audio, a line a run, and the 80 ms
that a frame lasts.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pplex.errors import PplexError
from pplex.evaluation.picture import draw_number, png_bytes
from pplex.files import atomic_write, write_text
from pplex.respond.stats import FRAME_BUDGET_MS

WIDTH, HEIGHT = 960, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 44, 40
_COLOURS = ("#2466c2", "#b4530a", "#1b6e3c", "#8a1c7c", "#5d6069", "#0b7285")
_LATE = "#b3261e"
_GRID = "#dcdde1"
_SUFFIXES = (".svg", ".png")


@dataclass(frozen=True)
class Line:
    """A run: its name, and milliseconds of each frame in order."""

    name: str
    frame_ms: Sequence[float]


def check_plot_path(path: Path) -> None:
    """Refuse a name that tells no format."""
    if path.suffix.lower() not in _SUFFIXES:
        raise PplexError(f"cannot write {path}: end its name in .svg or .png")


def write_plot(
    path: Path, title: str, lines: Sequence[Line], frame_rate: float
) -> None:
    """Write the picture; the suffix decides its format."""
    check_plot_path(path)
    if path.suffix.lower() == ".svg":
        write_text(path, svg(title, lines, frame_rate))
        return
    with atomic_write(path) as temporary:
        temporary.write_bytes(png_bytes(image(lines, frame_rate)))


class _Axes:
    """Where times and milliseconds lie; ``seconds`` is what the picture spans."""

    def __init__(self, lines: Sequence[Line], frame_rate: float) -> None:
        values = [max(ms, 1e-3) for line in lines for ms in line.frame_ms]
        # The last frame of a run may have nothing left to wait for: it is cut off.
        low = float(np.percentile(values, 1)) if values else 1.0
        high = max(values, default=1.0)
        self._low = math.log10(min(low, FRAME_BUDGET_MS) / 1.5)
        self._high = math.log10(max(high, FRAME_BUDGET_MS) * 1.5)
        self._frame_rate = frame_rate
        self.seconds = max(len(line.frame_ms) for line in lines) / frame_rate

    def x(self, seconds: float) -> float:
        """Pixels from the left."""
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * seconds / self.seconds

    def y(self, ms: float) -> float:
        """Pixels from the top."""
        at = min(max(math.log10(max(ms, 1e-6)), self._low), self._high)
        share = (at - self._low) / (self._high - self._low)
        return _TOP + (HEIGHT - _TOP - _BOTTOM) * (1 - share)

    def points(self, line: Line) -> list[tuple[float, float]]:
        """A point a frame; of long runs the slowest of each few frames."""
        size = -(-len(line.frame_ms) // (WIDTH - _LEFT - _RIGHT))
        starts = range(0, len(line.frame_ms), size)
        return [
            (self.x(i / self._frame_rate), self.y(max(line.frame_ms[i : i + size])))
            for i in starts
        ]

    def marks_ms(self) -> list[float]:
        """Round numbers of milliseconds within the picture."""
        powers = range(math.floor(self._low), math.ceil(self._high) + 1)
        marks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        return [m for m in marks if self._low <= math.log10(m) <= self._high]

    def marks_s(self) -> list[float]:
        """Round numbers of seconds, at most ten or so."""
        steps = (0.5, 1, 2, 5, 10, 30, 60, 300, 600, 3600, 36000)
        step = next((s for s in steps if self.seconds / s <= 12), steps[-1])
        return [k * step for k in range(int(self.seconds / step) + 1)]


def svg(title: str, lines: Sequence[Line], frame_rate: float) -> str:
    """The picture as SVG."""
    axes = _Axes(lines, frame_rate)
    late = axes.y(FRAME_BUDGET_MS)
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-size="14">{html.escape(title)}</text>',
    ]
    for mark in axes.marks_ms():
        at = axes.y(mark)
        parts.append(
            f'<line x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" '
            f'stroke="{_GRID}"/>'
            f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{mark:g}</text>'
        )
    for mark in axes.marks_s():
        parts.append(
            f'<text x="{axes.x(mark):.1f}" y="{bottom + 16}" '
            f'text-anchor="middle">{mark:g}</text>'
        )
    parts.append(
        f'<text x="{right}" y="{bottom + 32}" text-anchor="end">seconds of audio</text>'
        f'<text x="{_LEFT - 6}" y="{_TOP - 8}" text-anchor="end">ms</text>'
    )
    for idx, line in enumerate(lines):
        colour = _COLOURS[idx % len(_COLOURS)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in axes.points(line))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}"/>'
            f'<text x="{_LEFT + 130 * idx}" y="36" fill="{colour}">'
            f"{html.escape(line.name)}</text>"
        )
    parts.append(
        f'<line x1="{_LEFT}" x2="{right}" y1="{late:.1f}" y2="{late:.1f}" '
        f'stroke="{_LATE}" stroke-dasharray="6 4"/>'
        f'<text x="{right}" y="{late - 4:.1f}" text-anchor="end" fill="{_LATE}">'
        f"{FRAME_BUDGET_MS:.0f} ms, a frame</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def image(lines: Sequence[Line], frame_rate: float) -> np.ndarray:
    """The picture as uint8 (height, width, 3), with numbers but without words."""
    axes = _Axes(lines, frame_rate)
    picture = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    inside = slice(_LEFT, WIDTH - _RIGHT)
    for mark in axes.marks_ms():
        at = round(axes.y(mark))
        picture[at, inside] = _rgb(_GRID)
        if mark >= 1:
            draw_number(picture, round(mark), _LEFT - 20, at - 5)
    for mark in axes.marks_s():
        if mark == int(mark):
            draw_number(picture, int(mark), round(axes.x(mark)), HEIGHT - _BOTTOM + 8)
    late = round(axes.y(FRAME_BUDGET_MS))
    picture[late - 1 : late + 1, inside] = _rgb(_LATE)
    for idx, line in enumerate(lines):
        points = axes.points(line)
        before = points[0]
        for x, y in points:
            # Columns between two points, each as high as the step it takes.
            low, high = sorted((round(before[1]), round(y)))
            picture[round(before[1]), round(before[0]) : round(x) + 1] = _rgb(
                _COLOURS[idx % len(_COLOURS)]
            )
            picture[low : high + 1, round(x)] = _rgb(_COLOURS[idx % len(_COLOURS)])
            before = x, y
    return picture


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))
