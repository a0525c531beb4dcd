"""The engine of CPUs: one call of compiled code makes a step, reads a prompt, codes.

The arithmetic is in ``lm.c``; it computes what ``model.lm.Lm`` does, and draws as
``Sampler`` does. A row's result is the same bits whatever rows stand beside it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import mlx.core as mx
import numpy as np

from pplex.checkpoint.layouts import Quantization
from pplex.checkpoint.safetensors import widen_bfloat16
from pplex.checkpoint.weights import LmTensors
from pplex.engine.base import (
    FORCED_FRAMES,
    Arrays,
    Codec,
    Cost,
    Done,
    Logits,
    Start,
    codec_bytes,
    form_name,
    restored,
    save_place,
)
from pplex.engine.c.binding import load_library
from pplex.engine.c.codec import CCodec
from pplex.engine.c.memory import Arena, Pool, RowCache
from pplex.engine.c.structures import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    LANES,
    Layer,
    Matrix,
    Model,
    Row,
    Sampling,
    Table,
)
from pplex.engine.device import num_cores
from pplex.model.config import LmConfig, ModelConfig
from pplex.model.prompt import Prompt
from pplex.model.sampling import Sampler, SamplingConfig, noise_key
from pplex.model.streams import NOT_FORCED, TEXT_ROW

_Item = TypeVar("_Item", bound=ctypes.Structure)

_TYPES = {mx.float32: FLOAT32, mx.float16: FLOAT16, mx.bfloat16: BFLOAT16}
# A step that reads fewer bytes is made by one thread: those of the codec and of other
# rows have more to do. 2 threads make a step of `mini`, 10 MB, no faster.
SHARED_BYTES = 32 << 20
_AHEAD_BYTES = 256 << 20  # of tensors that are read while others are packed
_POSITIONS = 128  # read at once: what they need in memory is bounded
_KEPT_ROWS = 16  # whose memory is kept from step to step


class CEngine:
    """A language model and a codec made ready for the compiled code."""

    name = "c"
    dtype = "float32"
    is_async = False

    def __init__(
        self, config: ModelConfig, lm: LmTensors, codec: Mapping[str, mx.array]
    ) -> None:
        """Pack ``lm``, which is emptied on the way, and the codec's weights.

        ValueError where the libraries are missing.
        """
        self.config = config
        self.compute = form_name(not lm.forms, False, config.kv_bits)
        self.lm = CompiledLm(config.lm, lm, config.kv_bits)
        self.codec: Codec = CCodec(config.mimi, codec, self.lm.threads)

    def prefill(self, prompt: Prompt) -> Start:
        """Read a prompt, so that conversations can start after it."""
        saved = 0 if prompt.embeddings is None else len(prompt.embeddings)
        inputs = self.lm.embed(prompt.columns[:, saved:-1].T)
        if prompt.embeddings is not None:
            inputs = np.concatenate([prompt.embeddings, inputs])
        cache = self.lm.make_cache()
        self.lm.read(cache, inputs)
        return Start(prompt, cache)

    def restore(self, saved: Arrays) -> Start:
        """Where a row was saved, so that conversations can go on from there."""
        cache = self.lm.make_cache()
        cache.restore(saved)
        return restored(self.config.lm, saved, cache)

    def rows(
        self, capacity: int, sampling: SamplingConfig, *, live: bool = False
    ) -> _CRows:
        """Places for ``capacity`` conversations."""
        return _CRows(self.lm, capacity, sampling, live)

    def forced(self, start: Start, columns: np.ndarray) -> Iterator[Logits]:
        """The logits of each of ``columns`` (streams, frames), given all before it."""
        config, cache = self.config.lm, start.memory.copy()
        grid = np.concatenate([start.prompt.columns[:, -1:], columns], axis=1).T
        for first in range(0, len(grid) - 1, FORCED_FRAMES):
            last = min(first + FORCED_FRAMES, len(grid) - 1)
            given = grid[first + 1 : last + 1, : config.num_agent_streams]
            logits = self.lm.force(cache, grid[first:last], given)
            text, agent = np.split(logits, [config.text_card], axis=1)
            yield Logits(text, agent.reshape(len(agent), -1, config.card))

    def embed(self, columns: np.ndarray) -> np.ndarray:
        """The model's inputs float32 (frames, dim) for columns (streams, frames)."""
        return self.lm.embed(columns.T)

    def cost(self) -> Cost:
        """What the model takes."""
        return _cost(self.config, self.lm.matrix_bytes, self.lm.table_bytes)


