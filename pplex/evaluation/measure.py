"""One recording measured: both sides' speech, what happened between them, levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pplex.errors import PplexError
from pplex.evaluation.asr import RoundTrip, compare
from pplex.evaluation.diarization import Diarization
from pplex.evaluation.find import SAMPLE_RATE, Item
from pplex.evaluation.full_duplex_bench import read_chunks
from pplex.evaluation.judge import Judge, Question, Verdict
from pplex.evaluation.sound_quality import SoundQuality
from pplex.evaluation.speech_activity import VAD_RATE, Detector, Segment, runs, sound_of
from pplex.evaluation.turns import Turns, TurnSettings, analyse, matching_backchannels
from pplex.model.config import MimiConfig
from pplex.respond.ending import Ending, is_cut_off
from pplex.respond.transcript import Word

# Samples in a row at full scale that make a clip; single ones are peaks.
_CLIP_RUN = 3
SILENT_DB = -60.0
_FULL = 32766 / 32768
_QUIETEST = 1e-6
_AT_A_TIME = 1 << 16  # samples, whose squares are in memory


@dataclass(frozen=True)
class Method:
    """How to measure; it is written into a score.

    ``words`` is ``own``, ``output.json``, ``asr``, ``none``, or ``auto`` for the first
    of these that there is. ``agent_lag_s`` is taken off the agent's times, words of the
    text stream excepted. ``diarization`` says when the user speaks, where it knows the
    recording.
    """

    vad: str = "silero"
    words: str = "auto"
    agent_lag_s: float = 0.0
    turns: TurnSettings = TurnSettings()
    human_timing: Path | None = None
    diarization: Diarization | None = None
    quality: SoundQuality | None = None
    judge: Judge | None = None


@dataclass(frozen=True)
class Levels:
    """Peak and speech level in dB relative to full scale; clipped stretches.

    ``speech_db`` is the RMS of what was given as speech, None without any;
    ``clips`` counts runs of ``_CLIP_RUN`` samples or more at full scale and
    ``first_clip_s`` says where the first one is.
    """

    peak_db: float
    speech_db: float | None
    clips: int
    first_clip_s: float | None


@dataclass(frozen=True)
class Measured:
    """Segments are in the recording's clock; ``user`` is None for an agent alone.

    ``words_from`` says whose the words are: the model's own text, Full-Duplex-Bench's
    transcript, a recogniser, or none's. ``levels`` are the agent's, ``round_trip``
    compares its own text with a recogniser's, ``stats`` are the run's.
    ``ending`` is how the agent's side ends; where its words are not known its stretches
    of speech are counted for them.
    ``people`` compares with the person whom the agent stands in for, where that side
    is in the user's recording: backchannels of both, and how many of them match.
    ``mos`` are opinions of the agent's speech, 1 to 5; ``verdict`` is a judge's.
    """

    duration_s: float
    user: list[Segment] | None
    agent: list[Segment]
    words: list[Word] | None
    words_from: str
    turns: Turns | None
    levels: Levels
    round_trip: RoundTrip | None
    stats: dict[str, Any] | None
    people: dict[str, int] | None = None
    ending: Ending | None = None
    mos: dict[str, float] | None = None
    verdict: Verdict | None = None


def measure(
    item: Item,
    detector: Detector,
    method: Method,
    heard: list[Word] | None = None,
    asked: list[Word] | None = None,
) -> Measured:
    """Measure an item that has an agent's track.

    ``heard`` are a recogniser's words of the agent's side, ``asked`` of the user's.
    """
    assert item.agent is not None
    pcm = item.agent.read(VAD_RATE)
    duration_s = len(pcm) / VAD_RATE
    speech = detector(pcm)
    mos = method.quality(pcm, speech) if method.quality else None
    del pcm  # one sound at a time is in memory
    sound = item.agent.read()
    levels = measure_levels(sound, SAMPLE_RATE, speech)
    agent = _earlier(speech, method.agent_lag_s)
    words, source = _words(item, method.words, heard, method.agent_lag_s)
    ending = _ending(item, sound, speech)
    del sound
    user = turns = None
    if item.user is not None:
        user_pcm = item.user.read(VAD_RATE)
        duration_s = max(duration_s, len(user_pcm) / VAD_RATE)
        if method.diarization is not None:
            names = Path(item.name).stem, item.user.path.stem
            user = method.diarization.user(names)
        user = user if user is not None else detector(user_pcm)
        turns = analyse(user, agent, words, duration_s, method.turns)
    people = None
    if item.partner is not None:
        human = detector(item.partner.read(VAD_RATE))
        matches, both = matching_backchannels(agent, human, method.turns)
        people = {"matches": matches, "backchannels": both}
    trip = None
    if heard is not None and item.words is not None:
        trip = compare(item.words, heard)
    return Measured(
        duration_s,
        user,
        agent,
        words,
        source,
        turns,
        levels,
        trip,
        item.stats,
        people,
        ending,
        mos,
        _judged(item, method.judge, words, asked) if method.judge else None,
    )


def _judged(
    item: Item, judge: Judge, words: list[Word] | None, asked: list[Word] | None
) -> Verdict:
    """What the judge thinks of the agent's words."""
    columns = {key: item.extra.get(key) for key in ("question", "expected", "kind")}
    question, expected, kind = (
        value if isinstance(value, str) else "" for value in columns.values()
    )
    question = question or " ".join(word.text for word in asked or ())
    if words is None or not question:
        missing = "what the agent said" if words is None else "what the user asked"
        return Verdict(None, f"{missing} is not known", kind)
    said = " ".join(word.text for word in words)
    return judge(item.role, Question(question, expected, kind), said)


