"""What a recogniser hears, compared with the model's own text: word errors, where."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pplex.errors import PplexError
from pplex.evaluation.speech_activity import (
    VAD_RATE,
    Segment,
    VadSettings,
    energy_segments,
    merge,
)
from pplex.respond.transcript import Word

Hear = Callable[[np.ndarray], list[tuple[str, float, float]]]

_CUT_AT_S = 0.5  # silences at which a track is cut into utterances
_LONGEST_S = 30.0
_MARGIN_S = 0.15
_NOT_A_WORD = re.compile(r"[^\w' ]")


@dataclass(frozen=True)
class Recogniser:
    """Hears 16 kHz PCM (samples,) as words with their times in the track."""

    name: str
    version: str
    hear: Hear
    details: dict[str, object] = field(default_factory=dict)

    def __call__(self, pcm: np.ndarray) -> list[Word]:
        """Hear the track utterance by utterance."""
        words = []
        for utterance in utterances(pcm):
            start = round(utterance.start_s * VAD_RATE)
            heard = self.hear(pcm[start : round(utterance.end_s * VAD_RATE)])
            words += [
                Word(
                    text,
                    utterance.start_s + begin,
                    min(utterance.start_s + end, utterance.end_s),
                    0,
                )
                for text, begin, end in heard
            ]
        return words

    def describe(self) -> dict[str, object]:
        """Name, version and what it was given, for the output."""
        return {"name": self.name, "version": self.version, **self.details}


def utterances(pcm: np.ndarray) -> list[Segment]:
    """Cut at silences; what is too long is cut at its length."""
    speech = merge(energy_segments(pcm, VadSettings()), _CUT_AT_S)
    length_s = len(pcm) / VAD_RATE
    found = []
    for segment in speech:
        start, end = segment.start_s - _MARGIN_S, segment.end_s + _MARGIN_S
        start, end = max(0.0, start), min(length_s, end)
        while end - start > _LONGEST_S:
            found.append(Segment(start, start + _LONGEST_S))
            start += _LONGEST_S
        found.append(Segment(start, end))
    return found


@dataclass(frozen=True)
class Disagreement:
    """Words said and heard otherwise, and when; either may be empty."""

    start_s: float
    end_s: float
    said: str
    heard: str


@dataclass(frozen=True)
class RoundTrip:
    """Word errors of one recording; the rate is None where nothing was said."""

    words: int
    heard: int
    substitutions: int
    deletions: int
    insertions: int
    word_error_rate: float | None
    disagreements: list[Disagreement]

    @property
    def errors(self) -> int:
        """Words that were not heard as they were meant."""
        return self.substitutions + self.deletions + self.insertions


def compare(said: Sequence[Word], heard: Sequence[Word]) -> RoundTrip:
    """Align the two by words, without case and punctuation."""
    try:
        import jiwer
    except ImportError as e:
        raise PplexError("word errors need jiwer: install pplex[score]") from e
    ours, theirs = plain(said), plain(heard)
    if ours:
        output = jiwer.process_words(
            " ".join(word.text for word in ours), " ".join(word.text for word in theirs)
        )
        chunks = output.alignments[0]
    else:  # jiwer refuses an empty reference
        chunks = []
    disagreements = [
        _disagreement(
            ours[c.ref_start_idx : c.ref_end_idx],
            theirs[c.hyp_start_idx : c.hyp_end_idx],
        )
        for c in chunks
        if c.type != "equal"
    ]
    if not ours and theirs:
        disagreements = [_disagreement([], theirs)]
    counts = {
        kind: sum(
            max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx)
            for c in chunks
            if c.type == kind
        )
        for kind in ("substitute", "delete", "insert")
    }
    if not ours:
        counts["insert"] = len(theirs)
    wrong = sum(counts.values())
    return RoundTrip(
        words=len(ours),
        heard=len(theirs),
        substitutions=counts["substitute"],
        deletions=counts["delete"],
        insertions=counts["insert"],
        word_error_rate=wrong / len(ours) if ours else None,
        disagreements=disagreements,
    )


def plain(words: Sequence[Word]) -> list[Word]:
    """Lower-case words without punctuation; what is none is left out."""
    found = []
    for word in words:
        text = word.text.lower().replace("\u2019", "'").replace("-", " ")
        for part in _NOT_A_WORD.sub("", text).split():
            part = part.strip("'_")
            if part:
                found.append(Word(part, word.start_s, word.end_s, word.frame))
    return found


def _disagreement(said: Sequence[Word], heard: Sequence[Word]) -> Disagreement:
    both = [*said, *heard]
    return Disagreement(
        min(word.start_s for word in both),
        max(word.end_s for word in both),
        " ".join(word.text for word in said),
        " ".join(word.text for word in heard),
    )
