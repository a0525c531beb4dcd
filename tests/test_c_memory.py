"""The memory of keys and values."""

import numpy as np
import pytest

from pplex.engine.c.memory import HUGE_PAGE, Pool, zeros


@pytest.mark.parametrize("huge", [True, False])
@pytest.mark.parametrize("missing", ["MADV_HUGEPAGE", None])
@pytest.mark.parametrize("count", [0, 7, HUGE_PAGE // 8, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_large_arrays_and_small_ones_are_zeros(count, missing, huge, monkeypatch):
    if missing:
        monkeypatch.delattr("mmap." + missing, raising=False)
    array = zeros((count, 2), np.uint8, huge=huge)
    assert array.shape == (count, 2) and array.dtype == np.uint8
    assert not array.any() and array.flags.writeable and array.flags.c_contiguous


def test_a_pool_gives_what_came_back_and_keeps_only_so_much():
    pool = Pool(most_bytes=1000)
    small, large = pool.take(100), pool.take(200)
    assert len(small) >= 100 and len(large) >= 200 and small is not large
    pool.give_back(small)
    assert pool.take(101) is not small
    assert pool.take(90) is small
    pool.give_back(small)
    pool.give_back(large)  # more than is kept
    assert pool.take(50) is large
    assert pool.take(50) is not small
