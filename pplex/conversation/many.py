"""Many recordings at once: rows of one batch, each at its own place.

A row is taken by the next recording as soon as the one before has ended. All rows go
through ``generate``, the one step loop; the codec works recording by recording on CPUs
and on groups of them on GPUs.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import replace

import mlx.core as mx
import numpy as np

from pplex.audio.files import frames_of
from pplex.codec.codec import MlxCodec
from pplex.conversation.generate import Step, generate, make_sampler
from pplex.conversation.grouped import GroupedRow, decode_group, encode_group
from pplex.conversation.prompt import LmState
from pplex.conversation.results import Item, Result, Row
from pplex.conversation.session import Model, Reply, Track, chunk_frames
from pplex.conversation.worker import codec_worker
from pplex.layers.cache import KvCache, RowCaches, SlotCache
from pplex.layers.cuda.cache import SharedCache
from pplex.layers.device import device_info, on_cpu
from pplex.model.config import LmConfig
from pplex.model.depformer import NOT_FORCED
from pplex.model.native import NativeCache, native_lm
from pplex.model.sampling import Sampler, SamplingConfig

GROUP = 16  # recordings encoded or decoded together


def converse_many(
    model: Model,
    items: Iterable[Item],
    sampling: SamplingConfig,
    *,
    batch_size: int,
) -> Iterator[Result]:
    """Answer ``items``, at most ``batch_size`` at a time, in the order they end.

    One item more than there are rows is asked for, whose codes are made before a row
    is free; or, where the codec works on many at a time, ``GROUP`` items when one is.
    """
    sampler = make_sampler(model.config.lm, sampling)
    if in_groups(model):
        yield from _converse_grouped(model, items, sampler, batch_size)
        return
    with codec_worker(model.codec, beside=batch_size) as worker:
        rows = _Rows(model, iter(items), batch_size, worker)
        done: deque[_TrackRow] = deque()
        for step in generate(model.lm, rows.state, rows.user_columns(), sampler):
            owners = rows.owners.popleft()
            share = replace(step, seconds=step.seconds / len(owners))
            for idx, owner in enumerate(owners):
                if isinstance(owner, _TrackRow) and owner.push(share, idx):
                    done.append(owner)
            # Where decoding cannot keep up it is waited for: nothing piles up.
            while done and (done[0].is_decoded or len(done) > batch_size):
                yield done.popleft().result()
        for row in done:
            yield row.result()


def in_groups(model: Model) -> bool:
    """Whether the codec works on many recordings at a time: on GPUs."""
    return isinstance(model.codec, MlxCodec) and not on_cpu()


def _converse_grouped(
    model: Model, items: Iterable[Item], sampler: Sampler, batch_size: int
) -> Iterator[Result]:
    """``converse_many`` with the codec's work done in groups.

    A result a step is given away: what is done with it runs beside the step that the
    GPU makes meanwhile.
    """
    rows = _Rows(model, iter(items), batch_size, None)
    done: list[GroupedRow] = []
    decoded: deque[Result] = deque()
    for step in generate(model.lm, rows.state, rows.user_columns(), sampler):
        owners = rows.owners.popleft()
        share = replace(step, seconds=step.seconds / len(owners))
        for idx, owner in enumerate(owners):
            if isinstance(owner, GroupedRow) and owner.push(share, idx):
                done.append(owner)
        if len(done) >= GROUP:
            decoded.extend(decode_group(model, done))
            done = []
        if decoded:
            yield decoded.popleft()
    yield from decoded
    if done:
        yield from decode_group(model, done)


class _TrackRow(Row):
    """One recording under way, its codec's work done a chunk at a time."""

    def __init__(self, model: Model, item: Item, worker: Executor | None) -> None:
        frames = frames_of(item.pcm, model.config.frame_size)
        size = chunk_frames()
        chunks = (frames[i : i + size] for i in range(0, len(frames), size))
        self._track = Track(model, item.prefilled.prompt, chunks, size, worker)
        super().__init__(item, len(frames), self._track.user_columns())
        self._answered = 0
        self._replies: list[Reply] = []

    def push(self, step: Step, idx: int) -> bool:
        """Add the agent's column, row ``idx`` of ``step``; whether it was the last."""
        self._answered += 1
        if reply := self._track.push(step, idx):
            self._replies.append(reply)
        if self._answered < self.num_frames:
            return False
        if reply := self._track.end():
            self._replies.append(reply)
        return True

    @property
    def is_decoded(self) -> bool:
        """Whether ``result`` waits for nothing."""
        return self._track.is_decoded

    def result(self) -> Result:
        """The whole answer, after the last column."""
        self._replies.extend(self._track.finish())
        pcm = np.concatenate([r.pcm for r in self._replies])
        return Result(
            key=self.item.key,
            agent_pcm=pcm[: len(self.item.pcm)],
            text=np.concatenate([r.text for r in self._replies]),
            agent=np.concatenate([r.agent for r in self._replies], axis=1),
            user=np.concatenate([r.user for r in self._replies], axis=1),
            timings=self._track.timings,
        )


