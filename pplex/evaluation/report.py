"""One self-contained HTML page about many recordings: a table, and a picture of each.

What failed comes first, and answers to one recording stand together, those of several
folders told apart.

The table is in the page; pictures are drawn by the page's own script when they are
opened or come into view, so that hundreds of recordings open at once.
"""

from __future__ import annotations

import base64
import datetime
import importlib.metadata
import importlib.resources
import json
import math
import os
import textwrap
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
from pplex.evaluation.turns import TurnSettings
from pplex.files import (
    Place,
    is_descriptor,
    open_regular,
    put,
    reading,
    real_path,
    write_text,
)
from pplex.plots import thinned

_COLUMNS_PER_S = 20
_MIN_COLUMNS, _MAX_COLUMNS = 300, 1500
COLUMNS = tuple(metric for metric in METRICS if metric.about)
_FIRST_WORDS = 12
_NONE = "\u2013"
_MAX_EMBEDDED = 100_000_000  # bytes; browsers take long to open more

# Headings that have more room than a terminal's table.
_HEADINGS = {
    "reply_delay_s": "Reply delay",
    "takeover_rate": "Turns taken",
    "agent_interruptions": "Inter\u00adrupts",  # may be broken there
    "backchannels": "Back\u00adchannels",
    "real_time_factor": "Real-time factor",
}
# Why there is no figure, by what it is a figure of.
_UNKNOWN = {
    "turns": "nothing to measure it by",
    "stats": "no stats beside the sound",
    "levels": "no speech",
    "": "not known",
}
_TYPES = {
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".mp3": "audio/mpeg",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
}
# What is said of a run, by its key in stats and manifests.
_SETTINGS = {
    "model": "model",
    "voice": "voice",
    "seed": "seed",
    "temp": "temperature",
    "top_k": "top-k",
    "text_temp": "text temperature",
    "text_top_k": "text top-k",
    "device": "device",
    "prompt": "role",
    "pplex": "pplex",
}


@dataclass
class Entry:
    """A recording as the page shows it; ``measured`` is None where there is no sound.

    Peaks are 0 to 1, a value per column of the picture. ``folder`` tells answers of
    several folders apart.
    """

    item: Item
    status: str
    error: str | None
    measured: Measured | None = None
    user_peaks: np.ndarray | None = None
    agent_peaks: np.ndarray | None = None
    folder: str = ""

    @property
    def name(self) -> str:
        """The recording's, which is the same in every folder.

        Names of a benchmark's samples begin with the folder's.
        """
        if not self.folder or self.item.root is None:
            return self.item.name
        return self.item.name.removeprefix(f"{real_path(self.item.root).name}/")

    @property
    def state(self) -> str:
        """Its status, or what is wrong with an answer that is done."""
        ending = self.measured.ending if self.measured else None
        if self.status != "done" or ending is None:
            return self.status
        if not ending.words:
            return "silent"
        return "cut off" if ending.cut_off else "done"

    @property
    def words(self) -> list[str]:
        """What the agent said, as far as it is known."""
        known = self.measured.words if self.measured else None
        return [word.text for word in known or ()]


def make_entries(
    found: Found, method: Method, told: Callable[[Item], object] = lambda item: None
) -> list[Entry]:
    """Measure every recording; an entry says so where one cannot be read."""
    detector = make_detector(method.vad)
    entries = []
    for item, folder in zip(found.items, _folder_names(found.items), strict=True):
        entry = Entry(item, item.status, item.error, folder=folder)
        if item.agent is not None:
            try:
                entry.measured = measure(item, detector, method)
                duration_s = entry.measured.duration_s
                entry.agent_peaks = peaks(item.agent.read(), duration_s)
                if item.user is not None:
                    entry.user_peaks = peaks(item.user.read(), duration_s)
            except PplexError as e:
                entry = Entry(item, "unreadable", str(e), folder=folder)
        entries.append(entry)
        told(item)
    return entries


def _folder_names(items: Sequence[Item]) -> list[str]:
    """What tells the folders apart that were asked about; all "" if there is one."""
    roots = [real_path(item.root or Path()) for item in items]
    names = {root: root.name for root in roots}
    if len(names) < 2:
        return ["" for _ in items]
    if len(set(names.values())) < len(names):
        above = os.path.dirname(os.path.commonpath(names))
        names = {root: os.path.relpath(root, above) for root in names}
    return [names[root] for root in roots]


def picture_names(items: Sequence[Item]) -> list[str]:
    """A name for each item's picture, no two alike."""
    folders = _folder_names(items)
    return [os.path.join(f, i.name) for f, i in zip(folders, items, strict=True)]


