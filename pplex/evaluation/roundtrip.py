"""What a recogniser hears against the model's own text: word errors and times."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pplex.errors import PplexError
from pplex.respond.transcript import Word

_NOT_A_WORD = re.compile(r"[^\w' ]")


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


def compare(said: Sequence[Word], heard: Sequence[Word]) -> RoundTrip:
    """Align the two by words, without case and punctuation."""
    try:
        import jiwer
    except ImportError as e:
        raise PplexError("word errors need jiwer: install pplex[score]") from e
    ours, theirs = plain(said), plain(heard)
    if ours:
        output = jiwer.process_words(
            " ".join(word.text for word in ours),
            " ".join(word.text for word in theirs),
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


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All recordings' words together."""
    names = ("words", "heard", "substitutions", "deletions", "insertions")
    total: dict[str, Any] = {name: sum(row[name] for row in rows) for name in names}
    wrong = sum(total[name] for name in names[2:])
    total["word_error_rate"] = (
        round(wrong / total["words"], 4) if total["words"] else None
    )
    total["recordings"] = len(rows)
    return total


def _disagreement(said: Sequence[Word], heard: Sequence[Word]) -> Disagreement:
    both = [*said, *heard]
    return Disagreement(
        min(word.start_s for word in both),
        max(word.end_s for word in both),
        " ".join(word.text for word in said),
        " ".join(word.text for word in heard),
    )