class _Rows:
    """Who sits in which row, and the state that goes with it."""

    def __init__(
        self,
        model: Model,
        items: Iterator[Item],
        batch_size: int,
        worker: Executor | None,
    ) -> None:
        self._model = model
        self._worker = worker
        self._items = items
        self._batch_size = batch_size
        self._ready: deque[GroupedRow] = deque()
        self._coming: _TrackRow | None = None
        self._seated: list[Row | None] = []
        self.owners: deque[list[Row | None]] = deque()
        nobody = mx.zeros((0, model.config.lm.num_streams), mx.int32)
        self.state = LmState(RowCaches([]), nobody, None, [], [])

    def user_columns(self) -> Iterator[mx.array]:
        """Fill the rows and yield the user's column of each, until all are done."""
        num_codebooks = self._model.config.lm.num_codebooks
        nothing = np.zeros(num_codebooks, np.int32)
        while True:
            if on_cpu():
                self._come_and_go()
            else:
                self._change_seats()
            if not any(self._seated):
                return
            self.owners.append(list(self._seated))
            columns = [row.next_column() if row else nothing for row in self._seated]
            yield mx.array(np.stack(columns))

    def _next_row(self) -> Row | None:
        if in_groups(self._model):
            return self._next_grouped()
        row = self._coming or self._new_row()
        self._coming = self._new_row() if row and self._worker else None
        return row

    def _new_row(self) -> _TrackRow | None:
        """A row with the next item, which begins to be encoded."""
        item = next(self._items, None)
        return None if item is None else _TrackRow(self._model, item, self._worker)

    def _next_grouped(self) -> GroupedRow | None:
        if not self._ready:
            free = self._batch_size - sum(row is not None for row in self._seated)
            group = list(itertools.islice(self._items, max(GROUP, free)))
            if group:
                self._ready.extend(encode_group(self._model, group))
        return self._ready.popleft() if self._ready else None

    def _come_and_go(self) -> None:
        """A cache a row, as many rows as there are recordings.

        What a row computes is the same bits as if it were alone.
        """
        stay = [i for i, row in enumerate(self._seated) if row and not row.all_asked]
        come: list[Row] = []
        while len(stay) + len(come) < self._batch_size and (row := self._next_row()):
            come.append(row)
        if come or len(stay) < len(self._seated):
            states = [_row_of(self.state, i) for i in stay]
            for gone in set(range(len(self._seated))) - set(stay):
                _release(self.state, gone)
            states += [row.start(self._model.config.lm) for row in come]
            self._seated = [self._seated[i] for i in stay] + come
            _join(self.state, states)

    def _change_seats(self) -> None:
        """One ring for all rows; a row that nobody takes idles.

        When half of the rows idle, the rest move together.
        """
        if not self._seated:
            self._seated = [None] * self._batch_size
        for idx, row in enumerate(self._seated):
            if row and not row.all_asked:
                continue
            self._seated[idx] = row = self._next_row()
            if row:
                start = row.start(self._model.config.lm)
                _put(self.state, idx, start, len(self._seated))
            elif isinstance(self.state.cache, SharedCache):
                self.state.cache.leave(idx)
        taken = [i for i, row in enumerate(self._seated) if row]
        if taken and 2 * len(taken) <= len(self._seated):
            self._seated = [self._seated[i] for i in taken]
            _take(self.state, taken)


def _row_of(state: LmState, idx: int) -> LmState:
    """Row ``idx`` of a state whose rows have caches of their own."""
    assert isinstance(state.cache, RowCaches)
    return LmState(
        cache=state.cache.rows[idx],
        column=state.column[idx : idx + 1],
        pending=None if state.pending is None else state.pending[idx : idx + 1],
        seeds=state.seeds[idx : idx + 1],
        frames=state.frames[idx : idx + 1],
    )


def _release(state: LmState, idx: int) -> None:
    """Row ``idx``, which has ended, leaves its memory to those that come."""
    assert isinstance(state.cache, RowCaches)
    cache = state.cache.rows[idx]
    if isinstance(cache, NativeCache):
        cache.release()