def check_embedded(items: Sequence[Item]) -> None:
    """Refuse to put more sound into a page than a browser takes."""
    size = sum(
        item.audio.stat().st_size
        for item in items
        if item.audio is not None and item.audio.is_file()
    )
    if size > _MAX_EMBEDDED:
        raise PplexError(
            f"--embed: the sound is {size / 1e6:.0f} MB, and a page takes at most "
            f"{_MAX_EMBEDDED / 1e6:.0f} MB; name fewer recordings, or leave --embed out"
        )


def together(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Answers to one recording in one list: of one name, or made of one file.

    Those with one that is not done come first.
    """
    sources: dict[str, str] = {}
    for entry in entries:
        if entry.item.source is not None:
            sources.setdefault(entry.name, str(real_path(entry.item.source)))
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(sources.get(entry.name, entry.name), []).append(entry)
    return sorted(groups.values(), key=lambda g: all(e.status == "done" for e in g))


def peaks(pcm: np.ndarray, duration_s: float) -> np.ndarray:
    """The largest magnitude of each column, 0 to 1."""
    columns = math.ceil(duration_s * _COLUMNS_PER_S)
    columns = min(max(columns, _MIN_COLUMNS), _MAX_COLUMNS)
    edges = np.linspace(0, duration_s * SAMPLE_RATE, columns + 1).astype(int)
    starts = np.minimum(edges[:-1], max(len(pcm) - 1, 0))
    if not len(pcm):
        return np.zeros(columns)
    lowest, highest = (f.reduceat(pcm, starts) for f in (np.minimum, np.maximum))
    found = np.maximum(-lowest, highest)
    found[edges[:-1] >= len(pcm)] = 0.0
    return np.minimum(found, 1.0)


def write_report(
    path: Path,
    entries: Sequence[Entry],
    notes: Sequence[str],
    vad: str,
    title: str,
    *,
    embed: bool = False,
    place: Place = put,
) -> None:
    """Write the page, whole or not at all; ``embed`` puts the sound into it."""
    answered = _facts(entries)
    groups = together(entries)
    entries = [entry for group in groups for entry in group]
    measured = [entry.measured for entry in entries if entry.measured]
    columns = [one for one in COLUMNS if one.of_all(measured) is not None]
    folder = Path() if is_descriptor(path) else path.parent
    page = importlib.resources.files("pplex.evaluation") / "page"
    parts = {
        "title": escape(title),
        "style": (page / "page.css").read_text(encoding="utf-8"),
        "script": (page / "page.js").read_text(encoding="utf-8"),
        "banner": _banner(entries, notes),
        "facts": answered,
        "tiles": _tiles(entries),
        "meaning": _meaning(columns),
        "head": _table_head(entries, columns),
        "rows": "\n".join(
            _table_row(i, entry, columns) for i, entry in enumerate(entries)
        ),
        "version": escape(importlib.metadata.version("pplex")),
        "vad": escape(vad),
        "data": _script_json(
            rounded(
                [
                    _data(entry, folder, embed) | ({"k": k} if len(group) > 1 else {})
                    for k, group in enumerate(groups)
                    for entry in group
                ]
            )
        ),
    }
    text = (page / "page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        # Safe: no part holds a marker, as every name in it is escaped.
        text = text.replace(f"<!--{name}-->", part)
    write_text(path, text, place=place)


def _table_head(entries: Sequence[Entry], columns: Sequence[Metric]) -> str:
    """The headings, as cells."""
    cells = [_heading("Recording", "", "text")]
    if any(entry.folder for entry in entries):
        cells.append(_heading("Folder", "", "text"))
    cells += [_heading("State", "", "text"), _heading("First words", "", "text")]
    cells.append(f'<th scope="col" class="strip">Who spoke when{_scale(entries)}</th>')
    cells += [_heading(heading(one), one.about, "number") for one in columns]
    return "".join(cells)


def _scale(entries: Sequence[Entry]) -> str:
    """Of the small pictures: one scale, unless it makes short ones too small."""
    lengths = [entry.measured.duration_s for entry in entries if entry.measured]
    if not lengths or max(lengths) > 4 * min(lengths):
        return "<small>each from start to end</small>"
    longest = max(lengths)
    return f'<small data-scale="{longest:.6g}">all 0 to {longest:.0f} s</small>'


def heading(metric: Metric) -> str:
    """What is written over a metric's column, with its unit."""
    said = _HEADINGS.get(metric.name) or metric.title[:1].upper() + metric.title[1:]
    return f"{said}, {metric.unit}" if metric.unit.strip("%") else said


def _heading(said: str, tip: str, kind: str) -> str:
    title = f' title="{escape(tip)}"' if tip else ""
    return (
        f'<th scope="col" aria-sort="none" class="{kind}"><button type="button" '
        f'data-kind="{kind}"{title}>{escape(said)}</button></th>'
    )


def _table_row(index: int, entry: Entry, columns: Sequence[Metric]) -> str:
    """A recording's row; the script finds its data by ``index``."""
    measured = [entry.measured] if entry.measured else []
    name, state, folder = map(escape, (entry.name, entry.state, entry.folder))
    look = {"done": "good", "silent": "odd", "cut off": "odd"}.get(entry.state, "bad")
    said = " ".join(entry.words[:_FIRST_WORDS])
    said += " \u2026" if len(entry.words) > _FIRST_WORDS else ""
    said = escape(entry.error or said or _NONE)
    kind, shown = "said", said
    if entry.measured is None:  # the row has room for the reason
        kind, shown = "said reason", f"<span>{said}</span>"
    return (
        f'<tr data-i="{index}"><th scope="row" data-v="{name}">'
        f'<button type="button" class="open" aria-expanded="false">{name}</button>'
        "</th>"
        + (f'<td class="text" data-v="{folder}">{folder}</td>' if folder else "")
        + f'<td class="text" data-v="{state}"><span class="status {look}">{state}'
        f'</span></td><td class="text {kind}" data-v="{said}">{shown}</td>'
        '<td class="strip"></td>'
        + "".join(_cell(metric, measured) for metric in columns)
        + "</tr>"
    )


def _cell(metric: Metric, measured: Sequence[Measured]) -> str:
    figure = metric.of_all(measured)
    value = single(figure)
    if value is None:
        return f'<td data-v="">{_NONE if measured else ""}</td>'
    mark = ' class="over"' if value > metric.limit else ""
    said = _parts(metric, measured) if metric.unit == "%" else metric.text(figure)
    return f'<td data-v="{value:.6g}"{mark}>{said}</td>'


def _parts(metric: Metric, measured: Sequence[Measured]) -> str:
    """A share as what it is a share of, such as 5 of 6."""
    known = [value for value in metric.values(measured) if value is not None]
    return f"{sum(part for part, _ in known)} of {sum(whole for _, whole in known)}"


def _facts(entries: Sequence[Entry]) -> str:
    """What answered, how and when, a line a folder; and when this page was made."""
    lines = []
    for folder in dict.fromkeys(entry.folder for entry in entries):
        runs = [entry.item.settings for entry in entries if entry.folder == folder]
        said = [_setting(key, what, runs) for key, what in _SETTINGS.items()]
        dates = sorted({str(run["time"])[:10] for run in runs if run.get("time")})
        if dates:
            said.append(f"answered {' to '.join(dict.fromkeys((dates[0], dates[-1])))}")
        known = " \u00b7 ".join(one for one in said if one)
        known = known or "model and settings are not known, as there are no stats"
        name = f"<b>{escape(folder)}</b>: " if folder else ""
        lines.append(f"<p>{name}{escape(known)}</p>")
    now = datetime.datetime.now(datetime.timezone.utc)
    version = escape(importlib.metadata.version("pplex"))
    lines.append(f"<p>Page made {now:%Y-%m-%d %H:%M} UTC by pplex {version}</p>")
    return "".join(lines)


def _setting(key: str, what: str, runs: Sequence[dict[str, Any]]) -> str:
    """One setting of some runs: its values if they are few, else how many."""
    found = [run.get(key) for run in runs]
    values = list(dict.fromkeys(str(one) for one in found if one not in (None, "")))
    if not values:
        return ""
    if len(values) > 2:
        return f"{len(values)} {what}s"
    shown = (textwrap.shorten(value, 80, placeholder=" \u2026") for value in values)
    return f"{what} {' / '.join(shown)}"


def _meaning(columns: Sequence[Metric]) -> str:
    """States and figures explained, as a list of definitions."""
    limits = TurnSettings()
    terms = {
        "Silent, cut off": "The agent says nothing; it still speaks where the sound "
        "ends. A longer --tail helps.",
        "A turn of the user": "Speech without a silence of over "
        f"{limits.max_pause_s:g} s; shorter silences are its pauses.",
        "A turn is taken": "The agent speaks after it, before the user does again, for "
        f"{limits.takeover_s:g} s or more, or says more than {limits.takeover_words} "
        "words. A turn is not counted if the recording ends too soon to tell.",
        **{heading(metric): f"{metric.about}." for metric in columns},
    }
    return "".join(
        f"<dt>{escape(term)}</dt><dd>{escape(said)}</dd>"
        for term, said in terms.items()
    )


def _banner(entries: Sequence[Entry], notes: Sequence[str]) -> str:
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
    kind = "banner" if lines else "banner advice"
    return f'<div class="{kind}" role="note">{said}</div>' if said else ""


def _tiles(entries: Sequence[Entry]) -> str:
    """All recordings together: each figure, and in words whether it is good."""
    measured = [entry.measured for entry in entries if entry.measured]
    states = Counter(entry.state for entry in entries)
    done = sum(entry.status == "done" for entry in entries)
    odd = [f"{states[one]} {one}" for one in ("silent", "cut off") if states[one]]
    said = ", ".join(odd) or ("none silent or cut off" if measured else "")
    shown = [("Recordings done", f"{done} of {len(entries)}", said)]
    for metric in COLUMNS:
        figure = metric.of_all(measured)
        value = single(figure)
        name = heading(metric).removesuffix(f", {metric.unit}")
        if value is None:
            shown.append((name, _NONE, _UNKNOWN[metric.of]))
            continue
        text = f"{metric.text(figure)} {metric.unit.strip('%')}".rstrip()
        if metric.unit == "s" and value >= 60:
            text = f"{value / 60:.1f} min" if value < 3600 else f"{value / 3600:.1f} h"
        shown.append((name, text, _in_words(metric, value, measured)))
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        f'<dd class="words">{escape(words)}</dd></div>'
        for name, value, words in shown
    )


