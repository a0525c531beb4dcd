"""The engine of MLX's own operations, on a CPU or a GPU.

On a GPU what lies between two attentions is compiled, many rows share each step, and a
step is under way while the host does something else. A library's products are not the
same bits for every number of rows: so they always have as many, most of them nobody's
where few are busy. Where one row is faster by itself, that is another form. On a CPU
rows step one after the other.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import numpy as np

from pplex.checkpoint.layouts import Quantization
from pplex.checkpoint.weights import LmTensors, make_lm
from pplex.engine.base import (
    FORCED_FRAMES,
    Arrays,
    Codec,
    Cost,
    Logits,
    Pending,
    Rows,
    Start,
    codec_bytes,
    form_name,
    restored,
    save_place,
)
from pplex.engine.device import bound_memory, compute_dtype
from pplex.engine.mlx.codec import (
    CPU_FRAMES,
    GROUP_ROWS,
    MlxCodec,
    frames_within,
    work_bytes,
)
from pplex.engine.mlx.exchange import Coming, Exchange
from pplex.engine.mlx.ring import CacheEach, FastCache, take_rows
from pplex.engine.mlx.saved import restore_cache, save_cache, to_numpy
from pplex.model.cache import Cache, KvCache
from pplex.model.config import TEXT_PAD, MimiConfig, ModelConfig
from pplex.model.mimi import Mimi, make_mimi
from pplex.model.prompt import Prompt
from pplex.model.sampling import Sampler, SamplingConfig, noise_keys
from pplex.model.streams import INSTEAD, NOT_FORCED, TEXT_ROW
from pplex.model.transformer import RMS_NORM_EPS, RmsNorm, TemporalLayer

_CODEC_BYTES = 1e9  # of the codec's work, in a Mac's memory

# From a layer's input and attended values to its output and the next layer's queries,
# keys and values: all that happens between two attentions.
Joint = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]

# From the temporal transformer's output (rows, dim), the user's tokens, the noise's
# keys and what is given (only where there is any) to the next column (rows, streams).
Frame = Callable[[mx.array, dict[str, mx.array]], mx.array]

_Function = TypeVar("_Function", bound=Callable[..., Any])


class RowsCache(Cache, Protocol):
    """Keys and values of rows that come and go.

    It takes what is new as (1, 3 heads, rows, head_dim): rows that begin with its own,
    others behind them.
    """

    def put(self, row: int, source: KvCache, room: int) -> None:
        """Replace ``row`` by one that starts after the prompt in ``source``.

        It has room for ``room`` more positions.
        """

    def save(self, row: int) -> KvCache:
        """A cache from which ``row`` can go on, once its arrays are copied."""

    def leave(self, row: int) -> None:
        """Forget what ``row`` had; nobody uses it for now."""

    def take(self, rows: list[int]) -> None:
        """Make the rows copies of these; a row may be there more than once."""


class MlxEngine:
    """A language model and a codec as MLX's modules."""

    name = "mlx"
    is_async = True
    # Rows of every product on a GPU. Nothing was measured on a Mac: what is read with
    # each vector of weights there.
    gpu_rows = 16
    # Frames of a chunk of the codec, alone. On a Mac a frame's arithmetic takes about
    # half a millisecond, live with all of a chunk's, and launching a chunk a few.
    alone_frames = 4
    # Whether norms take bfloat16 as it is: without two casts each, and rounded twice.
    short_norms = True

    def __init__(
        self,
        config: ModelConfig,
        lm: LmTensors,
        codec: Mapping[str, mx.array],
        *,
        on_gpu: bool,
        alone: bool = False,
    ) -> None:
        """Take over ``lm``, which is emptied, and the codec's weights.

        With ``alone`` a row on a GPU is computed by itself.
        """
        dtype = compute_dtype(on_gpu)
        self.config = config
        self.exchange = self.make_exchange()
        self.dtype = str(dtype).removeprefix("mlx.core.")
        self.compute = form_name(not lm.forms, alone, config.kv_bits)
        self.on_gpu, self.alone = on_gpu, alone
        self._dtype = dtype
        self._num_rows = self.gpu_rows if on_gpu and not alone else 1
        # MLX 0.32.4, H100: NaN of 4-bit weights of one group of 64, from 2 rows on.
        if on_gpu and (narrow := [n for n in lm.forms if _has_one_group(lm, n)]):
            lm = lm.write_out(narrow)
        self._cost = cost_of(config, lm, on_gpu=on_gpu, alone=alone)
        bound_memory(self._cost.codec_work)
        self.lm = make_lm(config.lm, lm, dtype)
        if on_gpu and self.short_norms:
            for module in self.lm.modules():
                if isinstance(module, RmsNorm):
                    module.__class__ = _ShortNorm
                    module.weight = module.weight.astype(dtype)
            mx.eval(self.lm.parameters())  # what is compiled would cast them each time
        pairs = zip(self.lm.layers[:-1], self.lm.layers[1:], strict=True)
        self._joints = [self._joint(*pair) for pair in pairs]
        compile_ = mx.compile if on_gpu else _as_it_is
        self._compiled_joints = [compile_(joint) for joint in self._joints]
        self._compiled_finish = compile_(self.finish)
        self._embed = compile_(self.lm.embed)
        self._frames: dict[SamplingConfig, Frame] = {}
        self.codec: Codec = self._make_codec(make_mimi(config.mimi, codec))

    def prefill(self, prompt: Prompt) -> Start:
        """Read a prompt, so that conversations can start after it."""
        cache = self._make_cache()
        # What is read before the first step; where that is nothing, all for the arrays.
        last = -1 if prompt.num_frames > 1 else None
        saved = 0 if prompt.embeddings is None else len(prompt.embeddings)
        inputs = self.inputs(mx.array(prompt.columns[None, :, saved:last]))
        if prompt.embeddings is not None:
            embeddings = mx.array(prompt.embeddings[None]).astype(inputs.dtype)
            inputs = mx.concatenate([embeddings, inputs], axis=1)
        self.temporal(inputs, cache)
        cache.end, cache.said = prompt.num_frames - 1, 0
        mx.eval(cache.arrays())
        return Start(prompt, cache)

    def restore(self, saved: Arrays) -> Start:
        """Where a row was saved, so that conversations can go on from there."""
        cache, lm = self._make_cache(), self.config.lm
        head_dim = lm.dim // lm.num_heads
        restore_cache(cache, saved, lm.num_heads, head_dim, self._dtype)
        return restored(lm, saved, cache)

    def _make_cache(self) -> KvCache:
        kind = FastCache if self.on_gpu else KvCache
        lm, bits = self.config.lm, self.config.kv_bits
        return kind(lm.num_layers, lm.window, bits=bits)

    def rows(
        self, capacity: int, sampling: SamplingConfig, *, live: bool = False
    ) -> Rows:
        """Places for ``capacity`` conversations."""
        make_block = self._block_maker(sampling, live)
        sizes = [self._num_rows] * (capacity // self._num_rows)
        if rest := capacity % self._num_rows:
            sizes.append(rest)
        if len(sizes) == 1:
            return make_block(capacity)
        blocks = [(make_block(size), size) for size in sizes]
        return _RowsApart(blocks, self.config.lm.num_agent_streams)

    def _block_maker(
        self, sampling: SamplingConfig, live: bool
    ) -> Callable[[int], Rows]:
        """Makes rows that step together, at most as many as a product has."""
        sampler = Sampler.of(self.config.lm, sampling)
        if sampling not in self._frames:
            self._frames[sampling] = self.make_frame(sampler)
        frame = self._frames[sampling]
        return lambda size: _MlxRows(self, size, self._num_rows, sampler, frame, live)

    def forced(self, start: Start, columns: np.ndarray) -> Iterator[Logits]:
        """The logits of each of ``columns`` (streams, frames), given all before it."""
        cache = start.memory.copy()
        grid = np.concatenate([start.prompt.columns[:, -1:], columns], axis=1)
        for first in range(0, grid.shape[1] - 1, FORCED_FRAMES):
            last = min(first + FORCED_FRAMES, grid.shape[1] - 1)
            given = grid[: self.config.lm.num_agent_streams, first + 1 : last + 1].T
            x = self.temporal(self.inputs(mx.array(grid[None, :, first:last])), cache)
            yield self._logits(x.squeeze(0), mx.array(given))

    def _logits(self, x: mx.array, given: mx.array) -> Logits:
        """What is said of temporal outputs ``x`` (t, dim), if ``given`` is chosen."""
        hidden, text = self.lm.head(x)
        agent = self.lm.agent_logits(hidden, given)
        return Logits(np.array(text.astype(mx.float32)), np.array(agent))

    def embed(self, columns: np.ndarray) -> np.ndarray:
        """The model's inputs float32 (frames, dim) for columns (streams, frames)."""
        inputs = self.inputs(mx.array(columns[None])).squeeze(0)
        return np.array(inputs.astype(mx.float32))

    def cost(self) -> Cost:
        """What the model takes."""
        return self._cost

    # What engines of other kernels do their own way.

    def make_exchange(self) -> Exchange:
        """What brings arrays to MLX and back, step by step."""
        return Exchange()

    def inputs(self, tokens: mx.array) -> mx.array:
        """Summed rows (batch, t, dim) of tokens (batch, streams, t)."""
        is_step = tokens.shape[2] == self._num_rows
        return self._embed(tokens) if is_step else self.lm.embed(tokens)

    def lead(
        self, before: TemporalLayer, after: TemporalLayer, x: mx.array, y: mx.array
    ) -> tuple[mx.array, mx.array]:
        """A ``Joint`` of two layers."""
        x = before.finish(x, y)
        return x, after.split(x)

    def finish(self, x: mx.array, y: mx.array) -> mx.array:
        """The last layer's output."""
        return self.lm.layers[-1].finish(x, y)

    def make_frame(self, sampler: Sampler) -> Frame:
        """All of a frame after the temporal transformer."""
        frame = self.plain_frame(sampler)
        return mx.compile(frame) if self.on_gpu else frame

    def make_ring(self, like: KvCache, num_rows: int) -> RowsCache:
        """The keys and values of ``num_rows`` rows that step together."""
        return CacheEach(num_rows)

    def _make_codec(self, mimi: Mimi) -> Codec:
        return MlxCodec(
            mimi,
            on_gpu=self.on_gpu,
            alone=self.alone,
            frames=self.alone_frames if self.alone else _codec_frames(self.config.mimi),
            exchange=self.exchange,
        )

    def _joint(self, before: TemporalLayer, after: TemporalLayer) -> Joint:
        return lambda x, y: self.lead(before, after, x, y)

    def temporal(self, x: mx.array, cache: Cache) -> mx.array:
        """Run inputs (1, t, dim) as the next ``t`` positions; before the norm."""
        if x.shape[1] == 1:
            return self.step(x, cache)
        return self._layers(x, cache, x.shape[1], self._joints, self.finish)

    def step(self, x: mx.array, cache: Cache) -> mx.array:
        """Run inputs (1, rows, dim) as the next position of each; before the norm."""
        joints, finish = self._compiled_joints, self._compiled_finish
        return self._layers(x, cache, 1, joints, finish)

    def _layers(
        self,
        x: mx.array,
        cache: Cache,
        t: int,
        joints: Sequence[Joint],
        finish: Callable[[mx.array, mx.array], mx.array],
    ) -> mx.array:
        max_period, mask = self.config.lm.max_period, cache.mask(t)
        qkv = self.lm.layers[0].split(x)
        for idx, joint in enumerate(joints):
            x, qkv = joint(x, cache.attend(idx, qkv, max_period, mask))
        x = finish(x, cache.attend(len(joints), qkv, max_period, mask))
        cache.advance(t)
        return x

    def plain_frame(self, sampler: Sampler) -> Frame:
        """All of a frame after the temporal transformer, as specified."""
        lm = self.lm

        def frame(x: mx.array, inputs: dict[str, mx.array]) -> mx.array:
            rows = len(inputs["user"])
            inputs = {name: _padded(each, len(x)) for name, each in inputs.items()}
            noise = sampler.noise(inputs["keys"]) if "keys" in inputs else None
            given = inputs.get("given")
            hidden, logits = lm.head(x)
            text = sampler.text(logits, noise)
            if given is not None:
                text = take_given(text, given[:, TEXT_ROW])
            codes = lm.depformer(
                hidden,
                text,
                lambda logits, idx: sampler.audio(logits, noise, idx),
                None if given is None else given[:, 1:],
            )
            return _column([text, *codes], inputs["user"])[:rows]

        return frame


def take_given(text: mx.array, given: mx.array) -> mx.array:
    """Text ids (rows,) that were chosen, or those that are given in their place."""
    kept = mx.where(text <= TEXT_PAD, text, INSTEAD - given)
    return mx.where(given > NOT_FORCED, given, mx.where(given < NOT_FORCED, kept, text))


def _column(agent: Sequence[mx.array], user: mx.array) -> mx.array:
    """Columns int32 (rows, streams) of the agent's ids (rows,) and the user's codes.

    Compiled, the choice among many is one operation; to put them in a row is one each.
    """
    first = len(agent)
    streams = np.arange(first + user.shape[1])
    column = user[:, mx.array(np.maximum(streams - first, 0))]
    for stream, ids in enumerate(agent):
        here = mx.array(streams == stream)
        column = mx.where(here, ids[:, None].astype(mx.int32), column)
    return column


class _ShortNorm(RmsNorm):
    """RMS normalisation of bfloat16 by one operation, which sums in float32."""

    def __call__(self, x: mx.array) -> mx.array:
        """Normalise the last axis of ``x``."""
        return mx.fast.rms_norm(x, self.weight, RMS_NORM_EPS)


def _has_one_group(lm: LmTensors, name: str) -> bool:
    """Whether each row of a quantized matrix has one scale."""
    return lm.weights[f"{name}.scales"].shape[-1] == 1


def _as_it_is(function: _Function) -> _Function:
    return function


def _padded(x: mx.array, rows: int) -> mx.array:
    """``x`` (some rows, width) with zeros behind, as ``rows``."""
    return mx.pad(x, [(0, rows - len(x)), (0, 0)]) if rows > len(x) else x


def _codec_frames(config: MimiConfig) -> int:
    """Frames of a chunk of a group, where memory is shared with all else."""
    return frames_within(config, _CODEC_BYTES)


def cost_of(
    config: ModelConfig, lm: LmTensors, *, on_gpu: bool, alone: bool = False
) -> Cost:
    """What a model takes; of ``lm`` only shapes are read."""
    float_bytes = compute_dtype(on_gpu).size
    chunk = (_codec_frames(config.mimi), GROUP_ROWS)
    if alone or not on_gpu:
        chunk = (MlxEngine.alone_frames if on_gpu else CPU_FRAMES, 1)
    matrices = tables = 0
    for name, weight in lm.weights.items():
        module, _, part = name.rpartition(".")
        if part != "weight" or weight.ndim != 2:
            continue
        size = _stored_bytes(weight, lm.forms.get(module), float_bytes)
        if module.endswith("_emb"):
            tables += size
        else:
            matrices += size
    codec, codec_state = codec_bytes(config.mimi)
    return Cost(
        step=matrices,
        position=config.kv_bytes(float_bytes),
        codec=codec,
        codec_state=codec_state,
        codec_work=work_bytes(config.mimi, *chunk),
        held=matrices + tables + codec,
        alone=alone,
    )


def _stored_bytes(weight: mx.array, form: Quantization | None, float_bytes: int) -> int:
    """Bytes of a matrix, its scales and biases included."""
    if form is None:
        return weight.size * float_bytes
    values = weight.size * 32 // form.bits
    return weight.nbytes + 2 * float_bytes * values // form.group_size


class _MlxRows:
    """Rows that make each step together; one by itself has keys and values as a prompt.

    Products have ``num_rows`` rows, however many there are. A row that nobody takes
    idles. When half of them idle, the rest move together.
    """

    def __init__(
        self,
        engine: MlxEngine,
        capacity: int,
        num_rows: int,
        sampler: Sampler,
        frame: Frame,
        live: bool,
    ) -> None:
        config = engine.config.lm
        self._engine, self._frame, self._live = engine, frame, live
        self._reads_user = live or config.is_moshi
        self._draws = sampler.draws
        self._capacity, self._num_rows = capacity, num_rows
        self._num_agent = config.num_agent_streams
        self._cache: Any = None  # a RowsCache, or one row's KvCache
        self._places: list[int | None] = []  # by row
        self._column = mx.zeros((0, config.num_streams), mx.int32)
        self._given: mx.array | None = None
        self._seeds: list[int] = []
        self._frames: list[int] = []
        # By row: the column before the next step's, and what is given of that.
        self._joined: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def join(self, start: Start, seed: int, frames: int | None = None) -> int:
        """Begin a conversation after a prompt; its place."""
        taken = set(self._places)
        place = next(i for i in range(self._capacity) if i not in taken)
        row = self._free_row(start)
        room = self._engine.config.lm.window if self._live else frames or 0
        if self._num_rows == 1:
            self._cache = start.memory.copy()
            self._cache.reserve(room)
            mx.async_eval(self._cache.arrays())
        else:
            self._cache.put(row, start.memory, room)
        self._places[row] = place
        self._seeds[row], self._frames[row] = seed, start.steps
        prompt = start.prompt
        self._joined[row] = prompt.columns[:, -1], prompt.pending[: self._num_agent]
        return place

    def _seat(self) -> None:
        """Let the rows that joined begin, all at once: each change is a launch."""
        if not self._joined:
            return
        rows, width = self._column.shape
        is_new = np.zeros((rows, 1), bool)
        column = np.zeros((rows, width), np.int32)
        given = np.full((rows, self._num_agent), NOT_FORCED, np.int32)
        for row, (before, pending) in self._joined.items():
            is_new[row], column[row], given[row] = True, before, pending
        new, kept = mx.array(is_new), self._given
        self._column = mx.where(new, mx.array(column), self._column)
        self._given = mx.array(given)
        if kept is not None:
            self._given = mx.where(new, self._given, kept)
        self._joined.clear()

    def save(self, row: int, ahead: int = 0) -> dict[str, np.ndarray]:
        """What a conversation goes on from after the steps that were asked for."""
        self._seat()
        idx = self._places.index(row)
        given = np.full(self._num_agent, NOT_FORCED, np.int32)
        if self._given is not None:
            given = to_numpy(self._given[idx])
        column, steps = to_numpy(self._column[idx]), self._frames[idx] - ahead
        cache = self._cache if self._num_rows == 1 else self._cache.save(idx)
        return save_place(column, given, steps) | save_cache(cache, ahead)

    def leave(self, row: int) -> None:
        """End the conversation in a place; another may join there."""
        idx = self._places.index(row)
        self._places[idx] = None
        if self._num_rows > 1:
            self._cache.leave(idx)

    def step(self, user: np.ndarray, text: np.ndarray | None = None) -> Waiting:
        """Make a step of all rows."""
        self._seat()
        taken = [i for i, place in enumerate(self._places) if place is not None]
        if 2 * len(taken) <= len(self._places):
            self._take(taken)
        tokens = np.zeros((len(self._places), user.shape[1]), np.int32)
        for row, place in enumerate(self._places):
            if place is not None:
                tokens[row] = user[place]
        engine = self._engine
        inputs = {"user": engine.exchange.send(tokens)}
        if self._draws:
            keys = noise_keys(self._seeds, self._frames)
            inputs["keys"] = engine.exchange.send(keys)
        if text is not None:
            self._force(text)
        if self._given is not None:
            inputs["given"] = self._given
        if self._reads_user:
            agent = self._column[:, : self._num_agent]
            self._column = mx.concatenate([agent, inputs["user"]], axis=1)
        columns = _padded(self._column, self._num_rows)
        x = engine.step(engine.inputs(columns.T[None]), self._cache)
        self._column, self._given = self._frame(x.squeeze(0), inputs), None
        self._frames = [number + 1 for number in self._frames]
        # On CUDA what the host reads is moved, under the hands of a next step that has
        # begun, and stays slow for a GPU to write to: so it is not to be the column,
        # of which `mx.contiguous` makes a view if there is one row.
        coming = engine.exchange.bring(self._column[:, : self._num_agent] + 0)
        mx.async_eval(coming.array, self._column)
        return Waiting(coming, list(self._places), self._capacity)

    def _force(self, text: np.ndarray) -> None:
        """Give the next step those of the text ids (capacity,) that are forced."""
        given = self._given
        if given is None:
            given = mx.full((len(self._places), self._num_agent), NOT_FORCED, mx.int32)
        ids = np.array([NOT_FORCED if p is None else text[p] for p in self._places])
        forced, given = mx.array(ids.astype(np.int32)), mx.array(given)
        is_forced = forced != NOT_FORCED
        given[:, TEXT_ROW] = mx.where(is_forced, forced, given[:, TEXT_ROW])
        self._given = given

    def _free_row(self, start: Start) -> int:
        """A row that nobody has; made if there is none."""
        count = len(self._places)
        if None in self._places:
            return self._places.index(None)
        if count == 0:
            self._places = [None] * self._capacity
            width = start.prompt.columns.shape[0]
            self._column = mx.array(np.zeros((self._capacity, width), np.int32))
            self._seeds, self._frames = [0] * self._capacity, [0] * self._capacity
            if self._num_rows > 1:
                self._cache = self._engine.make_ring(start.memory, self._capacity)
            return 0
        more = min(count, self._capacity - count)
        self._take([*range(count), *[0] * more])
        self._places[count:] = [None] * more
        for row in range(count, count + more):
            self._cache.leave(row)
        return count

    def _take(self, rows: list[int]) -> None:
        """Make the rows copies of these."""
        self._seat()
        if self._num_rows > 1:
            self._cache.take(rows)
        self._places = [self._places[i] for i in rows]
        self._column = take_rows(self._column, rows)
        if self._given is not None:
            self._given = take_rows(self._given, rows)
        self._seeds = [self._seeds[i] for i in rows]
        self._frames = [self._frames[i] for i in rows]


@dataclass(frozen=True)
class Waiting:
    """A step under way; ``places`` are those of its rows."""

    agent: Coming
    places: Sequence[int | None]
    capacity: int

    def tokens(self) -> np.ndarray:
        """The agent's column int32 (capacity, agent streams), once it is there."""
        agent = self.agent.read()
        column = np.zeros((self.capacity, agent.shape[1]), np.int32)
        for row, place in enumerate(self.places):
            if place is not None:
                column[place] = agent[row]
        return column


@dataclass(frozen=True)
class _WaitingApart:
    """Steps under way of blocks of places, in order, None for one that nobody has."""

    steps: Sequence[Pending | None]
    sizes: Sequence[int]
    width: int

    def tokens(self) -> np.ndarray:
        """The agent's column int32 (capacity, agent streams), once it is there."""
        columns = [
            np.zeros((size, self.width), np.int32) if step is None else step.tokens()
            for step, size in zip(self.steps, self.sizes, strict=True)
        ]
        return np.concatenate(columns)


class _RowsApart:
    """Blocks of rows that step one after the other."""

    def __init__(
        self, blocks: Sequence[tuple[Rows, int]], num_agent_streams: int
    ) -> None:
        """Each of ``blocks`` is rows, and how many places they have."""
        self._blocks = [rows for rows, _ in blocks]
        self._sizes = [size for _, size in blocks]
        self._first: list[int] = np.cumsum([0, *self._sizes]).tolist()
        self._taken = [0] * len(blocks)
        self._width = num_agent_streams

    def join(self, start: Start, seed: int, frames: int | None = None) -> int:
        """Begin a conversation after a prompt; its place."""
        sizes = zip(self._taken, self._sizes, strict=True)
        idx = next(i for i, (taken, size) in enumerate(sizes) if taken < size)
        self._taken[idx] += 1
        return self._first[idx] + self._blocks[idx].join(start, seed, frames)

    def save(self, row: int, ahead: int = 0) -> dict[str, np.ndarray]:
        """What a conversation goes on from after the steps that were asked for."""
        idx = bisect.bisect(self._first, row) - 1
        return self._blocks[idx].save(row - self._first[idx], ahead)

    def leave(self, row: int) -> None:
        """End the conversation in a place; another may join there."""
        idx = bisect.bisect(self._first, row) - 1
        self._taken[idx] -= 1
        self._blocks[idx].leave(row - self._first[idx])

    def step(self, user: np.ndarray, text: np.ndarray | None = None) -> _WaitingApart:
        """Make a step of every row."""
        steps: list[Pending | None] = []
        for idx, rows in enumerate(self._blocks):
            own = slice(self._first[idx], self._first[idx + 1])
            said = None if text is None else text[own]
            steps.append(rows.step(user[own], said) if self._taken[idx] else None)
        return _WaitingApart(steps, self._sizes, self._width)
