"""One recording measured: both sides' speech, and what happened between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pplex.evaluation.find import Item
from pplex.evaluation.full_duplex import read_chunks
from pplex.evaluation.segments import Segment
from pplex.evaluation.turns import Turns, TurnSettings, analyse
from pplex.evaluation.vad import VAD_RATE, Detector
from pplex.respond.transcript import Word


@dataclass(frozen=True)
class Measured:
    """Segments are in the recording's clock; ``user`` is None for an agent alone.

    ``words_from`` says whose the words are: the model's own text, Full-Duplex-Bench's
    transcript, a recogniser, or none's.
    """

    duration_s: float
    user: list[Segment] | None
    agent: list[Segment]
    words: list[Word] | None
    words_from: str
    turns: Turns | None


def measure(
    item: Item,
    detector: Detector,
    words_from: str = "auto",
    heard: list[Word] | None = None,
    agent_lag_s: float = 0.0,
    settings: TurnSettings | None = None,
) -> Measured:
    """Measure an item that has the agent's track.

    ``words_from`` is ``own``, ``output.json``, ``asr``, ``none``, or ``auto`` for the
    first of these that there is; ``heard`` are a recogniser's words. ``agent_lag_s``
    is taken off the agent's times, words of the text stream excepted.
    """
    assert item.agent is not None
    pcm = item.agent.read(VAD_RATE)
    duration_s = len(pcm) / VAD_RATE
    agent = _earlier(detector(pcm), agent_lag_s)
    words, source = _words(item, words_from, heard, agent_lag_s)
    user = turns = None
    if item.user is not None:
        user_pcm = item.user.read(VAD_RATE)
        duration_s = max(duration_s, len(user_pcm) / VAD_RATE)
        user = detector(user_pcm)
        turns = analyse(user, agent, words, duration_s, settings)
    return Measured(duration_s, user, agent, words, source, turns)


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
    moved = [segment.moved(-lag_s) for segment in segments]
    return [Segment(max(0.0, s.start_s), s.end_s) for s in moved if s.end_s > 0]


def _words_earlier(words: Sequence[Word], lag_s: float) -> list[Word]:
    return [
        Word(w.text, max(0.0, w.start_s - lag_s), max(0.0, w.end_s - lag_s), w.frame)
        for w in words
    ]
