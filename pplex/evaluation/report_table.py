"""The static part of the report: its table, the figures above it, what went wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any

import numpy as np

from pplex.evaluation.find import Item
from pplex.evaluation.levels import Levels
from pplex.evaluation.measure import Measured


@dataclass
class Entry:
    """A recording as the page shows it; ``measured`` is None where there is no sound.

    Peaks are 0 to 1, a value per column of the picture.
    """

    item: Item
    status: str
    error: str | None
    measured: Measured | None = None
    levels: Levels | None = None
    user_peaks: np.ndarray | None = None
    agent_peaks: np.ndarray | None = None


@dataclass(frozen=True)
class Column:
    """A column of the table: how it is headed, sorted, shown and explained."""

    heading: str
    tip: str
    value: Callable[[Entry], float | str | None]
    digits: int = 2
    text: bool = False


def _turns(name: str) -> Callable[[Entry], float | None]:
    def value(entry: Entry) -> float | None:
        turns = entry.measured.turns if entry.measured else None
        return getattr(turns, name) if turns else None

    return value


def _delay(entry: Entry) -> float | None:
    turns = entry.measured.turns if entry.measured else None
    return median(turns.reply_delays_s) if turns and turns.reply_delays_s else None


def _stat(*keys: str) -> Callable[[Entry], float | None]:
    def value(entry: Entry) -> float | None:
        found: Any = entry.item.stats
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return float(found) if isinstance(found, int | float) else None

    return value


def _words(entry: Entry) -> float | None:
    words = entry.measured.words if entry.measured else None
    return None if words is None else len(words)


def _level(name: str) -> Callable[[Entry], float | None]:
    return lambda entry: getattr(entry.levels, name) if entry.levels else None


COLUMNS = (
    Column("Recording", "", lambda e: e.item.name, text=True),
    Column("Status", "", lambda e: e.status, text=True),
    Column(
        "Length", "Seconds", lambda e: e.measured.duration_s if e.measured else None, 1
    ),
    Column("Delay", "Median seconds from the user's end to the reply", _delay),
    Column(
        "Talk-over",
        "Seconds of talking at once that the agent began, backchannels apart",
        _turns("talk_over_s"),
        1,
    ),
    Column(
        "Interrupts",
        "Times the agent began while the user spoke",
        _turns("agent_interruptions"),
        0,
    ),
    Column(
        "Backch.",
        "Short words inside the user's turn, such as mhm",
        _turns("backchannels"),
        0,
    ),
    Column("Words", "Words the agent said, by its own text", _words, 0),
    Column(
        "Loudness",
        "The agent's speech in dB relative to full scale",
        _level("speech_db"),
        1,
    ),
    Column("Clips", "Stretches at full scale", _level("clips"), 0),
    Column(
        "RTF",
        "Computing time over audio time; below 1 keeps up",
        _stat("real_time_factor"),
    ),
)


def table_head() -> str:
    """The headings, as cells."""
    cells = [_heading(column) for column in COLUMNS]
    cells.insert(2, '<th scope="col" class="strip">Who spoke when</th>')
    return "".join(cells)


def _heading(column: Column) -> str:
    tip = f' title="{escape(column.tip)}"' if column.tip else ""
    kind = "text" if column.text else "number"
    return (
        f'<th scope="col" aria-sort="none"><button type="button" data-kind="{kind}"'
        f"{tip}>{escape(column.heading)}</button></th>"
    )


def table_row(index: int, entry: Entry) -> str:
    """A recording's row; the script finds its data by ``index``."""
    cells = []
    for column in COLUMNS[2:]:
        value = column.value(entry)
        if value is None:
            cells.append('<td data-v="">\u2013</td>')
        else:
            assert not isinstance(value, str)
            shown = f"{value:.{column.digits}f}"
            mark = ' class="over"' if column.heading == "RTF" and value > 1 else ""
            mark = ' class="over"' if column.heading == "Clips" and value else mark
            cells.append(f'<td data-v="{value:.6g}"{mark}>{shown}</td>')
    name, status = escape(entry.item.name), escape(entry.status)
    good = "good" if entry.status == "done" else "bad"
    return (
        f'<tr data-i="{index}"><th scope="row" data-v="{name}">'
        f'<button type="button" class="open" aria-expanded="false">{name}</button>'
        f'</th><td data-v="{status}"><span class="status {good}">{status}</span></td>'
        f'<td class="strip"></td>{"".join(cells)}</tr>'
    )


def banner(entries: Sequence[Entry], notes: Sequence[str]) -> str:
    """What is not done, and why; nothing if all is well."""
    counts = Counter(entry.status for entry in entries if entry.status != "done")
    lines = [f"{number} {status}" for status, number in sorted(counts.items())]
    said = ""
    if lines:
        said = (
            f"<p><strong>{sum(counts.values())} of {len(entries)} recordings are not "
            f"done:</strong> {escape(', '.join(lines))}. The figures are about the "
            "others.</p>"
        )
    said += "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f'<div class="banner" role="note">{said}</div>' if said else ""


def tiles(entries: Sequence[Entry]) -> str:
    """All recordings together, in a few figures."""
    measured = [e.measured for e in entries if e.measured]
    turns = [m.turns for m in measured if m.turns]
    done = sum(e.status == "done" for e in entries)
    delays = [delay for t in turns for delay in t.reply_delays_s]
    judged = sum(t.judged_turns for t in turns)
    pauses = sum(t.pauses for t in turns)
    seconds = sum(m.duration_s for m in measured)
    length = f"{seconds:.1f} s"
    if seconds >= 60:
        hours = seconds / 3600
        length = f"{hours:.1f} h" if hours >= 1 else f"{seconds / 60:.1f} min"
    busy = [
        (factor, entry.item.stats["audio_s"])
        for entry in entries
        if entry.item.stats and entry.item.stats.get("audio_s")
        for factor in [_stat("real_time_factor")(entry)]
        if factor is not None
    ]
    shown = [("Recordings done", f"{done} of {len(entries)}"), ("Sound", length)]
    if delays:
        shown.append(("Reply delay, median", f"{median(delays):.2f} s"))
    if judged:
        taken = sum(t.takeovers for t in turns)
        shown.append(("Turns taken", f"{taken} of {judged}"))
    if pauses:
        kept = sum(t.pauses_respected for t in turns)
        shown.append(("Pauses respected", f"{kept} of {pauses}"))
    if turns:
        shown.append(("Talk-over", f"{sum(t.talk_over_s for t in turns):.1f} s"))
    if busy:
        factor = sum(f * s for f, s in busy) / sum(s for _, s in busy)
        shown.append(("Real-time factor", f"{factor:.2f}"))
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in shown
    )
