"""Turn-taking of recordings, one by one and all together, with how it was measured."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from pplex.errors import PplexError
from pplex.evaluation import full_duplex
from pplex.evaluation.asr import Recogniser
from pplex.evaluation.find import Found, Item
from pplex.evaluation.measure import Measured, measure
from pplex.evaluation.roundtrip import compare, summarise
from pplex.evaluation.segments import Segment
from pplex.evaluation.turns import Turns, TurnSettings
from pplex.evaluation.vad import (
    BENCH_SETTINGS,
    VAD_RATE,
    Detector,
    make_detector,
)
from pplex.respond.transcript import Word


@dataclass(frozen=True)
class Method:
    """How to score; it is written into the result."""

    vad: str = "silero"
    words: str = "auto"
    agent_lag_s: float = 0.0
    turns: TurnSettings = TurnSettings()
    human_timing: Path | None = None


def score(
    found: Found,
    method: Method,
    recogniser: Recogniser | None = None,
    told: Callable[[Item], None] = lambda item: None,
    both_sides: Callable[[Item, list[Word], list[Word]], None] | None = None,
) -> dict[str, Any]:
    """Score every recording that has an answer; the rest is listed with its reason.

    ``told`` hears of each item when it is done; ``both_sides`` gets the user's and the
    agent's words where there is a recogniser.
    """
    detector = make_detector(method.vad)
    human = _human_timing(found, method)
    rows = []
    for item in found.items:
        rows.append(_score_item(item, method, detector, recogniser, human, both_sides))
        told(item)
    scored = [row for row in rows if row["scored"]]
    result = {
        "method": _describe(method, detector, recogniser, rows),
        "notes": found.notes,
        "recordings": rows,
        "total": {
            "recordings": len(rows),
            "scored": len(scored),
            "not_scored": len(rows) - len(scored),
            **_total([row["turns"] for row in scored if row["turns"]]),
        },
    }
    bench = _bench_totals([row["bench"] for row in scored if row["bench"]])
    if bench:
        result["full_duplex_bench"] = bench
    if recogniser is not None:
        result["total"]["round_trip"] = summarise(
            [row["round_trip"] for row in scored if row["round_trip"]]
        )
    return result


def turn_figures(turns: Turns) -> dict[str, Any]:
    """A recording's figures and events, with rates; None where nothing was judged."""
    figures = asdict(turns)
    events = figures.pop("events")
    minutes = turns.duration_s / 60
    return {
        **figures,
        "takeover_rate": _rate(turns.takeovers, turns.judged_turns),
        "reply_delay_s": _spread(turns.reply_delays_s),
        "pauses_respected_rate": _rate(turns.pauses_respected, turns.pauses),
        "backchannels_per_minute": turns.backchannels / minutes if minutes else None,
        "yield_s": _spread(turns.yields_s),
        "yielded_rate": _rate(len(turns.yields_s), turns.user_interruptions),
        "events": events,
    }


def rounded(value: Any) -> Any:
    """Seconds and rates to a tenth of a millisecond, in lists and dicts too."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return value


def _score_item(
    item: Item,
    method: Method,
    detector: Detector,
    recogniser: Recogniser | None,
    human: dict[str, Any] | None,
    both_sides: Callable[[Item, list[Word], list[Word]], None] | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": item.name,
        "status": item.status,
        "error": item.error,
        "scored": False,
        "turns": None,
        "bench": None,
        "round_trip": None,
    }
    if item.agent is None:
        return row
    try:
        heard = recogniser(item.agent.read(VAD_RATE)) if recogniser else None
        measured = measure(
            item,
            detector,
            method.words,
            heard,
            method.agent_lag_s,
            method.turns,
        )
        if measured.turns:
            row["turns"] = rounded(turn_figures(measured.turns))
        if item.sample:
            row["bench"] = rounded(_bench(item, measured, human))
        if heard is not None and item.words is not None:
            row["round_trip"] = rounded(asdict(compare(item.words, heard)))
        if recogniser and both_sides and heard is not None:
            said = item.words if item.words is not None else heard
            user = recogniser(item.user.read(VAD_RATE)) if item.user else []
            both_sides(item, user, said)
    except PplexError as e:
        return {**row, "status": "unreadable", "error": str(e)}
    row["scored"] = True
    row["duration_s"] = rounded(measured.duration_s)
    row["words_from"] = measured.words_from
    return row


def _bench(
    item: Item, measured: Measured, human: dict[str, Any] | None
) -> dict[str, Any]:
    """The benchmark's figures for one sample."""
    sample = item.sample
    assert sample is not None and item.agent is not None
    words = sorted(
        measured.words
        if measured.words is not None
        else [Word("", s.start_s, s.end_s, 0) for s in measured.agent],
        key=lambda word: word.start_s,
    )
    row: dict[str, Any] = {"task": sample.task, "words_from": measured.words_from}
    if sample.task == full_duplex.BACKCHANNEL:
        pcm = item.agent.read(VAD_RATE)
        segments: Sequence[Segment] = make_detector("silero", BENCH_SETTINGS)(pcm)
        folder = item.folder.name if item.folder else ""
        return row | full_duplex.backchannel(
            segments,
            words if measured.words is not None else [],
            len(pcm) / VAD_RATE,
            (human or {}).get(folder),
        )
    if sample.task == "user_interruption":
        assert sample.reference_s is not None
        words = full_duplex.after(words, sample.reference_s)
    row["takeover"] = full_duplex.takeover(words)
    if sample.reference_s is not None:
        row["latency_s"] = (
            full_duplex.latency_s(words, sample.reference_s)
            if row["takeover"]
            else None
        )
    return row


