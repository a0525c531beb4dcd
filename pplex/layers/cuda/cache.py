"""Keys and values of a batch of rows on CUDA, prompts shared.

Rows that begin after the same prompt read one copy of its keys and values, which then
come from the GPU's L2 cache: in conversations of half a minute that is a third of what
attention reads.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from pplex.layers.cache import GROWTH, KvCache
from pplex.layers.cuda.rows import attend_rows, use_cuda

KEPT_PROMPTS = 8
WIDTHS = 16, 32, 64, 128  # of heads, that the kernel knows


class SharedCache:
    """One ring for what the rows say, and their prompts beside it.

    Every step writes one slot of the ring for the whole batch. The kernel that attends
    also writes, without MLX's knowledge: whatever else changes the ring waits for it.
    """

    def __init__(self, like: KvCache, num_rows: int) -> None:
        """Empty rows; layers, heads, type and window are those of ``like``."""
        self.window = like.window
        arrays = like.arrays()
        self._num_layers = len(arrays) // 2
        _, self._heads, _, self._head_dim = arrays[0].shape
        self._dtype = arrays[0].dtype
        self._capacity = self._step = 0  # the next slot is ``step % capacity``
        self._stores: list[mx.array] = []  # (rows, heads, slots, head_dim)
        self._prompts: list[KvCache] = []
        self._prompt_stores: list[mx.array] = []  # (prompts, heads, slots, head_dim)
        # Of each row: positions it has had, how many of them its prompt has, and the
        # first that is still kept, the prompt's number.
        self._rows = np.zeros((num_rows, 4), np.int32)
        self._meta = mx.array(self._rows)
        self._place = mx.zeros(3, mx.int32)

    @staticmethod
    def serves(like: KvCache) -> bool:
        """Whether the kernel can attend to keys and values like these."""
        array = like.arrays()[0]
        return use_cuda() and array.dtype == mx.bfloat16 and array.shape[3] in WIDTHS

    def put(self, row: int, source: KvCache) -> None:
        """Replace ``row`` by one that starts after the prompt in ``source``."""
        found = (i for i, prompt in enumerate(self._prompts) if prompt is source)
        number = next(found, None)
        if number is None:
            number = self._add(source)
        kept = min(source.end, self.window)
        self._rows[row] = source.end, source.end, source.end - kept, number

    def leave(self, row: int) -> None:
        """Forget what ``row`` had; nobody uses it for now."""
        self._rows[row] = 0

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
        longest = max(min(prompt.end, self.window) for prompt in self._prompts)
        per_prompt = []
        for prompt in self._prompts:
            length = min(prompt.end, self.window)
            room = [(0, 0), (0, 0), (0, longest - length), (0, 0)]
            per_prompt.append([mx.pad(a, room) for a in prompt.ordered(length)])
        self._prompt_stores = [
            mx.concatenate(arrays) for arrays in zip(*per_prompt, strict=True)
        ]
        mx.eval(self._prompt_stores)

    def take(self, rows: list[int]) -> None:
        """Keep only ``rows``."""
        self._rows = self._rows[rows]
        self._replace(lambda store: store[mx.array(rows)])

    def _replace(self, change: Callable[[mx.array], mx.array]) -> None:
        """Exchange the arrays one by one, as two whole rings may not fit."""
        mx.synchronize()
        for idx, store in enumerate(self._stores):
            self._stores[idx] = change(store)
            del store
            mx.eval(self._stores[idx])

    def _grow(self, need: int) -> None:
        """Make room for ``need`` positions, or the window."""
        need = min(need, self.window)
        if need <= self._capacity:
            return
        have = self._capacity
        self._capacity = min(self.window, -(-need // GROWTH) * GROWTH)
        shape = len(self._rows), self._heads, self._capacity - have, self._head_dim
        room = mx.zeros(shape, self._dtype)
        if not have:
            self._stores = [mx.array(room) for _ in range(2 * self._num_layers)]
            self._replace(lambda store: store + 0)  # each its own memory
            return
        # Oldest slot first, so that the new ones come after the latest.
        turn = -(self._step % have)
        self._replace(
            lambda store: mx.concatenate([mx.roll(store, turn, axis=2), room], axis=2)
        )
        self._step = have

    def mask(self, t: int) -> None:
        """The kernel knows by itself what a row may see; here it is told where."""
        assert t == 1
        self._rows[self._rows[:, 1] == 0] = 0  # nobody's
        said = self._rows[:, 0] - self._rows[:, 1]
        self._grow(int(said.max()) + 1)
        self._meta = mx.array(self._rows)
        slots = self._capacity, self._prompt_stores[0].shape[2]
        self._place = mx.array([self._step % self._capacity, *slots], mx.int32)

    def attend(
        self, layer: int, qkv: mx.array, max_period: float, mask: None
    ) -> mx.array:
        """Attention of new positions (rows, 3 heads, 1, head_dim), which are added."""
        first, second = layer, layer + self._num_layers
        return attend_rows(
            qkv,
            (self._stores[first], self._stores[second]),
            (self._prompt_stores[first], self._prompt_stores[second]),
            self._meta,
            self._place,
            self.window,
            max_period,
        )

    def advance(self, t: int) -> None:
        """Count ``t`` positions as written in every row."""
        self._step += t
        self._rows[:, 0] += t