def _in_words(metric: Metric, value: float, measured: Sequence[Measured]) -> str:
    """Whether a figure is good, or what it is a part of."""
    if metric.name == "real_time_factor" and value > 0:
        times = max(value, 1 / value)
        than = "faster" if value < 1 else "slower"
        return f"{times:.{0 if times >= 5 else 1}f} times {than} than real time"
    if metric.unit == "%":
        return _parts(metric, measured)
    return {
        "duration_s": "in all",
        "reply_delay_s": "median; people leave about 0.2 s",
        "talk_over_s": "in all" if value else "none, which is good",
        "agent_interruptions": "times" if value else "never, which is good",
        "clips": "distorted there" if value else "none, which is good",
        "speech_db": "mean; 0 is full scale",
    }.get(metric.name, "in all")


def _data(entry: Entry, folder: Path, embed: bool) -> dict[str, Any]:
    """What the script draws from; keys are short as there may be many."""
    data: dict[str, Any] = {"n": entry.name, "s": entry.state, "e": entry.error}
    if entry.folder:
        data["f"] = entry.folder
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
    if entry.item.audio is not None and embed:
        data["a"] = _embedded(entry.item.audio)
    elif entry.item.audio is not None:
        relative = os.path.relpath(real_path(entry.item.audio), real_path(folder))
        data["a"] = quote(os.fsencode(relative))
    stats, settings = entry.item.stats or {}, entry.item.settings
    data["st"] = {
        key: settings[key]
        for key in ("voice", "prompt", "seed", "model", "device")
        if isinstance(settings.get(key), str | int)
    }
    steps_ms = stats.get("step_ms") or {}
    if None not in [steps_ms.get(key) for key in ("p50", "p95", "late_frames")]:
        data["st"]["step_ms"] = steps_ms
    if steps := stats.get("step_ms_series"):
        _, slowest = thinned(steps)
        data["lat"] = [round(ms, 2) for ms in slowest.tolist()]
    return data


def _embedded(path: Path) -> str:
    """A sound file as a data URL."""
    with reading(path, "cannot be put into the page"), open_regular(path) as file:
        content = base64.b64encode(file.read(_MAX_EMBEDDED)).decode("ascii")
    kind = _TYPES.get(path.suffix.lower(), "application/octet-stream")
    return f"data:{kind};base64,{content}"


def _packed(values: np.ndarray | None) -> str | None:
    """Peaks as base64 of bytes; the power lifts what is quiet into sight."""
    if values is None:
        return None
    levels = np.round(255 * values**0.6).astype(np.uint8)
    return base64.b64encode(levels.tobytes()).decode("ascii")


def _pairs(segments: Sequence[Segment]) -> list[list[float]]:
    return [[round(s.start_s, 2), round(s.end_s, 2)] for s in segments]


def _script_json(content: object) -> str:
    """JSON that may stand in a script element, whatever the names hold."""
    text = json.dumps(
        content, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