def _ending(item: Item, sound: np.ndarray, speech: Sequence[Segment]) -> Ending:
    """By the model's own text where it is known, which the sound only goes with."""
    known = (item.stats or {}).get("cut_off")
    cut_off = is_cut_off(sound, np.zeros(0, np.int32), MimiConfig().frame_size)
    return Ending(
        len(speech) if item.words is None else len(item.words),
        cut_off if known is None else bool(known),
    )


def measure_levels(
    pcm: np.ndarray, sample_rate: int, speech: Sequence[Segment] = ()
) -> Levels:
    """Measure PCM (samples,) whose speech is at these times."""
    peak = float(max(pcm.max(initial=0.0), -pcm.min(initial=0.0)))
    starts, ends = runs((pcm >= _FULL) | (pcm <= -_FULL)).T
    clips = starts[ends - starts >= _CLIP_RUN]
    return Levels(
        peak_db=decibels(peak),
        speech_db=_level_db(sound_of(pcm, sample_rate, speech)),
        clips=len(clips),
        first_clip_s=float(clips[0] / sample_rate) if len(clips) else None,
    )


def _level_db(spoken: np.ndarray) -> float | None:
    if not len(spoken):
        return None
    return decibels(math.sqrt(_energy(spoken) / len(spoken)))


def _energy(pcm: np.ndarray) -> float:
    """The sum of squares, added in pairs as NumPy does, halves after one another."""
    if len(pcm) <= _AT_A_TIME:
        return float((pcm.astype(np.float64) ** 2).sum())
    half = len(pcm) // 2 // 8 * 8
    return _energy(pcm[:half]) + _energy(pcm[half:])


def decibels(value: float) -> float:
    """A linear level in dB relative to full scale; -120 for silence."""
    return float(20 * np.log10(max(value, _QUIETEST)))


def _words(
    item: Item, words_from: str, heard: list[Word] | None, agent_lag_s: float
) -> tuple[list[Word] | None, str]:
    if words_from in ("auto", "own") and item.words is not None:
        return item.words, "own"
    if words_from in ("auto", "output.json") and item.chunks is not None:
        return _words_earlier(read_chunks(item.chunks), agent_lag_s), "output.json"
    if words_from in ("auto", "asr") and heard is not None:
        return _words_earlier(heard, agent_lag_s), "asr"
    return None, "none"


def _earlier(segments: Sequence[Segment], lag_s: float) -> list[Segment]:
    times = ((s.start_s - lag_s, s.end_s - lag_s) for s in segments)
    return [Segment(max(0.0, start), end) for start, end in times if end > 0]


def _words_earlier(words: Sequence[Word], lag_s: float) -> list[Word]:
    return [
        Word(w.text, max(0.0, w.start_s - lag_s), max(0.0, w.end_s - lag_s), w.frame)
        for w in words
    ]


def refuse_unreadable(found: Sequence[tuple[str, str | None]]) -> None:
    """Refuse what holds nothing that can be read, given each one's status and error."""
    if found and all(status == "unreadable" for status, _ in found):
        more = f"; and {len(found) - 1} more like it" if len(found) > 1 else ""
        raise PplexError(f"{found[0][1]}{more}")
