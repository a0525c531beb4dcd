"""Turn-taking of recordings, one by one and all together, with how it was measured.

The result is JSON; a table for people and comma-separated values are made of it.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from pplex.errors import PplexError
from pplex.evaluation import full_duplex_bench as bench
from pplex.evaluation.asr import Recogniser
from pplex.evaluation.dialogue import write_dialogue
from pplex.evaluation.find import Found, Item, Track
from pplex.evaluation.measure import Measured, Method, measure
from pplex.evaluation.metrics import (
    METRICS,
    Figure,
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

_NAME_WIDTH = 36


def score(
    found: Found,
    method: Method,
    recogniser: Recogniser | None = None,
    told: Callable[[Item], object] = lambda item: None,
    transcripts: Mapping[str, Sequence[Path]] | None = None,
) -> dict[str, Any]:
    """Score every recording that has an answer; the rest is listed with its reason.

    ``told`` hears of each item when it is done; ``transcripts`` says by an item's name
    where to write what both sides said, the user by the recogniser.
    """
    return score_and_measure(found, method, recogniser, told, transcripts)[0]


def score_and_measure(
    found: Found,
    method: Method,
    recogniser: Recogniser | None = None,
    told: Callable[[Item], object] = lambda item: None,
    transcripts: Mapping[str, Sequence[Path]] | None = None,
) -> tuple[dict[str, Any], dict[str, Measured]]:
    """What ``score`` gives, and what was measured of each recording, by its name."""
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
            **{of: rounded(part) for of, part in total.items() if _known(part)},
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
            write_dialogue(path, asked or [], said)
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


def _known(found: dict[str, Figure]) -> bool:
    return any(figure is not None for figure in found.values())


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


def as_table(result: dict[str, Any]) -> str:
    """Recordings, totals, the benchmark's figures, disagreements, and the method."""
    recordings, total = result["recordings"], result["total"]
    shown = [
        metric
        for metric in METRICS
        if metric.title and metric.table
        if not metric.of or any(row.get(metric.of) for row in recordings)
    ]
    rows = [["recording", *(metric.heading for metric in shown)]]
    for row in recordings:
        cells = [metric.text(figure_of(metric, row)) for metric in shown]
        if not row["scored"]:
            cells[0] = row["status"]
        alone = " (agent only)" if row["scored"] and not row["turns"] else ""
        rows.append([_shorten(row["name"]) + alone, *cells])
    if total["scored"]:
        cells = [metric.text(figure_of(metric, total)) for metric in shown]
        rows.append([f"all {total['scored']}", *cells])
    parts = [aligned(rows)]
    parts += [_bench_table(result.get("full_duplex_bench", {}))]
    parts += [_verdicts(recordings), _disagreements(recordings)]
    parts += ["".join(f"{line}\n" for line in result["advice"])]
    parts += [_unscored(result)]
    parts += [_method(result["method"])]
    return "\n".join(part for part in parts if part)


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


def _bench_table(totals: dict[str, Any]) -> str:
    if not totals:
        return ""
    shown = [
        (name, heading)
        for _, name, heading in bench.FIGURES
        if any(name in total for total in totals.values())
    ]
    headings = ["samples", *(heading for _, heading in shown), "words from"]
    rows = [["Full-Duplex-Bench", *headings]]
    for task, total in totals.items():
        values = [total.get(name) for name, _ in shown]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        samples, sources = str(total["samples"]), ", ".join(total["words_from"])
        rows.append([task, samples, *cells, sources])
    return aligned(rows)


def _verdicts(recordings: Sequence[dict[str, Any]]) -> str:
    """The judge's reasons, and its mean score for each kind of question."""
    judged = [(row["name"], row["verdict"]) for row in recordings if row.get("verdict")]
    if not judged:
        return ""
    kinds: dict[str, list[float]] = {}
    lines = []
    for name, verdict in judged:
        score = verdict["score"]
        shown = "no score" if score is None else f"{score:g} of 5"
        lines.append(f"  {name}: {shown}, {verdict['reason']}")
        if verdict["kind"] and score is not None:
            kinds.setdefault(verdict["kind"], []).append(score)
    text = "Judged:\n" + "\n".join(lines) + "\n"
    rows = [[kind, f"{mean(of):.1f}", str(len(of))] for kind, of in kinds.items()]
    return text + (aligned([["kind", "mean", "n"], *rows]) if rows else "")


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
    if method["user_speech"]:
        said += f"; the user's speech from {method['user_speech']}"
    if method["sound_quality"]:
        name, version = method["sound_quality"].values()
        said += f"; MOS by {name} ({version}) over the agent's speech alone"
    if method["judge"]:
        judge = method["judge"]
        said += f"; judged by {judge['model']} at {judge['url']}"
    if recogniser:
        said += f"; heard by {recogniser['name']} {recogniser['version']}"
        unknown = recogniser.get("words_not_in_dictionary")
        if unknown:
            said += f", which does not know {', '.join(unknown[:5])}"
            said += f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    return said + ". --format json has all parameters.\n"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        rest = [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]).rstrip() + "\n")
    return "".join(lines)


def _shorten(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else "..." + name[3 - _NAME_WIDTH :]
