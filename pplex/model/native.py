"""The language model on a CPU: one call of compiled code a frame, or for a prompt.

The arithmetic is in ``_lm.c``, whose structures are mirrored here; it computes what
``Lm.temporal``, ``Lm.head`` and ``Depformer`` do with MLX, and ``Sampler`` draws. Of
quantized weights MLX's CPU products are slow ones, so prompts are read here too.
Where it was not built, or a model is not in float32, those are used.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import threading
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from pplex.backend import find_extension
from pplex.layers.cache import GROWTH
from pplex.layers.device import on_cpu
from pplex.layers.pages import Pool, zeros
from pplex.layers.rotary import angles
from pplex.layers.transformer import Gating, RmsNorm
from pplex.model.config import LmConfig
from pplex.model.lm import Lm
from pplex.model.sampling import Sampler

LANES = 16
FLOAT32, BFLOAT16 = 32, 16

_int, _float, _pointer = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class _Matrix(ctypes.Structure):
    """``Matrix`` and ``Table`` of ``_lm.c``."""

    _fields_ = [
        *((name, _pointer) for name in ("words", "scales", "biases")),
        *((name, _int) for name in ("rows", "columns", "bits", "group")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("norm1", "norm2")),
        *(
            (name, _Matrix)
            for name in ("in_proj", "out_proj", "linear_in", "linear_out")
        ),
    ]


_SIZES = (
    *("dim", "heads", "layers", "hidden", "window", "text_card", "card", "streams"),
    *("steps", "hiding_step", "dep_dim", "dep_heads", "dep_layers", "dep_hidden"),
)


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _int) for name in _SIZES),
        *(
            (name, _Matrix)
            for name in ("text_emb", "audio_emb", "dep_text_emb", "dep_audio_emb")
        ),
        ("temporal", ctypes.POINTER(_Layer)),
        ("out_norm", _pointer),
        ("text_linear", _Matrix),
        ("dep_input", _Matrix),
        ("depformer", ctypes.POINTER(_Layer)),
        ("dep_heads_out", ctypes.POINTER(_Matrix)),
    ]


class _Sampling(ctypes.Structure):
    _fields_ = [
        *((name, _float) for name in ("text_temp", "temp")),
        *(
            (name, _int)
            for name in ("text_top_k", "top_k", "text_noise", "noise_width")
        ),
    ]


class _Row(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("slots", "end")),
        *((name, _pointer) for name in ("first_keys", "first_values")),
        *((name, ctypes.c_int64) for name in ("first_slots", "num_first")),
        *((name, _pointer) for name in ("cosines", "sines")),
        ("key", ctypes.c_uint32 * 2),
    ]


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled code; None where it was not built."""
    path = find_extension("_lm")
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    long = ctypes.c_long
    library.pplex_lm_use.argtypes, library.pplex_lm_use.restype = [_int], _int
    library.pplex_lm_pack.argtypes = [_pointer, long, long, _int, _int, _pointer]
    library.pplex_lm_pack.restype = _int
    library.pplex_lm_scratch.argtypes = [ctypes.POINTER(_Model), long]
    library.pplex_lm_scratch.restype = long
    library.pplex_lm_step.argtypes = [
        *(ctypes.POINTER(kind) for kind in (_Model, _Sampling)),
        long,
        *[_pointer] * 6,
    ]
    library.pplex_lm_step.restype = _int
    library.pplex_lm_read_scratch.argtypes = [ctypes.POINTER(_Model), long]
    library.pplex_lm_read_scratch.restype = long
    library.pplex_lm_read.argtypes = [ctypes.POINTER(_Model), long, *[_pointer] * 3]
    library.pplex_lm_read.restype = None
    return library


