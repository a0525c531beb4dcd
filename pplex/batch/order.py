"""In which order a batch answers its recordings."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

_PARTS = 8
# What the host does in a step, and for each recording that ends and the one that begins
# there, in steps of 256 rows: estimated on an H200, where a GPU waits for no less.
_HOST, _CHANGE = 0.6, 0.1


def in_order(frames: Sequence[int], rows: int) -> list[int]:
    """Indices of recordings of so many frames, so that few of ``rows`` idle at the end.

    The longest come first, after what the rows begin with: that is taken from all of
    them or from some of the longest, evenly. Rows that began with the longest alone
    would be free at one time later, as whoever began with less goes on with more. Which
    of several such orders is done soonest is tried out.
    """
    longest = sorted(range(len(frames)), key=lambda idx: -frames[idx])
    spare = len(frames) - rows
    if spare <= 0:
        return longest
    orders = (
        _begun_with(longest, rows, rows + spare * part // _PARTS)
        for part in range(_PARTS + 1)
    )
    return min(orders, key=lambda order: _steps([frames[i] for i in order], rows))


def _begun_with(longest: list[int], rows: int, among: int) -> list[int]:
    """``rows`` of so many first ones, and then the rest."""
    chosen = [longest[i * among // rows] for i in range(rows)]
    rest = set(chosen)
    return chosen + [idx for idx in longest if idx not in rest]


def _steps(frames: Sequence[int], rows: int) -> float:
    """About how many steps recordings take in this order."""
    ends = [0] * rows
    changes: Counter[int] = Counter()
    for count in frames:
        changes[ends[0]] += 1
        heapq.heapreplace(ends, ends[0] + count)
    del changes[0]  # all orders begin so
    return max(ends) + sum(max(0.0, _HOST + _CHANGE * n - 1) for n in changes.values())
