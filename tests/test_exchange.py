"""Memory that the host and a GPU share, with a GPU that takes its time."""

from __future__ import annotations

import ctypes

import mlx.core as mx
import numpy as np
import pytest

from pplex.engine.cuda import exchange


@pytest.fixture
def late(monkeypatch):
    """What a GPU has been told to copy: calls that do it."""
    held, copies = [], []

    def allocate(size):
        held.append(ctypes.create_string_buffer(size))
        return ctypes.addressof(held[-1])

    def kernel(inputs, outputs, scalars, blocks):
        """As exchange.cu says it; a send gives what is copied to, as NumPy's."""
        low, high, count, sends = scalars
        address = (high & 0xFFFFFFFF) << 32 | low & 0xFFFFFFFF
        there = np.ctypeslib.as_array(
            (ctypes.c_uint32 * (64 + count)).from_address(address)
        )
        y = np.zeros(count, np.uint32) if sends else mx.zeros(1, mx.int32)

        def copy():
            if sends:
                y[:] = there[64:]
            else:
                there[64:] = np.array(inputs[0]).view(np.uint32).reshape(-1)
            there[: blocks[0]] = 1

        copies.append(copy)
        return [y]

    monkeypatch.setattr(exchange, "pinned_memory", allocate)
    monkeypatch.setattr(exchange, "_kernel", lambda: kernel)
    return copies, held


def test_memory_is_used_again_only_once_all_that_was_there_is_where_it_belongs(late):
    copies, held = late
    ours = exchange.PinnedExchange()
    first, second = (np.full(9, value, np.float32) for value in (1, 2))
    sent = [ours.send(first), ours.send(second)]  # the first is still on its way
    for copy in copies:
        copy()
    assert [y.view(np.float32).tolist() for y in sent] == [[1] * 9, [2] * 9]
    copies.clear()
    coming = ours.bring(mx.full((3,), 7, mx.int32))
    copies.pop()()
    again = ours.send(first)
    copies.pop()()
    assert coming.read().tolist() == [7, 7, 7]
    assert again.view(np.float32).tolist() == [1] * 9
    assert len(held) == 2
    del coming
    unread = ours.bring(mx.zeros(3, mx.int32))
    copies.pop()()
    del unread
    assert ours.send(second) is not None and ours.send(first) is not None
    assert len(held) == 2