def _bench_totals(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    totals: dict[str, Any] = {}
    for task, found in sorted(by_task.items()):
        total: dict[str, Any] = {"samples": len(found)}
        for key, name in (
            ("takeover", "takeover_rate"),
            ("takeover_any", "takeover_any_rate"),
            ("latency_s", "latency_s"),
            ("frequency_hz", "frequency_hz"),
            ("timing_distance", "timing_distance"),
        ):
            values = [row[key] for row in found if row.get(key) is not None]
            if any(key in row for row in found):
                total[name] = rounded(mean(values)) if values else None
        total["words_from"] = sorted({row["words_from"] for row in found})
        totals[task] = total
    return totals


def _total(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts added up and lists put together, so that long recordings weigh more."""
    names = (
        "duration_s",
        "user_speech_s",
        "agent_speech_s",
        "overlap_s",
        "talk_over_s",
        "silence_s",
        "user_turns",
        "judged_turns",
        "takeovers",
        "pauses",
        "pauses_respected",
        "backchannels",
        "agent_interruptions",
        "user_interruptions",
    )
    total: dict[str, Any] = {name: sum(row[name] for row in rows) for name in names}
    delays = [delay for row in rows for delay in row["reply_delays_s"]]
    yields = [seconds for row in rows for seconds in row["yields_s"]]
    minutes = total["duration_s"] / 60
    total["takeover_rate"] = _rate(total["takeovers"], total["judged_turns"])
    total["reply_delay_s"] = _spread(delays)
    total["pauses_respected_rate"] = _rate(total["pauses_respected"], total["pauses"])
    total["backchannels_per_minute"] = (
        total["backchannels"] / minutes if minutes else None
    )
    total["yield_s"] = _spread(yields)
    total["yielded_rate"] = _rate(len(yields), total["user_interruptions"])
    return rounded(total)


def _human_timing(found: Found, method: Method) -> dict[str, Any] | None:
    """People's backchannel timing: the file given, or one beside the samples."""
    path = method.human_timing
    for item in found.items:
        if path is None and item.sample and item.sample.task == full_duplex.BACKCHANNEL:
            assert item.folder is not None
            for folder in (item.folder.parent, item.folder.parent.parent):
                if (folder / full_duplex.HUMAN_TIMING).is_file():
                    path = folder / full_duplex.HUMAN_TIMING
    return dict(full_duplex.read_human_timing(path)) if path else None


def _describe(
    method: Method,
    detector: Detector,
    recogniser: Recogniser | None,
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    described: dict[str, Any] = {
        "pplex": importlib.metadata.version("pplex"),
        "voice_detector": detector.describe(),
        "turns": asdict(method.turns),
        "words": method.words,
        "agent_lag_s": method.agent_lag_s,
        "recogniser": recogniser.describe() if recogniser else None,
    }
    tasks = {row["bench"]["task"] for row in rows if row["bench"]}
    if tasks:
        described["full_duplex_bench"] = list(full_duplex.NOTES)
        if full_duplex.BACKCHANNEL in tasks:
            bench = make_detector("silero", BENCH_SETTINGS)
            described["backchannel_detector"] = bench.describe()
    return described


def _rate(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _spread(values: Sequence[float]) -> dict[str, float | int] | None:
    if not values:
        return None
    ordered = sorted(values)
    high = ordered[min(len(ordered) - 1, math.ceil(0.9 * len(ordered)) - 1)]
    return {
        "n": len(values),
        "mean": mean(values),
        "median": median(values),
        "p90": high,
        "min": ordered[0],
        "max": ordered[-1],
    }
