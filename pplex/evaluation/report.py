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
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from pplex.errors import PplexError
from pplex.evaluation.find import SAMPLE_RATE, Found, Item
from pplex.evaluation.levels import measure_levels
from pplex.evaluation.measure import measure
from pplex.evaluation.report_table import (
    Entry,
    banner,
    table_head,
    table_row,
    tiles,
)
from pplex.evaluation.segments import Segment
from pplex.evaluation.sidefiles import real_path
from pplex.evaluation.vad import make_detector
from pplex.files import write_text

_COLUMNS_PER_S = 20
_MIN_COLUMNS, _MAX_COLUMNS = 300, 1500
_MAX_STEPS = 1500


def make_entries(
    found: Found, vad: str, told: Callable[[Item], None] = lambda item: None
) -> list[Entry]:
    """Measure every recording; an entry says so where one cannot be read."""
    detector = make_detector(vad)
    entries = []
    for item in found.items:
        entry = Entry(item, item.status, item.error)
        if item.agent is not None:
            try:
                entry.measured = measure(item, detector)
                pcm = item.agent.read()
                entry.levels = measure_levels(pcm, SAMPLE_RATE, entry.measured.agent)
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
        "data": _script_json([_data(entry, path.parent) for entry in entries]),
    }
    text = (page / "page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        # Safe: no part holds a marker, as every name in it is escaped.
        text = text.replace(f"<!--{name}-->", part)
    write_text(path, text)


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
        data["a"] = quote(Path(relative).as_posix())
    stats = entry.item.stats or {}
    data["st"] = {
        key: stats[key]
        for key in ("voice", "prompt", "seed", "model", "device", "step_ms")
        if key in stats
    }
    steps = stats.get("step_ms_series")
    if isinstance(steps, list) and steps:
        data["lat"] = _thinned([float(step) for step in steps])
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
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
