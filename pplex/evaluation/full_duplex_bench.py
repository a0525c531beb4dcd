"""Full-Duplex-Bench v1.0 and v1.5: their folders and their definitions.

Follows ``v1_v1.5/evaluation/{eval_*,get_timing}.py`` of Full-Duplex-Bench
(github.com/DanielLin94144) at commit d7336bd. What differs is said in ``NOTES`` and
``OVERLAP_NOTES``, which go into every score.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from pplex.evaluation.speech_activity import Segment, common, merge
from pplex.files import reading, real_path
from pplex.respond.transcript import Word
from pplex.values import fit, read_json

ANNOTATIONS = {
    "pause.json": "pause_handling",
    "turn_taking.json": "smooth_turn_taking",
    "interrupt.json": "user_interruption",
}
BACKCHANNEL = "backchannel"
HUMAN_TIMING = "icc_gt_distribution.json"
# Version 1.5: each sample is an overlap, and the same without it.
_OVERLAP_TASKS = tuple(
    f"v1.5_{name}"
    for name in (
        "user_interruption",
        "user_backchannel",
        "talking_to_other",
        "background_speech",
    )
)
_METADATA = "metadata.json"
_TEXTS = "context", "current_turn"
CLEAN_INPUT, CLEAN_OUTPUT = "clean_input.wav", "clean_output.wav"

NOTES = (
    "Definitions of Full-Duplex-Bench v1.0, evaluation scripts at commit d7336bd.",
    "The transcriber changes these figures: compare them only with figures whose "
    "words come from the same source.",
    "Interruption: the scripts transcribe the sound after the interruption's end; "
    "with other words, those that end after it count, from its end on.",
    "Backchannel takeover: 'takeover' is what the script computes, where the last "
    "segment up to 3 s decides; 'takeover_any' is 1 if any segment is one.",
    "Backchannel: times are true seconds; the script hands 24 kHz sound to a "
    "detector that is told 16 kHz.",
)
OVERLAP_NOTES = (
    "Timing of Full-Duplex-Bench v1.5, get_timing.py at commit d7336bd: 'stop_s' is "
    "the mean length of a sample's overlaps, whoever began them, 'response_s' the mean "
    "from an end of the user's to the agent's next start; speech is joined over 0.6 s "
    "(the user's) and 0.5 s (the agent's), where the comments say 0.3 and 0.05.",
    "'event_stop_s' and 'event_response_s' are of the annotated overlap alone: from "
    "its start until the agent, who speaks then, is silent; from its end to the "
    "agent's next start, where it does not speak then. 'clean_response_s' is "
    "'response_s' of the sample without the overlap.",
)

# Of a sample, and of a task's samples: key, its name in the mean of all, its heading.
FIGURES = (
    ("takeover", "takeover_rate", "takeover"),
    ("takeover_any", "takeover_any_rate", "any"),
    ("latency_s", "latency_s", "latency s"),
    ("frequency_hz", "frequency_hz", "per s"),
    ("timing_distance", "timing_distance", "JSD"),
    ("stop_s", "stop_s", "stop s"),
    ("response_s", "response_s", "response s"),
    ("event_stop_s", "event_stop_s", "event stop s"),
    ("event_response_s", "event_response_s", "event response s"),
    ("clean_response_s", "clean_response_s", "clean response s"),
)

_TURN_S = 1.0
_TURN_WORDS = 3
LONG_S = 3.0
_WINDOW_S = 0.2
USER_GAP_S, AGENT_GAP_S = 0.6, 0.5


@dataclass(frozen=True)
class Sample:
    """One sample's folder: its task, and a reference time or an overlap if it has one.

    ``text`` are the words of version 1.5: the context, and those of the overlap.
    """

    task: str
    reference_s: float | None = None
    overlap: Segment | None = None
    text: tuple[str, str] = ("", "")


def read_sample(folder: Path) -> Sample | None:
    """What the folder's annotation says; None if it is no folder of the benchmark."""
    for name, task in ANNOTATIONS.items():
        path = folder / name
        if path.is_file():
            return Sample(task, _reference_s(path, task))
    parent = real_path(folder).parent
    if (folder / _METADATA).is_file() and (folder / "input.wav").is_file():
        return _read_overlap(folder / _METADATA, parent.name)
    if BACKCHANNEL in parent.name and (folder / "input.wav").is_file():
        return Sample(BACKCHANNEL)
    return None


