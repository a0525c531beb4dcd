"""One self-contained HTML page about many recordings: a table, and a picture of each.

The table is in the page; pictures are drawn by the page's own script when they are
opened or come into view, so that hundreds of recordings open at once.
"""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.resources
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from pplex.errors import PplexError
from pplex.evaluation.find import SAMPLE_RATE, Found, Item
from pplex.evaluation.measure import Measured, Method, measure
from pplex.evaluation.metrics import METRICS, Metric, rounded, single
from pplex.evaluation.speech_activity import Segment, make_detector
from pplex.files import is_descriptor, real_path, write_text

_COLUMNS_PER_S = 20
_MIN_COLUMNS, _MAX_COLUMNS = 300, 1500
_MAX_STEPS = 1500
COLUMNS = tuple(metric for metric in METRICS if metric.about)


@dataclass
class Entry:
    """A recording as the page shows it; ``measured`` is None where there is no sound.

    Peaks are 0 to 1, a value per column of the picture.
    """

    item: Item
    status: str
    error: str | None
    measured: Measured | None = None
    user_peaks: np.ndarray | None = None
    agent_peaks: np.ndarray | None = None


def make_entries(
    found: Found, method: Method, told: Callable[[Item], object] = lambda item: None
) -> list[Entry]:
    """Measure every recording; an entry says so where one cannot be read."""
    detector = make_detector(method.vad)
    entries = []
    for item in found.items:
        entry = Entry(item, item.status, item.error)
        if item.agent is not None:
            try:
                entry.measured = measure(item, detector, method)
                pcm = item.agent.read()
                entry.agent_peaks = peaks(pcm, entry.measured.duration_s)
                if item.user is not None:
                    user = item.user.read()
                    entry.user_peaks = peaks(user, entry.measured.duration_s)
            except PplexError as e:
                entry = Entry(item, "unreadable", str(e))
        entries.append(entry)
        told(item)
    return entries


def peaks(pcm: np.ndarray, duration_s: float) -> np.ndarray:
    """The largest magnitude of each column, 0 to 1."""
    columns = math.ceil(duration_s * _COLUMNS_PER_S)
    columns = min(max(columns, _MIN_COLUMNS), _MAX_COLUMNS)
    edges = np.linspace(0, duration_s * SAMPLE_RATE, columns + 1).astype(int)
    starts = np.minimum(edges[:-1], max(len(pcm) - 1, 0))
    if not len(pcm):
        return np.zeros(columns)
    found = np.maximum.reduceat(np.abs(pcm), starts)
    found[edges[:-1] >= len(pcm)] = 0.0
    return np.minimum(found, 1.0)


