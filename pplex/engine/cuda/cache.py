"""Keys and values of a batch of rows on CUDA, prompts shared.

Rows that begin after the same prompt read one copy of its keys and values, sixteen rows
together: in conversations of half a minute that is a third of what attention reads.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from pplex.engine.cuda.rows import TILE, WIDTHS, attend_rows
from pplex.engine.mlx.exchange import Exchange
from pplex.engine.mlx.ring import RING_STEP, Ring
from pplex.model.cache import KvCache, Mask, written_out

KEPT_PROMPTS = 8


class SharedCache:
    """One ring for what the rows say, and their prompts beside it.

    Every step writes one slot of the ring for the whole batch. The kernel that attends
    also writes, without MLX's knowledge: whatever else changes the ring waits for it.
    """

    def __init__(self, like: KvCache, num_rows: int, exchange: Exchange) -> None:
        """Empty rows; layers, heads, type and window are those of ``like``."""
        self._ring, self._bits = Ring(like, num_rows), like.bits
        self._exchange = exchange
        self._prompts: list[KvCache] = []
        self._prompt_stores: list[mx.array] = []  # (prompts, heads, slots, head_dim)
        # Of each layer keys and values in bfloat16, which many rows read at once.
        self._shown: list[tuple[mx.array, mx.array]] = []
        # Of each row: positions it has had, how many of them its prompt has, and the
        # first that is still kept, the prompt's number.
        self._rows = np.zeros((num_rows, 4), np.int32)
        self._meta: mx.array
        self._tiles: mx.array | None = None  # made anew when rows or prompts change

    @staticmethod
    def serves(like: KvCache) -> bool:
        """Whether the kernel can attend to keys and values like these.

        They are a prompt's: without one there is nothing to share.
        """
        array = like.arrays()[0]
        width = array.shape[3] if like.bits is None else 4 * array.shape[3]
        is_known = array.dtype != mx.float32 and width in WIDTHS
        return like.end > like.said and is_known

    def put(self, row: int, source: KvCache, room: int = 0) -> None:
        """Replace ``row`` by one that starts after the prompt in ``source``.

        ``room`` more positions have their place at once.
        """
        said = min(source.said, self._ring.window)
        if room:
            self._ring.grow(said + room, RING_STEP)
        found = (i for i, prompt in enumerate(self._prompts) if prompt is source)
        number = next(found, None)
        if number is None:
            number = self._add(source)
        before = source.end - source.said
        kept = min(before, self._ring.window)
        self._rows[row] = source.end, before, before - kept, number
        self._tiles = None
        if said:
            self._ring.grow(said + 1)
            self._ring.put(row, source.ordered(said))

    def save(self, row: int) -> KvCache:
        """A cache from which ``row`` can go on, once its arrays are copied."""
        end, before, first, number = self._rows[row].tolist()
        window = self._ring.window
        cache = KvCache(self._ring.num_layers, window, bits=self._bits)
        cache.end, cache.said = end, end - before
        filled, said = min(end, window), min(end - before, window)
        stretch = slice(end - filled - first, before - first)
        arrays = self._ring.latest(row, said)
        if said < filled:
            pairs = zip(self._prompt_stores, arrays, strict=True)
            arrays = [
                mx.concatenate([prompt[number : number + 1, :, stretch], new], axis=2)
                for prompt, new in pairs
            ]
        turn = end % window if filled == window else 0
        cache.put([mx.roll(array, turn, 2) for array in arrays])
        return cache

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
        window = self._ring.window
        lengths = [min(p.end - p.said, window) for p in self._prompts]
        per_prompt = []
        for prompt, length in zip(self._prompts, lengths, strict=True):
            # What has left the window since is zeros, so that all lies as before.
            held = max(0, min(prompt.end, window) - prompt.said)
            room = [(0, 0), (0, 0), (length - held, max(lengths) - length), (0, 0)]
            whole = prompt.ordered(min(prompt.end, window))
            per_prompt.append([mx.pad(a[:, :, :held], room) for a in whole])
        self._prompt_stores = [
            mx.concatenate(list(arrays)) for arrays in zip(*per_prompt, strict=True)
        ]
        layers = self._ring.num_layers
        self._shown = [
            self._show(self._prompt_stores[layer::layers]) for layer in range(layers)
        ]
        mx.eval(self._prompt_stores, self._shown)

    def _show(self, kept: list[mx.array]) -> tuple[mx.array, mx.array]:
        """A layer's keys and values in bfloat16."""
        if self._bits is None:
            return kept[0], kept[1]
        keys, scales, values, value_scales = kept
        return (
            written_out((keys, scales), mx.bfloat16),
            written_out((values, value_scales), mx.bfloat16),
        )

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
        self._meta = self._exchange.send(self._rows)
        if self._tiles is None:
            self._tiles = self._exchange.send(self._make_tiles())

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
        y = attend_rows(
            qkv.transpose(2, 1, 0, 3),
            self._ring.of_layer(layer),
            self._shown[layer],
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