def read_chunks(path: Path) -> list[Word]:
    """Words of the benchmark's own transcript; a missing end is the start."""
    found = []
    with reading(
        path,
        "is not a transcript of Full-Duplex-Bench; run its get_transcript/asr.py "
        "again, or give --words own",
    ):
        chunk_form = {"text": str, "timestamp": [(float, None)]}
        for chunk in fit(read_json(path), {"chunks": [chunk_form]})["chunks"]:
            start, end = chunk["timestamp"]
            if start is not None:
                end = start if end is None else end
                found.append(Word(chunk["text"].strip(), start, end, 0))
    return found


def turn_taking(
    sample: Sample, words: Sequence[Word] | None, speech: Sequence[Segment]
) -> dict[str, Any]:
    """A sample's figures by the agent's words, or by its speech without any."""
    if words is None:
        words = [Word("", s.start_s, s.end_s, 0) for s in speech]
    words = sorted(words, key=lambda word: word.start_s)
    if sample.task == "user_interruption":
        assert sample.reference_s is not None
        words = after(words, sample.reference_s)
    row: dict[str, Any] = {"takeover": takeover(words)}
    if sample.reference_s is not None:
        late = latency_s(words, sample.reference_s) if row["takeover"] else None
        row["latency_s"] = late
    return row


