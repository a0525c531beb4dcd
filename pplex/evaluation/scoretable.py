"""A score as a table for people, or as lines of comma-separated values."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any

_NAME_WIDTH = 36

# Heading, key of the CSV, and how to get it from a recording's figures.
Getter = Callable[[dict[str, Any]], Any]
_COLUMNS: tuple[tuple[str, str, Getter], ...] = (
    ("length s", "duration_s", lambda t: t["duration_s"]),
    ("turns", "user_turns", lambda t: t["user_turns"]),
    ("taken", "takeover_rate", lambda t: t["takeover_rate"]),
    ("delay s", "reply_delay_median_s", lambda t: _of(t["reply_delay_s"], "median")),
    ("pauses kept", "pauses_respected_rate", lambda t: t["pauses_respected_rate"]),
    ("backch.", "backchannels", lambda t: t["backchannels"]),
    ("interrupts", "agent_interruptions", lambda t: t["agent_interruptions"]),
    ("talk-over s", "talk_over_s", lambda t: t["talk_over_s"]),
    ("overlap s", "overlap_s", lambda t: t["overlap_s"]),
    ("silence s", "silence_s", lambda t: t["silence_s"]),
    ("interrupted", "user_interruptions", lambda t: t["user_interruptions"]),
    ("yields s", "yield_median_s", lambda t: _of(t["yield_s"], "median")),
)


def as_table(result: dict[str, Any]) -> str:
    """Recordings, totals, the benchmark's figures, disagreements, and the method."""
    rows = [["recording", *(heading for heading, _, _ in _COLUMNS)]]
    wer = result["method"]["recogniser"] is not None
    if wer:
        rows[0].append("WER")
    for recording in result["recordings"]:
        if recording["turns"]:
            cells = [_cell(get(recording["turns"])) for _, _, get in _COLUMNS]
        else:
            cells = [recording["status"], *["-"] * (len(_COLUMNS) - 1)]
            if recording["scored"]:
                cells[0] = "agent only"
        if wer:
            trip = recording["round_trip"] or {}
            cells.append(_percent(trip.get("word_error_rate")))
        rows.append([_shorten(recording["name"]), *cells])
    total = result["total"]
    if total["scored"]:
        cells = [_cell(get(total)) for _, _, get in _COLUMNS]
        if wer:
            cells.append(_percent(total["round_trip"]["word_error_rate"]))
        rows.append([f"all {total['scored']}", *cells])
    parts = [_aligned(rows)]
    parts += [_bench(result.get("full_duplex_bench", {}))]
    parts += [_disagreements(result["recordings"])]
    parts += [_unscored(result)]
    parts += [_method(result["method"])]
    return "\n".join(part for part in parts if part)


def as_csv(result: dict[str, Any]) -> str:
    """One line a recording; empty where nothing was measured."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    bench = ("task", "takeover", "takeover_any", "latency_s", "frequency_hz")
    bench += ("timing_distance",)
    writer.writerow(
        ["name", "status", "error", "words_from"]
        + [key for _, key, _ in _COLUMNS]
        + ["words", "word_error_rate"]
        + [f"bench_{key}" for key in bench]
    )
    for row in result["recordings"]:
        turns, trip = row["turns"], row["round_trip"] or {}
        sample = row["bench"] or {}
        writer.writerow(
            [row["name"], row["status"], row["error"], row.get("words_from")]
            + [get(turns) if turns else None for _, _, get in _COLUMNS]
            + [turns["words"] if turns else None, trip.get("word_error_rate")]
            + [sample.get(key) for key in bench]
        )
    return out.getvalue()


def _bench(totals: dict[str, Any]) -> str:
    if not totals:
        return ""
    keys = (
        ("samples", "samples"),
        ("takeover", "takeover_rate"),
        ("any", "takeover_any_rate"),
        ("latency s", "latency_s"),
        ("per s", "frequency_hz"),
        ("JSD", "timing_distance"),
    )
    rows = [["Full-Duplex-Bench v1.0", *(name for name, _ in keys), "words from"]]
    for task, total in totals.items():
        cells = [_cell(total.get(key), 3) for _, key in keys]
        rows.append([task, *cells, ", ".join(total["words_from"])])
    return _aligned(rows)


def _disagreements(recordings: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in recordings:
        for d in (row["round_trip"] or {}).get("disagreements", []):
            lines.append(
                f"  {row['name']} {d['start_s']:.2f} s: "
                f'said "{d["said"]}", heard "{d["heard"]}"'
            )
    return "Heard otherwise than said:\n" + "\n".join(lines) + "\n" if lines else ""


def _unscored(result: dict[str, Any]) -> str:
    lines = [f"  {note}" for note in result["notes"]]
    lines += [
        f"  {row['name']}: {row['status']}"
        + (f" ({row['error']})" if row["error"] else "")
        for row in result["recordings"]
        if not row["scored"] or row["error"]
    ]
    if not lines:
        return ""
    total = result["total"]
    head = f"Not scored: {total['not_scored']} of {total['recordings']}"
    return head + "\n" + "\n".join(lines) + "\n"


def _method(method: dict[str, Any]) -> str:
    detector, recogniser = method["voice_detector"], method["recogniser"]
    turns = method["turns"]
    said = (
        f"Method: speech by {detector['name']} ({detector['version']}); a turn holds "
        f"silences up to {turns['max_pause_s']:g} s; a backchannel is under "
        f"{turns['backchannel_s']:g} s with at most {turns['backchannel_words']} words "
        f"inside a turn; words: {method['words']}"
    )
    if method["agent_lag_s"]:
        said += f"; {method['agent_lag_s']:g} s taken off the agent's times"
    if recogniser:
        said += f"; heard by {recogniser['name']} {recogniser['version']}"
        unknown = recogniser.get("words_not_in_dictionary")
        if unknown:
            said += f", which does not know {', '.join(unknown[:5])}"
            said += f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    return said + ". --format json has all parameters.\n"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        rest = [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]).rstrip() + "\n")
    return "".join(lines)


def _cell(value: Any, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _shorten(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else "..." + name[3 - _NAME_WIDTH :]


def _of(spread: dict[str, Any] | None, key: str) -> float | None:
    return spread[key] if spread else None
