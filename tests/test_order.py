"""The order in which a batch answers."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from pplex.batch.order import in_order


def played(frames: list[int], rows: int) -> tuple[int, int]:
    """When all is done if a free row takes the next, and the most changes in a step."""
    free, begun = [0] * rows, Counter()
    for count in frames:
        row = free.index(min(free))
        begun[free[row]] += 1
        free[row] += count
    return max(free), max(count for at, count in begun.items() if at)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_rows_are_busy_longer_and_do_not_end_together(seed):
    rng = random.Random(seed)
    frames = [rng.randint(25, 750) for _ in range(800)]
    order = in_order(frames, 256)
    assert sorted(order) == list(range(800))
    end, most = played([frames[idx] for idx in order], 256)
    longest_first_end, longest_first_most = played(sorted(frames, reverse=True), 256)
    least = sum(frames) / 256
    assert end < 1.04 * least < 1.06 * least < longest_first_end
    assert most < longest_first_most


@pytest.mark.parametrize("rows", [1, 2, 5, 9, 10, 30])
def test_every_recording_comes_once_and_the_shortest_last(rows):
    frames = [40, 3, 17, 17, 90, 5, 61, 8, 29, 33]
    order = in_order(frames, rows)
    assert sorted(order) == list(range(10))
    rest = [frames[idx] for idx in order[rows:]]
    assert rest == sorted(rest, reverse=True)
    if rows == 1 or rows >= 10:
        assert [frames[idx] for idx in order] == sorted(frames, reverse=True)