def write_report(
    path: Path, entries: Sequence[Entry], notes: Sequence[str], vad: str, title: str
) -> None:
    """Write the page, whole or not at all."""
    folder = Path() if is_descriptor(path) else path.parent
    page = importlib.resources.files("pplex.evaluation") / "page"
    parts = {
        "title": escape(title),
        "style": (page / "page.css").read_text(encoding="utf-8"),
        "script": (page / "page.js").read_text(encoding="utf-8"),
        "banner": banner(entries, notes),
        "tiles": tiles(entries),
        "head": table_head(),
        "rows": "\n".join(table_row(i, entry) for i, entry in enumerate(entries)),
        "version": escape(importlib.metadata.version("pplex")),
        "vad": escape(vad),
        "data": _script_json(rounded([_data(e, folder) for e in entries])),
    }
    text = (page / "page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        # Safe: no part holds a marker, as every name in it is escaped.
        text = text.replace(f"<!--{name}-->", part)
    write_text(path, text)


def table_head() -> str:
    """The headings, as cells."""
    cells = [_heading("Recording", "", "text"), _heading("Status", "", "text")]
    cells.append('<th scope="col" class="strip">Who spoke when</th>')
    cells += [_heading(heading(one), one.about, "number") for one in COLUMNS]
    return "".join(cells)


def heading(metric: Metric) -> str:
    """What is written over a metric's column."""
    return metric.title[:1].upper() + metric.title[1:]


def _heading(said: str, tip: str, kind: str) -> str:
    title = f' title="{escape(tip)}"' if tip else ""
    return (
        f'<th scope="col" aria-sort="none"><button type="button" data-kind="{kind}"'
        f"{title}>{escape(said)}</button></th>"
    )


def table_row(index: int, entry: Entry) -> str:
    """A recording's row; the script finds its data by ``index``."""
    measured = [entry.measured] if entry.measured else []
    cells = [_cell(metric, measured) for metric in COLUMNS]
    name, status = escape(entry.item.name), escape(entry.status)
    good = "good" if entry.status == "done" else "bad"
    return (
        f'<tr data-i="{index}"><th scope="row" data-v="{name}">'
        f'<button type="button" class="open" aria-expanded="false">{name}</button>'
        f'</th><td data-v="{status}"><span class="status {good}">{status}</span></td>'
        f'<td class="strip"></td>{"".join(cells)}</tr>'
    )


def _cell(metric: Metric, measured: Sequence[Measured]) -> str:
    figure = metric.of_all(measured)
    value = single(figure)
    if value is None:
        return '<td data-v="">\u2013</td>'
    mark = ' class="over"' if value > metric.limit else ""
    return f'<td data-v="{value:.6g}"{mark}>{metric.text(figure)}</td>'


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
    """All recordings together: the table's figures, as far as there are any."""
    measured = [entry.measured for entry in entries if entry.measured]
    done = sum(entry.status == "done" for entry in entries)
    shown = [("Recordings done", f"{done} of {len(entries)}", "")]
    for metric in COLUMNS:
        figure = metric.of_all(measured)
        value = single(figure)
        if value is not None:
            said = f"{metric.text(figure)} {metric.unit.strip('%')}".rstrip()
            if metric.unit == "s" and value >= 60:
                said = (
                    f"{value / 60:.1f} min" if value < 3600 else f"{value / 3600:.1f} h"
                )
            shown.append((heading(metric), said, metric.about))
    return "".join(
        f'<div title="{escape(about)}"><dt>{escape(name)}</dt>'
        f"<dd>{escape(value)}</dd></div>"
        for name, value, about in shown
    )


def _data(entry: Entry, folder: Path) -> dict[str, Any]:
    """What the script draws from; keys are short as there may be many."""
    data: dict[str, Any] = {"n": entry.item.name, "s": entry.status, "e": entry.error}
    if entry.measured is None:
        return data
    measured, turns = entry.measured, entry.measured.turns
    data |= {
        "d": round(measured.duration_s, 3),
        "g": _packed(entry.agent_peaks),
        "u": _packed(entry.user_peaks),
        "gs": _pairs(measured.agent),
        "us": _pairs(measured.user or []),
        "w": [
            [w.text, round(w.start_s, 2), round(w.end_s, 2)]
            for w in measured.words or []
        ],
        "wf": measured.words_from,
        "ev": [
            [
                e.kind,
                round(e.start_s, 2),
                round(e.end_s, 2),
                e.text,
                None if e.value_s is None else round(e.value_s, 2),
            ]
            for e in (turns.events if turns else [])
        ],
    }
    if entry.item.audio is not None:
        relative = os.path.relpath(real_path(entry.item.audio), real_path(folder))
        data["a"] = quote(os.fsencode(relative))
    stats = entry.item.stats or {}
    data["st"] = {
        key: stats[key]
        for key in ("voice", "prompt", "seed", "model", "device")
        if key in stats
    }
    steps_ms = stats.get("step_ms") or {}
    if None not in [steps_ms.get(key) for key in ("p50", "p95", "late_frames")]:
        data["st"]["step_ms"] = steps_ms
    if steps := stats.get("step_ms_series"):
        data["lat"] = _thinned(steps)
    return data


def _packed(values: np.ndarray | None) -> str | None:
    """Peaks as base64 of bytes; the power lifts what is quiet into sight."""
    if values is None:
        return None
    levels = np.round(255 * values**0.6).astype(np.uint8)
    return base64.b64encode(levels.tobytes()).decode("ascii")


def _pairs(segments: Sequence[Segment]) -> list[list[float]]:
    return [[round(s.start_s, 2), round(s.end_s, 2)] for s in segments]


def _thinned(steps: list[float]) -> list[float]:
    """The slowest of each group, so that no late frame is lost."""
    size = -(-len(steps) // _MAX_STEPS)
    groups = (steps[i : i + size] for i in range(0, len(steps), size))
    return [round(max(group), 2) for group in groups]


def _script_json(content: object) -> str:
    """JSON that may stand in a script element, whatever the names hold."""
    text = json.dumps(
        content, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
