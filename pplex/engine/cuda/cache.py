"""Keys and values of a batch of rows on CUDA, prompts shared.

Rows that begin after the same prompt read one copy of its keys and values, sixteen rows
together: in conversations of half a minute that is a third of what attention reads.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from pplex.engine.cuda.rows import TILE, WIDTHS, attend_rows
from pplex.engine.mlx.ring import Ring
from pplex.model.cache import KvCache, Mask

KEPT_PROMPTS = 8


class SharedCache:
    """One ring for what the rows say, and their prompts beside it.

    Every step writes one slot of the ring for the whole batch. The kernel that attends
    also writes, without MLX's knowledge: whatever else changes the ring waits for it.
    """

    def __init__(self, like: KvCache, num_rows: int) -> None:
        """Empty rows; layers, heads, type and window are those of ``like``."""
        self._ring = Ring(like, num_rows)
        self._prompts: list[KvCache] = []
        self._prompt_stores: list[mx.array] = []  # (prompts, heads, slots, head_dim)
        # Of each row: positions it has had, how many of them its prompt has, and the
        # first that is still kept, the prompt's number.
        self._rows = np.zeros((num_rows, 4), np.int32)
        self._meta = mx.array(self._rows)
        self._tiles: mx.array | None = None  # made anew when rows or prompts change

    @staticmethod
    def serves(like: KvCache) -> bool:
        """Whether the kernel can attend to keys and values like these.

        They are a prompt's: without one there is nothing to share.
        """
        array = like.arrays()[0]
        return like.end > 0 and array.dtype == mx.bfloat16 and array.shape[3] in WIDTHS

    def put(self, row: int, source: KvCache) -> None:
        """Replace ``row`` by one that starts after the prompt in ``source``."""
        found = (i for i, prompt in enumerate(self._prompts) if prompt is source)
        number = next(found, None)
        if number is None:
            number = self._add(source)
        kept = min(source.end, self._ring.window)
        self._rows[row] = source.end, source.end, source.end - kept, number
        self._tiles = None

    def leave(self, row: int) -> None:
        """Forget what ``row`` had; nobody uses it for now."""
        self._rows[row] = 0
        self._tiles = None

    def _add(self, source: KvCache) -> int:
        mx.synchronize()
        if len(self._prompts) >= KEPT_PROMPTS:
            self._forget()
        self._prompts.append(source)
        self._stack_prompts()
        return len(self._prompts) - 1

    def _forget(self) -> None:
        """Drop prompts that no row has."""
        used = sorted(set(self._rows[:, 3].tolist()))
        self._prompts = [self._prompts[i] for i in used]
        self._rows[:, 3] = np.searchsorted(used, self._rows[:, 3])

    def _stack_prompts(self) -> None:
        longest = max(min(prompt.end, self._ring.window) for prompt in self._prompts)
        per_prompt = []
        for prompt in self._prompts:
            length = min(prompt.end, self._ring.window)
            room = [(0, 0), (0, 0), (0, longest - length), (0, 0)]
            per_prompt.append([mx.pad(a, room) for a in prompt.ordered(length)])
        self._prompt_stores = [
            mx.concatenate(list(arrays)) for arrays in zip(*per_prompt, strict=True)
        ]
        mx.eval(self._prompt_stores)

    def take(self, rows: list[int]) -> None:
        """Make the rows copies of these; a row may be there more than once."""
        self._rows = self._rows[rows]
        self._tiles = None
        self._ring.take(rows)

    def mask(self, t: int) -> None:
        """The kernel knows what a row may see, once it is told of the rows."""
        assert t == 1
        self._rows[self._rows[:, 1] == 0] = 0  # nobody's
        said = self._rows[:, 0] - self._rows[:, 1]
        self._ring.grow(int(said.max()) + 1)
        self._meta = mx.array(self._rows)
        if self._tiles is None:
            self._tiles = mx.array(self._make_tiles())

    def _make_tiles(self) -> np.ndarray:
        """Rows by their prompts, ``TILE`` at a time; at least one tile."""
        tiles = []
        for number in range(len(self._prompts)):
            has_it = (self._rows[:, 3] == number) & (self._rows[:, 1] > 0)
            rows = np.flatnonzero(has_it)
            for first in range(0, len(rows), TILE):
                some = rows[first : first + TILE]
                tiles.append([number, *some, *[-1] * (TILE - len(some))])
        return np.array(tiles or [[0] + [-1] * TILE], np.int32)

    def attend(
        self, layer: int, qkv: mx.array, max_period: float, mask: Mask
    ) -> mx.array:
        """Attention of a new position of each row, which is added.

        ``qkv`` is (1, 3 heads, rows, head_dim), with rows of nobody behind.
        """
        assert self._tiles is not None  # `mask` comes first
        half = len(self._prompt_stores) // 2
        y = attend_rows(
            qkv.transpose(2, 1, 0, 3),
            self._ring.keys_values(layer),
            (self._prompt_stores[layer], self._prompt_stores[layer + half]),
            self._meta,
            self._tiles,
            self._ring.slot,
            self._ring.window,
            max_period,
        )
        return y.transpose(2, 1, 0, 3)

    def advance(self, t: int) -> None:
        """Count ``t`` positions as written in every row."""
        self._ring.advance(t)
        self._rows[:, 0] += t