def _join(state: LmState, rows: list[LmState]) -> None:
    """Make ``state`` of ``rows``, each with its own cache."""
    state.cache = RowCaches([row.cache for row in rows])
    if not rows:
        return
    native = isinstance(rows[0].column, np.ndarray)
    concatenate = np.concatenate if native else mx.concatenate
    state.column = concatenate([row.column for row in rows])
    state.seeds = [row.seeds[0] for row in rows]
    state.frames = [row.frames[0] for row in rows]
    given = next((row.pending for row in rows if row.pending is not None), None)
    state.pending = None
    if given is not None:
        free = np.full(given.shape, NOT_FORCED, np.int32)
        free = free if native else mx.array(free)
        pending = [free if row.pending is None else row.pending for row in rows]
        state.pending = concatenate(pending)


def _put(state: LmState, idx: int, row: LmState, num_rows: int) -> None:
    """Put ``row`` in place ``idx`` of a state whose ``num_rows`` rows share a ring."""
    assert isinstance(row.cache, KvCache) and row.pending is not None
    if not isinstance(state.cache, SlotCache | SharedCache):
        ring = SharedCache if SharedCache.serves(row.cache) else SlotCache
        state.cache = ring(row.cache, num_rows)
        state.column = mx.repeat(row.column, num_rows, axis=0)
        state.seeds, state.frames = [0] * num_rows, [0] * num_rows
    if state.pending is None:
        shape = (num_rows, row.pending.shape[1])
        state.pending = mx.full(shape, NOT_FORCED, row.pending.dtype)
    state.cache.put(idx, row.cache)
    column, pending = mx.array(state.column), mx.array(state.pending)
    column[idx : idx + 1] = row.column
    pending[idx : idx + 1] = row.pending
    state.column, state.pending = column, pending
    state.seeds[idx], state.frames[idx] = row.seeds[0], row.frames[0]


def _take(state: LmState, rows: list[int]) -> None:
    """Keep only ``rows`` of a state whose rows share a ring."""
    assert isinstance(state.cache, SlotCache | SharedCache)
    state.cache.take(rows)
    chosen = mx.array(rows)
    state.column = state.column[chosen]
    state.pending = None if state.pending is None else state.pending[chosen]
    state.seeds = [state.seeds[i] for i in rows]
    state.frames = [state.frames[i] for i in rows]


MAX_ROWS_CPU = 16  # of these, a product's rows are the same bits as alone (_blas.c)
MIN_ROWS_CPU = 4  # so many are computed with each vector of weights that is read
FULL_ROWS_CPU = 8  # more than these share in no vector of weights (_lm.h)
# Keys and values are read by every step: twice as fast from a cache as from memory.
# `mini`: 0.25 ms a frame with 4 rows, 0.225 with 8 at 325 positions; 0.74 and 1.25 at
# 1500. These are of the longest recordings at their end, twice what is read on average.
CACHE_BYTES = 96 << 20
MAX_ROWS_GPU = 256
MEMORY_SHARE = 0.85


def rows_on_cpu(lm: LmConfig, max_frames: int, weights_bytes: float) -> int:
    """How many recordings of up to ``max_frames``, prompts included, answer at once.

    As many as a cache holds keys and values of, up to a product's; or, where weights
    take more, as weights take, for each row's share in reading these is less the more
    rows there are.
    """
    per_row = 2 * lm.num_layers * lm.dim * 4 * min(lm.window, max_frames)
    rows = max(min(CACHE_BYTES // per_row, FULL_ROWS_CPU), int(weights_bytes / per_row))
    return min(max(rows, MIN_ROWS_CPU), MAX_ROWS_CPU)


def auto_batch_size(model: Model, max_frames: int, count: int) -> int:
    """How many of ``count`` recordings to answer at once.

    ``max_frames`` is the most frames any of them has, its prompt included.
    """
    lm = model.config.lm
    if on_cpu():
        native = native_lm(model.lm)
        weights = native.matrix_bytes if native else 0
        return max(1, min(count, rows_on_cpu(lm, max_frames, weights)))
    positions = min(lm.window, max_frames)
    per_position = 2 * lm.num_layers * lm.dim * 2  # keys and values, 16 bits
    # The ring is copied when it grows, an array of many at a time.
    per_row = 1.1 * positions * per_position
    info = device_info()
    total = info.get("total_memory") or info.get("max_recommended_working_set_size")
    free = info.get("free_memory") or int(total or 0) - mx.get_active_memory()
    return max(1, min(count, MAX_ROWS_GPU, int(MEMORY_SHARE * int(free) / per_row)))