def cost_of(config: ModelConfig, lm: LmTensors) -> Cost:
    """What a model takes once it is packed; nothing is read but names and shapes."""
    matrices = tables = 0
    for name, weight in lm.weights.items():
        module, _, part = name.rpartition(".")
        if module.endswith("_emb"):
            tables += weight.nbytes
        elif part == "weight" and weight.ndim == 2:
            form = lm.forms.get(module)
            scale = lm.weights[f"{module}.scales"].dtype.size if form else 0
            matrices += _packed_bytes(weight, form, scale)
    return _cost(config, matrices, tables)


def _cost(config: ModelConfig, matrices: int, tables: int) -> Cost:
    codec, codec_state = codec_bytes(config.mimi)
    return Cost(
        step=matrices,
        position=config.kv_bytes(4),
        codec=codec,
        codec_state=codec_state,
        codec_work=0,  # 14 MB a thread for the published codec
        held=matrices + tables + codec,
    )


def _packed_bytes(weight: mx.array, form: Quantization | None, scale: int) -> int:
    """Bytes of a matrix whose scales have ``scale`` bytes."""
    rows, columns = weight.shape
    padded = -(-rows // LANES) * LANES
    if form is None:
        return int(padded * columns * weight.dtype.size)
    columns = columns * 32 // form.bits
    bits = 4 if form.bits <= 4 else 8
    return padded * (columns * bits // 8 + 2 * scale * columns // form.group_size)


class _CRows:
    """Conversations side by side, each with its own keys and values."""

    def __init__(
        self, lm: CompiledLm, capacity: int, sampling: SamplingConfig, live: bool
    ) -> None:
        config = lm.config
        self._lm, self._live = lm, live
        self._reads_user = live or config.is_moshi
        self._sampling = Sampling(**Sampler.of(config, sampling).layout())
        self._num_agent = config.num_agent_streams
        self._caches: dict[int, RowCache] = {}  # of each place that is taken
        # What rows that made no step yet started from, and for how many frames.
        self._new: dict[int, tuple[RowCache, int | None]] = {}
        self._keys = np.zeros((capacity, 2), np.uint32)
        self._columns = np.zeros((capacity, config.num_streams), np.int32)
        self._given = np.full((capacity, self._num_agent), NOT_FORCED, np.int32)
        self._is_given = False

    def join(self, start: Start, seed: int, frames: int | None = None) -> int:
        """Begin a conversation after a prompt, of ``frames`` if known; its place."""
        place = next(p for p in range(len(self._keys)) if p not in self._caches)
        new = start.memory, frames
        like = next((p for p, other in self._new.items() if other == new), None)
        if like is None:
            cache = start.memory.copy(room=frames or 0)
        else:
            cache = self._caches[like]
        if self._live:
            cache.reserve()
        self._caches[place], self._new[place] = cache, new
        self._keys[place] = noise_key(seed, start.steps)
        self._columns[place] = start.prompt.columns[:, -1]
        self._given[place] = start.prompt.pending[: self._num_agent]
        self._is_given = True
        return place

    def save(self, row: int, ahead: int = 0) -> dict[str, np.ndarray]:
        """What a conversation goes on from after the steps that were asked for."""
        steps = int(self._keys[row, 1]) - ahead
        place = save_place(self._columns[row], self._given[row], steps)
        return place | self._caches[row].save(ahead)

    def leave(self, row: int) -> None:
        """End the conversation in a place; another may join there."""
        cache = self._caches.pop(row)
        self._new.pop(row, None)
        if cache not in self._caches.values():
            cache.release()

    def step(self, user: np.ndarray, text: np.ndarray | None = None) -> Done:
        """Make a step of all rows."""
        if text is not None:
            forced = text != NOT_FORCED
            self._given[forced, TEXT_ROW] = text[forced]
            self._is_given |= bool(forced.any())
        if self._reads_user:
            self._columns[:, self._num_agent :] = user
        agent = np.zeros((len(self._keys), self._num_agent), np.int32)
        alike = self._alike()
        while alike:
            alike = self._step(alike, agent)
        for cache in set(self._caches.values()):
            cache.end += 1
        self._keys[:, 1] += 1
        if self._is_given:
            self._given[:] = NOT_FORCED
            self._is_given = False
        self._columns[:, : self._num_agent] = agent
        self._columns[:, self._num_agent :] = user
        return Done(agent)

    def _alike(self) -> list[list[int]]:
        """Places whose rows read the same after the same, and have one cache.

        Rows that start together are alike until they draw or hear something else.
        """
        self._new.clear()
        alike: dict[tuple[RowCache, bytes, bytes], list[int]] = {}
        for place, cache in self._caches.items():
            read = self._columns[place].tobytes(), self._given[place].tobytes()
            alike.setdefault((cache, *read), []).append(place)
        used: set[RowCache] = set()
        for (cache, *_), places in alike.items():
            if cache in used:
                self._part(places)
            used.add(cache)
        return list(alike.values())

    def _part(self, places: list[int]) -> None:
        """Give those in ``places`` a cache beside that which they had with others."""
        self._caches |= dict.fromkeys(places, self._caches[places[0]].part())

    def _step(self, alike: list[list[int]], agent: np.ndarray) -> list[list[int]]:
        """Make a step of one row for all that are ``alike``; those it was not made for.

        These draw something else than the first of them, whose tokens all are given.
        """
        firsts, rows = [places[0] for places in alike], (Row * len(alike))()
        others = [np.zeros((len(places) - 1, 3), np.uint32) for places in alike]
        for places, row, keys in zip(alike, rows, others, strict=True):
            self._caches[places[0]].fill((row,))
            row.key[:] = self._keys[places[0]]
            if len(keys):
                keys[:, :2] = self._keys[places[1:]]
                row.others, row.num_others = keys.ctypes.data, len(keys)
        given = self._given[firsts] if self._is_given else None
        said = self._lm.step(rows, self._columns[firsts], given, self._sampling)
        left = []
        for places, column, keys in zip(alike, said, others, strict=True):
            agent[places] = column
            if len(keys) and keys[:, 2].any():
                left.append([places[1 + idx] for idx in np.flatnonzero(keys[:, 2])])
                self._part(left[-1])
        return left


class CompiledLm:
    """A language model's weights as the compiled code reads them."""

    def __init__(
        self, config: LmConfig, tensors: LmTensors, kv_bits: int | None = None
    ) -> None:
        """Pack the matrices one after another, taking them out of ``tensors``.

        Keys and values are kept in float32, or at 8 bits.
        """
        library = load_library("lm")
        if library is None:
            raise ValueError("the compiled language model is missing")
        self.config = config
        self._library = library
        self._held: list[object] = []  # what the library reads
        self._pool = Pool()
        self._kept = threading.local()
        self.matrix_bytes = 0  # of packed matrices, each of which every step reads
        self.table_bytes = 0
        self._tensors, self._forms = _Tensors(tensors.weights), tensors.forms
        self._memory = Arena()
        steps = config.num_codebooks
        self._model = Model(
            dim=config.dim,
            heads=config.num_heads,
            layers=config.num_layers,
            hidden=config.hidden_dim,
            window=config.window,
            text_card=config.text_card,
            card=config.card,
            streams=config.num_streams,
            steps=steps,
            hiding_step=config.hiding_step,
            dep_dim=config.depformer_dim,
            dep_heads=config.depformer_num_heads,
            dep_layers=config.depformer_num_layers,
            dep_hidden=config.depformer_hidden_dim,
            threads=1,
            kv_bits=kv_bits or 32,
            text_emb=self._table("text_emb"),
            audio_emb=self._table("audio_emb"),
            dep_text_emb=self._table("depformer.text_emb"),
            dep_audio_emb=self._table("depformer.audio_emb"),
            temporal=self._array(
                Layer,
                [
                    self._layer(f"layers.{idx}", "self_attn.")
                    for idx in range(config.num_layers)
                ],
            ),
            out_norm=self._floats("out_norm.weight"),
            text_linear=self._matrix("text_linear"),
            dep_input=self._matrix("depformer.input"),
            depformer=self._array(
                Layer,
                [
                    self._layer(f"depformer.steps.{step}.layers.{idx}")
                    for step in range(steps)
                    for idx in range(config.depformer_num_layers)
                ],
            ),
            dep_heads_out=self._array(
                Matrix,
                [self._matrix(f"depformer.steps.{step}.head") for step in range(steps)],
            ),
        )
        self.threads = num_cores() if self.matrix_bytes >= SHARED_BYTES else 1
        self._model.threads = self.threads

    def make_cache(self) -> RowCache:
        """An empty cache for the temporal transformer."""
        return RowCache(self.config, self._pool, at_8=self._model.kv_bits == 8)

    def embed(self, columns: np.ndarray) -> np.ndarray:
        """Inputs float32 (t, dim) of columns (t, streams): the sums of their rows."""
        columns = _whole(columns, (len(columns), self.config.num_streams))
        inputs = np.empty((len(columns), self.config.dim), np.float32)
        known = self._library.pplex_lm_embed(
            ctypes.byref(self._model),
            len(columns),
            columns.ctypes.data,
            inputs.ctypes.data,
        )
        _check_known(known)
        return inputs

    def read(self, cache: RowCache, inputs: np.ndarray) -> None:
        """Add positions to ``cache`` whose embeddings are ``inputs``, float32 (t, dim).

        The same bits as by steps that are given their tokens.
        """
        inputs = np.ascontiguousarray(inputs, np.float32)
        for start in range(0, len(inputs), _POSITIONS):
            part = inputs[start : start + _POSITIONS]
            rows = (Row * len(part))()
            cache.fill(rows[:])
            size = self._library.pplex_lm_read_scratch(
                ctypes.byref(self._model), len(rows)
            )
            scratch = np.empty(size, np.float32)
            self._library.pplex_lm_read(
                ctypes.byref(self._model),
                len(rows),
                ctypes.addressof(rows),
                part.ctypes.data,
                scratch.ctypes.data,
            )
            cache.end += len(rows)

    def force(
        self, cache: RowCache, columns: np.ndarray, given: np.ndarray
    ) -> np.ndarray:
        """The logits (t, text_card + codebooks * card) of positions that are all given.

        ``columns`` (t, streams) are one conversation's next, ``given`` (t, agent
        streams) the agent's columns after each; int32. They are added to ``cache``.
        """
        config = self.config
        rows = (Row * len(columns))()
        cache.fill(rows[:])
        width = config.text_card + config.num_codebooks * config.card
        logits = np.empty((len(columns), width), np.float32)
        self.step(rows, columns, given, Sampling(), logits)
        cache.end += len(columns)
        return logits

    def step(
        self,
        rows: ctypes.Array[Row],
        columns: np.ndarray,
        given: np.ndarray | None,
        sampling: Sampling,
        logits: np.ndarray | None = None,
    ) -> np.ndarray:
        """The agent's columns (rows, agent streams) that follow ``columns``.

        ``columns`` (rows, streams) and ``given`` (rows, agent streams) are int32.
        ``logits``, float32 (rows, text_card + codebooks * card), is filled if it is
        there. A position is added to each row's keys and values; counting it is the
        caller's.
        """
        config, num_rows = self.config, len(rows)
        columns = _whole(columns, (num_rows, config.num_streams))
        shape = (num_rows, config.num_agent_streams)
        given = None if given is None else _whole(given, shape)
        agent, scratch = np.empty(shape, np.int32), self._scratch(num_rows)
        known = self._library.pplex_lm_step(
            ctypes.byref(self._model),
            ctypes.byref(sampling),
            num_rows,
            ctypes.addressof(rows),
            columns.ctypes.data,
            None if given is None else given.ctypes.data,
            agent.ctypes.data,
            None if logits is None else logits.ctypes.data,
            scratch.ctypes.data,
        )
        _check_known(known)
        return agent

    def _scratch(self, num_rows: int) -> np.ndarray:
        """Memory for a step, this thread's own; kept if it is that of a few rows."""
        size = self._library.pplex_lm_scratch(ctypes.byref(self._model), num_rows)
        scratch: np.ndarray | None = getattr(self._kept, "scratch", None)
        if scratch is None or len(scratch) < size:
            scratch = np.empty(size, np.float32)
            if num_rows <= _KEPT_ROWS:
                self._kept.scratch = scratch
        return scratch

    def _array(self, kind: type[_Item], items: Sequence[_Item]) -> ctypes.Array[_Item]:
        array = (kind * len(items))(*items)
        self._held.append(array)
        return array

    def _hold(self, array: np.ndarray) -> int:
        self._held.append(array)
        return int(array.ctypes.data)

    def _floats(self, name: str) -> int:
        return self._hold(self._tensors.take(name, mx.float32)[0])

    def _layer(self, name: str, attention: str = "") -> Layer:
        return Layer(
            norm1=self._floats(f"{name}.norm1.weight"),
            norm2=self._floats(f"{name}.norm2.weight"),
            in_proj=self._matrix(f"{name}.{attention}in_proj"),
            out_proj=self._matrix(f"{name}.{attention}out_proj"),
            linear_in=self._matrix(f"{name}.gating.linear_in"),
            linear_out=self._matrix(f"{name}.gating.linear_out"),
        )

    def _take(self, name: str) -> tuple[list[np.ndarray], Matrix]:
        """A module's tensors as stored, and their form without a place."""
        form = self._forms.get(name)
        if form is None:
            weight, kind = self._tensors.take(f"{name}.weight")
            return [weight], Matrix(None, *weight.shape, 0, 0, kind)
        weight, _ = self._tensors.take(f"{name}.weight")
        scales, kind = self._tensors.take(f"{name}.scales")
        biases, other = self._tensors.take(f"{name}.biases")
        assert kind == other
        rows, columns = len(weight), weight.shape[1] * 32 // form.bits
        return [weight, scales, biases], Matrix(
            None, rows, columns, form.bits, form.group_size, kind
        )

    def _table(self, name: str) -> Table:
        """An embedding table, row after row."""
        parts, form = self._take(name)
        self.table_bytes += sum(part.nbytes for part in parts)
        places = [self._hold(part) for part in parts] + [None] * (3 - len(parts))
        return Table(*places, form.rows, form.columns, form.bits, form.group, form.type)

    def _matrix(self, name: str) -> Matrix:
        """A packed matrix, in 16 bits where these hold it exactly."""
        parts, form = self._take(name)
        if form.bits:
            return self._pack(parts, form, 4 if form.bits <= 4 else 8, form.type)
        (weight,), kind = parts, form.type
        wanted = FLOAT16 if kind == FLOAT16 else BFLOAT16
        fits = (wanted == FLOAT16 or form.columns % 2 == 0) and (
            self._library.pplex_lm_fits(
                weight.ctypes.data, weight.size, kind, wanted, num_cores()
            )
        )
        if not fits:
            weight, kind = _widened(weight, kind), FLOAT32
            wanted = FLOAT32
        form.type = kind
        return self._pack([weight], form, 0, wanted)

    def _pack(
        self, parts: Sequence[np.ndarray], source: Matrix, bits: int, kind: int
    ) -> Matrix:
        """Pack ``parts``, whose form is that of ``source``."""
        matrix = Matrix(None, source.rows, source.columns, bits, source.group, kind)
        size = self._library.pplex_lm_packed_bytes(ctypes.byref(matrix))
        matrix.data = self._memory.take(size)
        places = [part.ctypes.data for part in parts] + [None] * (3 - len(parts))
        self._library.pplex_lm_pack(
            ctypes.byref(matrix), *places, source.bits, source.type, num_cores()
        )
        self.matrix_bytes += size
        return matrix


class _Tensors:
    """A checkpoint's tensors, read from its files a little ahead of their use."""

    def __init__(self, weights: dict[str, mx.array]) -> None:
        """They are taken out of ``weights``."""
        self._weights = weights
        self._coming = iter(list(weights))
        self._ahead: dict[str, int] = {}  # bytes

    def take(self, name: str, dtype: mx.Dtype | None = None) -> tuple[np.ndarray, int]:
        """A tensor and the type of its floats; bfloat16 as uint16, all or in ``dtype``.

        Of packed codes the type means nothing.
        """
        self._read_ahead()
        self._ahead.pop(name, None)
        array = self._weights.pop(name)
        if dtype is not None:
            array = array.astype(dtype)
        kind = _TYPES.get(array.dtype, FLOAT32)
        if kind == BFLOAT16:  # NumPy has none
            array = array.view(mx.uint16)
        return np.ascontiguousarray(np.asarray(array)), kind

    def _read_ahead(self) -> None:
        while sum(self._ahead.values()) < _AHEAD_BYTES:
            name = next(self._coming, None)
            if name is None:
                return
            if name in self._weights:
                mx.async_eval(self._weights[name])
                self._ahead[name] = self._weights[name].nbytes


def _widened(values: np.ndarray, kind: int) -> np.ndarray:
    """Values of a type in float32."""
    if kind == BFLOAT16:
        return widen_bfloat16(values)
    return np.asarray(values, np.float32)


def _check_known(known: int) -> None:
    if not known:
        raise ValueError("a token is beyond the end of its embedding table")


def _whole(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """``array`` as contiguous int32 of ``shape``; ValueError if it has another."""
    array = np.ascontiguousarray(array, np.int32)
    if array.shape != shape:
        raise ValueError(f"expected int32 of shape {shape}, found {array.shape}")
    return array