def task_figures(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The means over each task's samples."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    totals: dict[str, Any] = {}
    for task, found in sorted(by_task.items()):
        total: dict[str, Any] = {"samples": len(found)}
        for key, name, _ in FIGURES:
            values = [row[key] for row in found if row.get(key) is not None]
            if any(key in row for row in found):
                total[name] = mean(values) if values else None
        total["words_from"] = sorted({row["words_from"] for row in found})
        totals[task] = total
    return totals


def takeover(words: Sequence[Word]) -> int:
    """0 if nothing is said, or under 1 s with at most 3 words; else 1."""
    if not words:
        return 0
    duration_s = words[-1].end_s - words[0].start_s
    return 0 if duration_s < _TURN_S and len(words) <= _TURN_WORDS else 1


def latency_s(words: Sequence[Word], reference_s: float) -> float:
    """First word's start after the reference time, not below 0."""
    return max(0.0, words[0].start_s - reference_s)


def after(words: Sequence[Word], reference_s: float) -> list[Word]:
    """What is heard from a time on, as if the sound began there."""
    return [
        Word(w.text, max(w.start_s, reference_s), w.end_s, w.frame)
        for w in words
        if w.end_s > reference_s
    ]


def backchannel(
    segments: Sequence[Segment],
    words: Sequence[Word],
    duration_s: float,
    human: Sequence[float] | None,
) -> dict[str, Any]:
    """Takeover, backchannels a second, and their timing's distance to people's."""
    verdict = verdict_any = 0
    predicted: list[Segment] = []
    for segment in segments:
        if segment.duration_s > LONG_S:
            verdict = verdict_any = 1
            break
        verdict = _segment_takeover(segment, words)
        verdict_any |= verdict
        predicted.append(segment)
    distance = None
    if human is not None:
        distance = timing_distance(predicted, duration_s, human)
    return {
        "takeover": verdict,
        "takeover_any": verdict_any,
        "backchannels": len(predicted),
        "frequency_hz": len(predicted) / duration_s,
        "timing_distance": distance,
    }


def timing_distance(
    predicted: Sequence[Segment], duration_s: float, human: Sequence[float]
) -> float:
    """Jensen-Shannon distance (natural logarithms) over bins of 0.2 s; 1 for none."""
    if not predicted:
        return 1.0
    from scipy.spatial import distance

    counts = np.zeros(int(duration_s / _WINDOW_S) + 1)
    for segment in predicted:
        first, last = int(segment.start_s / _WINDOW_S), int(segment.end_s / _WINDOW_S)
        counts[first : last + 1] += 1
    ours = counts + 1e-10
    ends = np.linspace(0, 1, len(human))
    theirs = np.interp(np.linspace(0, 1, len(ours)), ends, human)
    return float(distance.jensenshannon(ours, theirs))


def overlap_timing(
    user: Sequence[Segment], agent: Sequence[Segment], event: Segment | None = None
) -> dict[str, Any]:
    """A v1.5 sample's stop and response latencies, and those of its ``event``."""
    user, agent = merge(user, USER_GAP_S, 0.0), merge(agent, AGENT_GAP_S, 0.0)
    stops = _shortest(common(user, agent))
    starts = [segment.start_s for segment in agent]
    waits = []
    for turn in user:
        after_it = [start for start in starts if start > turn.end_s]
        waits += [Segment(turn.end_s, after_it[0])] if after_it else []
    responses = _shortest(waits)
    row: dict[str, Any] = {
        "stops": [[s.start_s, s.end_s] for s in stops],
        "responses": [[s.start_s, s.end_s] for s in responses],
        "stop_s": _mean_s(stops),
        "response_s": _mean_s(responses),
    }
    if event is None:
        return row
    talking = [s for s in agent if s.start_s <= event.start_s < s.end_s]
    row["event_stop_s"] = talking[0].end_s - event.start_s if talking else None
    silent = not any(s.start_s < event.end_s < s.end_s for s in agent)
    later = [start for start in starts if start >= event.end_s] if silent else []
    row["event_response_s"] = later[0] - event.end_s if later else None
    return row


def _shortest(found: Iterable[Segment]) -> list[Segment]:
    """Of those that end in the same millisecond the shortest, in order."""
    best: dict[int, Segment] = {}
    for segment in found:
        key = round(segment.end_s * 1000)
        if key not in best or segment.duration_s < best[key].duration_s:
            best[key] = segment
    return sorted(best.values(), key=lambda segment: segment.end_s)


def _mean_s(segments: Sequence[Segment]) -> float | None:
    return mean(s.duration_s for s in segments) if segments else None


def read_human_timing(path: Path) -> Mapping[str, Sequence[float]]:
    """The benchmark's ``icc_gt_distribution.json``: a histogram for each sample."""
    with reading(
        path,
        "does not hold people's backchannel timing; give the benchmark's "
        f"{HUMAN_TIMING}",
    ):
        found: dict[str, list[float]] = fit(read_json(path), {str: [float]})
        for name, shares in found.items():
            if not (min(shares, default=-1.0) >= 0 < sum(shares)):
                raise ValueError(f"what it has of {name[:80]!r} is no histogram")
    return found


def _segment_takeover(segment: Segment, words: Sequence[Word]) -> int:
    inside = [
        w
        for w in words
        if (w.start_s >= segment.start_s and w.end_s <= segment.end_s)
        or (w.start_s <= segment.end_s and w.end_s > segment.end_s)
        or (w.start_s <= segment.start_s and w.end_s > segment.start_s)
    ]
    return 0 if len(inside) <= 2 and segment.duration_s < 1 else 1


def _read_overlap(path: Path, parent: str) -> Sample | None:
    """What a sample of version 1.5 says; None if it is none."""
    broken = "is not an annotation of Full-Duplex-Bench v1.5; copy its data set again"
    with reading(path, broken):
        found = read_json(path)
        if not isinstance(found, dict) or "timestamps" not in found:
            return None
        texts = {f"{kind}_text": (str, None) for kind in _TEXTS}
        found = fit(found, {"timestamps": [float], **texts})
        start, end = found["timestamps"]
        context, said = (found[key] or "" for key in texts)
    task = f"v1.5_{parent}" if f"v1.5_{parent}" in _OVERLAP_TASKS else "v1.5_overlap"
    return Sample(task, overlap=Segment(start, end), text=(context, said))


def _reference_s(path: Path, task: str) -> float | None:
    broken = "is not an annotation of Full-Duplex-Bench; copy its data set again"
    with reading(path, broken):
        first = fit(read_json(path), [{"timestamp": [float]}])[0]
        start, end = first["timestamp"]
    return {"smooth_turn_taking": start, "user_interruption": end}.get(task)
