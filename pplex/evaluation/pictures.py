"""Pictures of recordings: how loud both sides are, where they speak, what is said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pplex.evaluation.find import Track
from pplex.evaluation.report import Entry
from pplex.evaluation.speech_activity import VAD_RATE, Segment, levels_db
from pplex.files import Place, put
from pplex.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, plot, shortened
from pplex.respond.transcript import Word

if TYPE_CHECKING:
    from pplex.plots import Axes

WIDTH = 11.0  # inches, on which letters are large enough for a slide
_ROW_HEIGHT, _MARGIN_HEIGHT = 1.6, 1.1
_LEGEND_COLUMNS = 4
_ROW_S = (30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_MAX_ROWS = 20
_COLUMNS = 1200  # a row
_LEVEL_RATE = 100  # of ``levels_db``
_FLOOR_DB = -60.0
# The user's level grows upwards from the middle, the agent's downwards.
_TICKS = {1: "0", 0.5: "\u221230", 0: "\u221260", -0.5: "\u221230", -1: "0"}

_MAX_WORDS_S = 60.0  # a longer row has room for every tenth word only
_LANES, _LANE = 4, 0.26
_CHARACTER_IN = 0.07  # how wide a letter of a word is, about
_MARKS = {
    "backchannel": ("backchannel", GREEN, "-"),
    "pause_taken": ("takes a pause", RED, ":"),
    "interruption": ("interrupts the user", RED, "-"),
    "user_interruption": ("is interrupted", PURPLE, "-"),
}


class _Side(NamedTuple):
    """A track as it is drawn: ``sign`` is 1 for upwards, ``levels`` are 0 to 1."""

    name: str
    sign: int
    colour: str
    times: np.ndarray
    levels: np.ndarray
    speech: Sequence[Segment]


def write_picture(path: Path, entry: Entry, *, place: Place = put) -> None:
    """Draw one recording, over as many rows as its length asks for."""
    measured, item = entry.measured, entry.item
    assert measured is not None and item.agent is not None
    duration_s = max(measured.duration_s, 0.1)
    row_s = next((s for s in _ROW_S if duration_s / s <= _MAX_ROWS), _ROW_S[-1])
    rows = int(np.ceil(duration_s / row_s - 1e-6))
    row_s = min(row_s, duration_s)
    has_words = bool(measured.words) and row_s <= _MAX_WORDS_S
    height = _ROW_HEIGHT + 0.6 * has_words
    sides = [_Side("agent", -1, ORANGE, *_loudness(item.agent, row_s), measured.agent)]
    if item.user is not None and measured.user is not None:
        levels = _loudness(item.user, row_s)
        sides.insert(0, _Side("user", 1, BLUE, *levels, measured.user))
    with plot(path, WIDTH, rows * height + _MARGIN_HEIGHT, place=place) as figure:
        all_axes = figure.subplots(rows, squeeze=False)[:, 0]
        name = f"{entry.folder}/{entry.name}" if entry.folder else entry.name
        all_axes[0].set_title(f"{shortened(name, 100)}, {duration_s:.1f} s")
        all_axes[-1].set_xlabel("time (s)")
        for k, axes in enumerate(all_axes):
            window = Segment(k * row_s, (k + 1) * row_s)
            axes.set_xlim(window.start_s, window.end_s)
            axes.set_yticks(list(_TICKS), list(_TICKS.values()), fontsize="small")
            axes.set_ylabel("level (dBFS)", y=0.65 if has_words else 0.5)
            for side in sides:
                _draw_side(axes, window, side)
            for event in measured.turns.events if measured.turns else ():
                inside = window.start_s <= event.start_s < window.end_s
                if event.kind in _MARKS and inside:
                    label, colour, dashes = _MARKS[event.kind]
                    at = [event.start_s] * 2
                    (line,) = axes.plot(at, [-1.08, 1.15], dashes, color=colour)
                    line.set(label=label, gid=event.kind)
            axes.set_ylim(-1.15 - _LANES * _LANE * has_words, 1.15)
            if has_words:
                _draw_words(axes, window, measured.words or [])
                _name_lane(axes, "words", -1.15 - _LANES * _LANE / 2, GREY)
        named = {
            label: handle
            for axes in all_axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            list(named.values()),
            list(named),
            loc="outside lower center",
            ncols=min(len(named), _LEGEND_COLUMNS),
        )


def _loudness(track: Track, row_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Times and levels from 0 (the floor) to 1 (full scale), of each column."""
    levels = levels_db(track.read(VAD_RATE))
    size = max(1, round(row_s * _LEVEL_RATE / _COLUMNS))
    starts = np.arange(0, len(levels), size)
    loudest = np.maximum.reduceat(levels, starts) if len(levels) else levels
    return starts / _LEVEL_RATE, np.clip(1 - loudest / _FLOOR_DB, 0, 1)


def _draw_side(axes: Axes, window: Segment, side: _Side) -> None:
    """Its speech as bands, its level over them."""
    _name_lane(axes, side.name, 0.5 * side.sign, side.colour)
    bands = [
        (segment.start_s, segment.duration_s)
        for segment in side.speech
        if segment.overlap_s(window)
    ]
    label = f"{side.name} speaks"
    height = (0, 1.08 * side.sign)
    axes.broken_barh(bands, height, color=side.colour, alpha=0.18, lw=0, label=label)
    shown = (side.times >= window.start_s) & (side.times < window.end_s)
    axes.fill_between(
        side.times[shown],
        side.sign * side.levels[shown],
        color=side.colour,
        lw=0,
        step="post",
        label=f"{side.name}'s level",
    )


def _name_lane(axes: Axes, name: str, y: float, colour: str) -> None:
    """Write whose lane it is beside it."""
    axes.text(
        1.005, y, name, color=colour, va="center", transform=axes.get_yaxis_transform()
    )


def _draw_words(axes: Axes, window: Segment, words: Sequence[Word]) -> None:
    """Words at their times, in a few lanes; a tick where there is no room."""
    scale = (WIDTH - 1.0) / window.duration_s
    free = [window.start_s] * _LANES
    for word in words:
        if not window.start_s <= word.start_s < window.end_s:
            continue
        width = (len(word.text) + 1) * _CHARACTER_IN / scale
        lane = next((i for i, end in enumerate(free) if end <= word.start_s), None)
        if lane is None or word.start_s + width > window.end_s + 0.3 / scale:
            axes.plot([word.start_s] * 2, [-1.15, -1.08], color=GREY, lw=1)
            continue
        free[lane] = word.start_s + width
        axes.text(
            word.start_s, -1.14 - _LANE * lane, word.text, fontsize="small", va="top"
        )
