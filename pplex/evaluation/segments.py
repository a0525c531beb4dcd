"""Stretches of time: joined, cut with one another, added up. Seconds throughout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# What floating-point arithmetic may add to a gap or a duration at a limit.
TOLERANCE_S = 1e-6


@dataclass(frozen=True, order=True)
class Segment:
    """From ``start_s`` up to ``end_s``."""

    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        """Its length."""
        return self.end_s - self.start_s

    def overlap_s(self, other: Segment) -> float:
        """How long both last at the same time."""
        return max(0.0, min(self.end_s, other.end_s) - max(self.start_s, other.start_s))

    def moved(self, seconds: float) -> Segment:
        """The same stretch, later by ``seconds``."""
        return Segment(self.start_s + seconds, self.end_s + seconds)


def merge(segments: Iterable[Segment], gap_s: float) -> list[Segment]:
    """Join segments whose gap is at most ``gap_s``."""
    merged: list[Segment] = []
    for segment in sorted(segments):
        last = merged[-1] if merged else None
        if last and segment.start_s - last.end_s <= gap_s + TOLERANCE_S:
            merged[-1] = Segment(last.start_s, max(last.end_s, segment.end_s))
        else:
            merged.append(segment)
    return merged


def gaps(segments: Sequence[Segment]) -> list[Segment]:
    """What lies between neighbours of a sorted list without overlaps."""
    pairs = zip(segments, segments[1:], strict=False)
    return [Segment(a.end_s, b.start_s) for a, b in pairs]


def common(ours: Sequence[Segment], theirs: Sequence[Segment]) -> list[Segment]:
    """Where both of two sorted lists have a segment."""
    found: list[Segment] = []
    i = j = 0
    while i < len(ours) and j < len(theirs):
        start = max(ours[i].start_s, theirs[j].start_s)
        end = min(ours[i].end_s, theirs[j].end_s)
        if end > start:
            found.append(Segment(start, end))
        if ours[i].end_s < theirs[j].end_s:
            i += 1
        else:
            j += 1
    return found


def total_s(segments: Iterable[Segment]) -> float:
    """Their durations added up."""
    return sum(segment.duration_s for segment in segments)