class NativeCache:
    """Keys and values of the past positions of one row, as the compiled code has them.

    ``end`` is how many were written since the start; the last ``window`` are kept,
    position ``p`` in slot ``p % window``. Until it is full, a copy reads its first
    positions where its source has them: rows that start from one prompt read that once
    for all of them.
    """

    def __init__(self, config: LmConfig, pool: Pool) -> None:
        """An empty cache for the temporal transformer.

        Of ``pool`` is the memory of copies whose size is known: it may take longer to
        get than a frame, and is faster to read.
        """
        self.window, self.end = config.window, 0
        self._pool, self._is_pooled = pool, False
        self._max_period = config.max_period
        self._layers, self._heads = config.num_layers, config.num_heads
        self._head_dim = config.dim // config.num_heads
        self._slots = 0
        self._source: NativeCache | None = None
        self._num_first = 0
        self._grow(1)

    def copy(self, room: int = 0) -> NativeCache:
        """A cache with the same contents that can go its own way.

        It has room for ``room`` more positions.
        """
        other = copy.copy(self)
        other._is_pooled = room > 0
        other._source, other._num_first = self, self.end // LANES * LANES
        other._make_room(self.end + room if room else self._slots)
        return other

    def release(self) -> None:
        """Give its memory back: neither it nor a copy of it is used any more."""
        if self._is_pooled:
            self._pool.give_back(self._memory)

    def arrays(self) -> list[np.ndarray]:
        """The arrays held."""
        return [self._keys, self._values]

    def reserve(self) -> None:
        """Make room for the whole window now: growing later would keep a frame waiting.

        Memory that is not written to is not taken from the system yet.
        """
        if self._slots < self.window:
            self._make_room(self.window, huge=False)

    def fill(self, rows: Sequence[_Row]) -> None:
        """Describe the next positions, a row each, with room for them."""
        last = self.end + len(rows)
        if last > self._slots and self._slots < self.window:
            self._grow(last)
        source = self._source
        if source and max(last, source.end) > self.window:
            source = self._source = None  # one of them writes over its first positions
        for position, row in enumerate(rows, self.end):
            row.keys, row.values = self._places
            row.slots, row.end = self._slots, position
            row.cosines, row.sines = _angles_of(
                position, self._head_dim, self._max_period
            )
            if source:
                row.first_keys, row.first_values = source._places
                row.first_slots, row.num_first = source._slots, self._num_first

    def _grow(self, need: int) -> None:
        """Make room for ``need`` positions, twice as many as before or the window."""
        self._make_room(max(2 * self._slots, -(-need // GROWTH) * GROWTH))

    def _make_room(self, size: int, *, huge: bool = True) -> None:
        """Move to arrays of ``size`` slots, but no more than the window."""
        size = -(-min(size, self.window) // LANES) * LANES
        layers, heads, width = self._layers, self._heads, self._head_dim
        padded = -(-width // LANES) * LANES
        num_keys, num_values = (layers * heads * size * n for n in (width, padded))
        count = num_keys + num_values
        if not huge:
            memory = zeros((count,), np.float32, huge=False)
        elif self._is_pooled:
            memory = self._pool.take(count)
        else:
            memory = np.zeros(count, np.float32)
        keys, values = memory[:num_keys], memory[num_keys : num_keys + num_values]
        keys = keys.reshape(layers, heads, size // LANES, width, LANES)
        values = values.reshape(layers, heads, size, padded)
        if self.end:
            held = min(self.end, self.window)
            blocks = -(-held // LANES)
            keys[:, :, :blocks] = self._keys[:, :, :blocks]
            values[:, :, :held] = self._values[:, :, :held]
        self._slots, self._memory = size, memory
        self._keys, self._values = keys, values
        self._places = keys.ctypes.data, values.ctypes.data


_BLOCK = 128  # positions whose angles are made at once
_POSITIONS = 128  # read at once: what they need in memory is bounded
_KEPT_ROWS = 16  # whose memory is kept from frame to frame


def _angles_of(position: int, width: int, max_period: float) -> tuple[int, int]:
    """Where the cosines and the sines of a position lie."""
    block, idx = divmod(position, _BLOCK)
    _, cosines, sines = _block_angles(block, width, max_period)
    start = idx * (width // 2) * 4
    return cosines + start, sines + start


@functools.lru_cache(maxsize=512)
def _block_angles(
    block: int, width: int, max_period: float
) -> tuple[tuple[np.ndarray, np.ndarray], int, int]:
    """Arrays of cosines and sines, and where they lie."""
    both = cosines, sines = angles(block * _BLOCK, _BLOCK, width, max_period)
    return both, cosines.ctypes.data, sines.ctypes.data


class NativeLm:
    """A language model made ready for the compiled code."""

    def __init__(self, lm: Lm, library: ctypes.CDLL) -> None:
        """Pack the matrices of ``lm``, see ``_matrix``; tables are shared with it."""
        config, depformer = lm.config, lm.depformer
        self.config = config
        self._library = library
        self._held: list[np.ndarray | ctypes.Array] = []
        self._pool = Pool()
        self._kept = threading.local()
        self.matrix_bytes = 0  # of packed matrices, each of which every step reads
        steps = depformer.steps[: config.num_codebooks]
        # The reference's ring has `dep_q` slots and hides the oldest when full.
        hiding = config.dep_q - 1
        layers = [
            self._layer(
                layer.norm1,
                layer.norm2,
                layer.self_attn.in_proj,
                layer.self_attn.out_proj,
                layer.gating,
            )
            for layer in lm.layers
        ]
        step_layers = [
            self._layer(
                layer.norm1, layer.norm2, layer.in_proj, layer.out_proj, layer.gating
            )
            for step in steps
            for layer in step.layers
        ]
        heads = [self._matrix(step.head) for step in steps]
        self._model = _Model(
            dim=config.dim,
            heads=config.num_heads,
            layers=config.num_layers,
            hidden=config.hidden_dim,
            window=config.window,
            text_card=config.text_card,
            card=config.card,
            streams=config.num_streams,
            steps=len(steps),
            hiding_step=hiding if 0 < hiding < len(steps) else -1,
            dep_dim=config.depformer_dim,
            dep_heads=config.depformer_num_heads,
            dep_layers=config.depformer_num_layers,
            dep_hidden=config.depformer_hidden_dim,
            text_emb=self._table(lm.text_emb),
            audio_emb=self._table(lm.audio_emb),
            dep_text_emb=self._table(depformer.text_emb),
            dep_audio_emb=self._table(depformer.audio_emb),
            temporal=self._array(_Layer, layers),
            out_norm=self._floats(lm.out_norm.weight),
            text_linear=self._matrix(lm.text_linear),
            dep_input=self._matrix(depformer.input, len(steps) * config.depformer_dim),
            depformer=self._array(_Layer, step_layers),
            dep_heads_out=self._array(_Matrix, heads),
        )

    def make_cache(self) -> NativeCache:
        """An empty cache for the temporal transformer."""
        return NativeCache(self.config, self._pool)

    def step(
        self,
        caches: Sequence[NativeCache],
        columns: np.ndarray,
        given: np.ndarray | None,
        sampler: Sampler,
        keys: Sequence[tuple[int, int]],
        logits: np.ndarray | None = None,
    ) -> np.ndarray:
        """The agent's columns (rows, agent streams) that follow ``columns``.

        ``columns`` (rows, streams) and ``given`` (rows, agent streams) are int32,
        ``keys`` those of each row's noise. A position is added to each row's cache.
        ``logits``, float32 (rows, text_card + codebooks * card), is filled if it is
        there.
        """
        rows = (_Row * len(caches))()
        for row, cache, key in zip(rows, caches, keys, strict=True):
            cache.fill((row,))
            row.key[:] = key
        sampling = _Sampling(**sampler.layout())
        agent = self._step(rows, columns, given, sampling, logits)
        for cache in caches:
            cache.end += 1
        return agent

    def force(
        self, cache: NativeCache, columns: np.ndarray, given: np.ndarray
    ) -> np.ndarray:
        """The logits (t, text_card + codebooks * card) of positions that are all given.

        ``columns`` (t, streams) are one conversation's next, ``given`` (t, agent
        streams) the agent's columns after each; int32. They are added to ``cache``.
        """
        config = self.config
        rows = (_Row * len(columns))()
        cache.fill(rows[:])
        width = config.text_card + config.num_codebooks * config.card
        logits = np.empty((len(columns), width), np.float32)
        self._step(rows, columns, given, _Sampling(), logits)
        cache.end += len(columns)
        return logits

    def read(self, cache: NativeCache, inputs: np.ndarray) -> None:
        """Add positions to ``cache`` whose embeddings are ``inputs``, float32 (t, dim).

        The same bits as by steps that are given their tokens.
        """
        inputs = np.ascontiguousarray(inputs, np.float32)
        for start in range(0, len(inputs), _POSITIONS):
            part = inputs[start : start + _POSITIONS]
            rows = (_Row * len(part))()
            cache.fill(rows[:])
            size = self._library.pplex_lm_read_scratch(self._model, len(rows))
            scratch = np.empty(size, np.float32)
            self._library.pplex_lm_read(
                self._model,
                len(rows),
                ctypes.addressof(rows),
                part.ctypes.data,
                scratch.ctypes.data,
            )
            cache.end += len(rows)

    def _step(
        self,
        rows: ctypes.Array,
        columns: np.ndarray,
        given: np.ndarray | None,
        sampling: _Sampling,
        logits: np.ndarray | None,
    ) -> np.ndarray:
        """The agent's columns for ``rows``; counting positions is the caller's."""
        config, num_rows = self.config, len(rows)
        columns = _whole(columns, (num_rows, config.num_streams))
        shape = (num_rows, config.num_agent_streams)
        given = None if given is None else _whole(given, shape)
        agent = np.empty(shape, np.int32)
        scratch = self._scratch(num_rows)
        known = self._library.pplex_lm_step(
            self._model,
            sampling,
            num_rows,
            ctypes.addressof(rows),
            columns.ctypes.data,
            None if given is None else given.ctypes.data,
            agent.ctypes.data,
            None if logits is None else logits.ctypes.data,
            scratch.ctypes.data,
        )
        if not known:
            raise ValueError("a token is beyond the end of its embedding table")
        return agent

    def _scratch(self, num_rows: int) -> np.ndarray:
        """Memory for a frame, this thread's own; kept if it is that of a few rows."""
        size = self._library.pplex_lm_scratch(self._model, num_rows)
        scratch = getattr(self._kept, "scratch", None)
        if scratch is None or len(scratch) < size:
            scratch = np.empty(size, np.float32)
            if num_rows <= _KEPT_ROWS:
                self._kept.scratch = scratch
        return scratch

    def _array(self, kind: type, items: Sequence) -> ctypes.Array:
        array = (kind * len(items))(*items)
        self._held.append(array)
        return array

    def _hold(self, array: np.ndarray) -> int:
        self._held.append(array)
        return array.ctypes.data

    def _floats(self, array: mx.array) -> int:
        return self._hold(_numpy(array))

    def _layer(
        self,
        norm1: RmsNorm,
        norm2: RmsNorm,
        in_proj: nn.Module,
        out_proj: nn.Module,
        gating: Gating,
    ) -> _Layer:
        return _Layer(
            norm1=self._floats(norm1.weight),
            norm2=self._floats(norm2.weight),
            in_proj=self._matrix(in_proj),
            out_proj=self._matrix(out_proj),
            linear_in=self._matrix(gating.linear_in),
            linear_out=self._matrix(gating.linear_out),
        )

    def _table(self, module: nn.Module) -> _Matrix:
        """An embedding table, in MLX's own memory."""
        weight = _numpy(module.weight)
        if "scales" not in module:
            rows, columns = weight.shape
            return _Matrix(self._hold(weight), None, None, rows, columns, FLOAT32, 0)
        return _Matrix(
            words=self._hold(weight),
            scales=self._floats(module.scales),
            biases=self._floats(module.biases),
            rows=weight.shape[0],
            columns=weight.shape[1] * 32 // module.bits,
            bits=module.bits,
            group=module.group_size,
        )

    def _matrix(self, module: nn.Module, rows: int | None = None) -> _Matrix:
        """A packed matrix: its first ``rows`` outputs, if that is given.

        Where bfloat16 holds it exactly, MLX is left with that too: it widens it for
        each product with float32, and no frame needs one.
        """
        weight = _numpy(module.weight)[:rows]
        if "scales" not in module:
            rows, columns = weight.shape
            words = self._pack(weight, columns, FLOAT32, BFLOAT16)
            if words is not None:
                module.weight = module.weight.astype(mx.bfloat16)
                mx.eval(module.weight)
                return _Matrix(self._hold(words), None, None, rows, columns, BFLOAT16)
            words = self._pack(weight, columns, FLOAT32, FLOAT32)
            return _Matrix(self._hold(words), None, None, rows, columns, FLOAT32)
        columns = weight.shape[1] * 32 // module.bits
        bits = 4 if module.bits <= 4 else 8
        words = self._pack(weight, columns, module.bits, bits)
        parts = []
        for part in (module.scales, module.biases):
            values = _numpy(part)[:rows]
            parts.append(self._pack(values, values.shape[1], FLOAT32, FLOAT32))
        return _Matrix(
            *(self._hold(part) for part in (words, *parts)),
            weight.shape[0],
            columns,
            bits,
            module.group_size,
        )

    def _pack(
        self, values: np.ndarray, columns: int, source_bits: int, bits: int
    ) -> np.ndarray | None:
        """Values (rows, ...) in blocks of lanes; None if bfloat16 does not hold them.

        The last block is whole, and so is the last pair of bfloat16.
        """
        if bits == BFLOAT16 and columns % 2:
            return None
        rows = len(values)
        blocks = -(-rows // LANES)
        words = np.empty((blocks, columns * bits // 32, LANES), np.uint32)
        packed = self._library.pplex_lm_pack(
            values.ctypes.data, rows, columns, source_bits, bits, words.ctypes.data
        )
        if not packed:
            return None
        self.matrix_bytes += words.nbytes
        return words


def native_lm(lm: Lm) -> NativeLm | None:
    """The compiled form of ``lm``, made once; None where there cannot be one."""
    library = load_library()
    if library is None or not on_cpu():
        return None
    if lm.native is None:
        arrays = [array for _, array in nn.utils.tree_flatten(lm.parameters())]
        if not {array.dtype for array in arrays} <= {mx.float32, mx.uint32}:
            return None
        lm.native = NativeLm(lm, library)
    return lm.native


def _numpy(array: mx.array) -> np.ndarray:
    """``array`` as NumPy sees it, contiguous: the same memory where it is that."""
    return np.ascontiguousarray(np.asarray(array))


def _whole(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """``array`` as contiguous int32 of ``shape``; ValueError if it has another."""
    array = np.ascontiguousarray(array, np.int32)
    if array.shape != shape:
        raise ValueError(f"expected int32 of shape {shape}, found {array.shape}")
    return array
