"""Turn-taking of recordings, one by one and all together, with how it was measured.

The result is JSON; comma-separated values are made of it.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pplex.errors import PplexError
from pplex.evaluation import full_duplex_bench as bench
from pplex.evaluation.asr import Recogniser
from pplex.evaluation.find import Found, Item, Track
from pplex.evaluation.measure import Measured, Method, measure
from pplex.evaluation.metrics import (
    METRICS,
    figure_of,
    figures,
    rounded,
    single,
)
from pplex.evaluation.speech_activity import (
    BENCH_SETTINGS,
    VAD_RATE,
    Detector,
    make_detector,
)
from pplex.respond.ending import advice
from pplex.respond.transcript import write_dialogue


def score(
    found: Found,
    method: Method,
    recogniser: Recogniser | None = None,
    told: Callable[[Item], object] = lambda item: None,
    transcripts: Mapping[str, Sequence[Path]] | None = None,
) -> tuple[dict[str, Any], dict[str, Measured]]:
    """Score every recording that has an answer; the rest is listed with its reason.

    ``told`` hears of each item when it is done; ``transcripts`` says by an item's name
    where to write what both sides said, the user by the recogniser. Returned are the
    scores, and what was measured of each recording, by its name.
    """
    detector = make_detector(method.vad)
    human = _human_timing(found, method)
    rows: list[dict[str, Any]] = []
    measured: dict[str, Measured] = {}
    for item in found.items:
        paths = (transcripts or {}).get(item.name, ())
        row, one = _score_item(item, method, detector, recogniser, human, paths)
        rows.append(row)
        if one is not None:
            measured[item.name] = one
        told(item)
    total = figures(list(measured.values()))
    result = {
        "method": _describe(method, detector, recogniser, rows),
        "notes": found.notes,
        "advice": advice([one.ending for one in measured.values() if one.ending]),
        "recordings": rows,
        "total": {
            "recordings": len(rows),
            "scored": len(measured),
            "not_scored": len(rows) - len(measured),
            **rounded(total.pop("") | total.pop("turns")),
            **{
                of: rounded(part)
                for of, part in total.items()
                if any(figure is not None for figure in part.values())
            },
        },
    }
    tasks = bench.task_figures([row["bench"] for row in rows if row["bench"]])
    if tasks:
        result["full_duplex_bench"] = rounded(tasks)
    return result, measured


def _score_item(
    item: Item,
    method: Method,
    detector: Detector,
    recogniser: Recogniser | None,
    human: dict[str, Any] | None,
    transcripts: Sequence[Path],
) -> tuple[dict[str, Any], Measured | None]:
    """A recording's part of the result, and what was measured if it could be read."""
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
        return row, None
    try:
        heard = asked = None
        if recogniser:
            heard = recogniser(item.agent.read(VAD_RATE))
            if item.user and (method.judge or transcripts):
                asked = recogniser(item.user.read(VAD_RATE))
        measured = measure(item, detector, method, heard, asked)
        sample = _bench(item, measured, human) if item.sample else None
        for path in transcripts if recogniser else ():
            said = item.words if item.words is not None else heard or []
            write_dialogue(path, {"user": asked or [], "agent": said})
    except PplexError as e:
        return {**row, "status": "unreadable", "error": str(e)}, None
    row |= {"scored": True, "words_from": measured.words_from, "bench": sample}
    for of, found in figures([measured]).items():
        part = getattr(measured, of) if of else None
        if not of:
            row |= found
        elif part is not None:
            row[of] = found | ({} if isinstance(part, dict) else asdict(part))
    return rounded(row), measured


def _bench(
    item: Item, measured: Measured, human: dict[str, Any] | None
) -> dict[str, Any]:
    """The benchmark's figures for one sample."""
    assert item.sample is not None and item.agent is not None
    row = {"task": item.sample.task, "words_from": measured.words_from}
    if item.sample.overlap is not None:
        return row | _overlap_timing(item)
    if item.sample.task != bench.BACKCHANNEL:
        return row | bench.turn_taking(item.sample, measured.words, measured.agent)
    pcm = item.agent.read(VAD_RATE)
    speech = make_detector("silero", BENCH_SETTINGS)(pcm)
    timing = (human or {}).get(item.folder.name if item.folder else "")
    duration_s = len(pcm) / VAD_RATE
    return row | bench.backchannel(speech, measured.words or [], duration_s, timing)


def _overlap_timing(item: Item) -> dict[str, Any]:
    """Timing of a v1.5 sample, and of the same without the overlap if it is there."""
    assert item.sample is not None and item.agent is not None and item.user is not None
    detector = make_detector("silero", BENCH_SETTINGS)
    user, agent = (detector(t.read(VAD_RATE)) for t in (item.user, item.agent))
    row = bench.overlap_timing(user, agent, item.sample.overlap)
    folder = item.user.path.parent
    clean = [folder / name for name in (bench.CLEAN_INPUT, bench.CLEAN_OUTPUT)]
    if all(path.is_file() for path in clean):
        agents = 2 if item.agent.channel == 2 else 1
        sides = Track(clean[0]), Track(clean[1], agents)
        user, agent = (detector(side.read(VAD_RATE)) for side in sides)
        row["clean_response_s"] = bench.overlap_timing(user, agent)["response_s"]
    return row


def _human_timing(found: Found, method: Method) -> dict[str, Any] | None:
    """People's backchannel timing: the file given, or one beside the samples."""
    path = method.human_timing
    for item in found.items:
        if path is None and item.sample and item.sample.task == bench.BACKCHANNEL:
            assert item.folder is not None
            for folder in (item.folder.parent, item.folder.parent.parent):
                if (folder / bench.HUMAN_TIMING).is_file():
                    path = folder / bench.HUMAN_TIMING
    return dict(bench.read_human_timing(path)) if path else None


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
        "user_speech": method.diarization.describe() if method.diarization else None,
        "sound_quality": method.quality.describe() if method.quality else None,
        "judge": method.judge.describe() if method.judge else None,
    }
    tasks = {row["bench"]["task"] for row in rows if row["bench"]}
    if tasks:
        overlaps = {task for task in tasks if task.startswith("v1.5")}
        described["full_duplex_bench"] = [
            *(bench.NOTES if tasks - overlaps else ()),
            *(bench.OVERLAP_NOTES if overlaps else ()),
        ]
        if overlaps or bench.BACKCHANNEL in tasks:
            theirs = make_detector("silero", BENCH_SETTINGS)
            described["bench_detector"] = theirs.describe()
    return described


def as_csv(result: dict[str, Any]) -> str:
    """One line a recording; empty where nothing was measured."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    shown = [metric for metric in METRICS if metric.title]
    sample = ("task", *(key for key, _, _ in bench.FIGURES))
    first = ("name", "status", "error", "words_from")
    columns = [*first, *(metric.column for metric in shown)]
    writer.writerow([*columns, *(f"bench_{key}" for key in sample)])
    for row in result["recordings"]:
        writer.writerow(
            [row.get(key) for key in first]
            + [single(figure_of(metric, row)) for metric in shown]
            + [(row["bench"] or {}).get(key) for key in sample]
        )
    return out.getvalue()
