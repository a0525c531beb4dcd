"""The codec as compiled code: ``codec.c``.

The computation of ``model.mimi``, from the same weights, in float32. Every value is
summed in an order that depends on the sizes of its layer alone: the same sound gives
the same bits in chunks of any number of frames. Calls let go of Python's lock.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from pplex.engine.base import Arrays, Begun, checked, number
from pplex.engine.c.binding import load_library
from pplex.engine.c.memory import Arena
from pplex.engine.c.structures import FLOAT32, LANES, Matrix
from pplex.engine.device import num_cores
from pplex.model.config import MimiConfig
from pplex.model.conv import StreamConv, StreamConvTranspose
from pplex.model.mimi import CodecTransformer, make_mimi
from pplex.model.quantizer import SplitQuantizer
from pplex.model.rotary import frequencies
from pplex.model.seanet import Elu, ResidualBlock, Seanet

# These are the C file's, and so are the structures below.
PANEL = 16
ELU, GELU, EXP = 1, 2, 3
KEEP, ADD, EDGE = 1, 2, 4

# Layers with at least so many rows a frame run frame by frame: their arrays fit in a
# core's cache. The others have few rows and large matrices, which are read for all.
_FINE_ROWS = 64


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("k", ctypes.c_long),
        ("n", ctypes.c_long),
    ]


class _Convolution(ctypes.Structure):
    _fields_ = [
        ("matrix", _Matrix),
        ("channels", ctypes.c_long),
        ("stride", ctypes.c_long),
        ("overlap", ctypes.c_long),
        ("state", ctypes.c_long),
        ("activation", ctypes.c_long),
        ("flags", ctypes.c_long),
    ]


_NORMS = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")
_MATRICES = ("in_proj", "out_proj", "linear1", "linear2")


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in _NORMS] + [
        (name, _Matrix) for name in _MATRICES
    ]


class _Transformer(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("frequencies", ctypes.c_void_p),
        ("num_layers", ctypes.c_long),
        ("width", ctypes.c_long),
        ("heads", ctypes.c_long),
        ("feed_forward", ctypes.c_long),
        ("window", ctypes.c_long),
        ("block", ctypes.c_long),
        ("state", ctypes.c_long),
    ]


class _Direction(ctypes.Structure):
    _fields_ = [
        ("convolutions", ctypes.POINTER(_Convolution)),
        ("num_convolutions", ctypes.c_long),
        ("num_fine", ctypes.c_long),
        ("head", ctypes.c_long),
        ("fine", ctypes.c_long),
        ("coarse", ctypes.c_long),
        ("between", ctypes.c_long),
        ("transformer", _Transformer),
        ("downsample", _Convolution),
        ("upsample", ctypes.c_void_p),
        ("upsample_state", ctypes.c_long),
        ("samples", ctypes.c_long),
        ("latents", ctypes.c_long),
        ("threads", ctypes.c_long),
    ]


class _Quantizer(ctypes.Structure):
    _fields_ = [
        ("input", _Matrix),
        ("output", _Matrix),
        ("tables", ctypes.POINTER(_Matrix)),
        ("rows", ctypes.c_void_p),
        ("num_codebooks", ctypes.c_long),
        ("bins", ctypes.c_long),
        ("dim", ctypes.c_long),
        ("threads", ctypes.c_long),
    ]


@dataclass
class CodecState:
    """What one direction carries between chunks; ``end`` counts latents."""

    carried: np.ndarray
    end: int = 0


class CCodec:
    """PCM to codes and back, in chunks of whole frames of any number.

    Calls may be made beside each other, and beside steps; but not where several threads
    make one, which steps need too.
    """

    chunk_frames = 32
    group = 1
    launcher, version = None, ""
    form = ""

    def __init__(
        self, config: MimiConfig, weights: Mapping[str, mx.array], threads: int = 1
    ) -> None:
        """Take over ``weights``, named as those of ``Mimi``.

        ValueError where the library is missing.
        """
        self.concurrent = threads == 1
        lib = load_library("codec")
        if lib is None:
            raise ValueError("the compiled codec is missing")
        mimi = make_mimi(config, weights)
        self._lib = lib
        self._config = config
        self._weights = _Weights()
        size = _StateSize()
        self._encoder = _direction(
            self._weights, size, config, mimi.encoder, mimi.encoder_transformer, True
        )
        self._encoder.downsample = _convolution(
            self._weights, size, mimi.downsample, flags=EDGE
        )
        self._decoder = _direction(
            self._weights, size, config, mimi.decoder, mimi.decoder_transformer, False
        )
        self._decoder.upsample = self._weights.vector(mimi.upsample.weight)
        self._decoder.upsample_state = size.add(config.seanet.dimension)
        self._quantizer = _quantizer(self._weights, mimi.quantizer)
        for part in (self._encoder, self._decoder, self._quantizer):
            part.threads = threads
        self._state_size = size.total
        self._rooms = threading.local()

    def make_state(self, saved: Arrays | None = None) -> CodecState:
        """A state for one direction of one stream: a fresh one, or as it was saved."""
        state = CodecState(_aligned_zeros(self._state_size))
        if saved is not None:
            shape = state.carried.shape
            state.carried[:] = checked(saved, "carried", shape, np.float32)
            state.end = number(saved, "end")
        return state

    def save(self, state: CodecState) -> dict[str, np.ndarray]:
        """A copy of a state."""
        end = np.array([state.end], np.int64)
        return {"carried": state.carried.copy(), "end": end}

    def encode(self, frames: np.ndarray, state: CodecState) -> np.ndarray:
        """PCM (frames, frame_size) to codes int32 (codebooks, frames)."""
        return self.quantize(self.encode_latents(frames, state))

    def encode_latents(self, frames: np.ndarray, state: CodecState) -> np.ndarray:
        """PCM (frames, frame_size) to latents (frames, width)."""
        config = self._config
        pcm = np.ascontiguousarray(frames, np.float32)
        if pcm.ndim != 2 or pcm.shape[1] != config.frame_size:
            raise ValueError(f"frames of {config.frame_size} samples, not {pcm.shape}")
        count = len(pcm)
        latents = np.empty((count, config.seanet.dimension), np.float32)
        direction = ctypes.byref(self._encoder)
        self._lib.pplex_codec_encode(
            direction,
            state.carried.ctypes.data,
            state.end,
            pcm.ctypes.data,
            count,
            latents.ctypes.data,
            self._room(self._lib.pplex_codec_room(direction, count)),
        )
        state.end += count * config.latents_per_frame
        return latents

    def quantize(self, latents: np.ndarray) -> np.ndarray:
        """Latents (frames, width), float32, to codes int32 (codebooks, frames)."""
        count = len(latents)
        codes = np.empty((self._config.num_codebooks, count), np.int32)
        self._lib.pplex_codec_quantize(
            ctypes.byref(self._quantizer),
            latents.ctypes.data,
            count,
            codes.ctypes.data,
            self._room(self._quantizer_room(count)),
        )
        return codes

    def decode(self, codes: np.ndarray, state: CodecState) -> np.ndarray:
        """Codes (codebooks, frames) to PCM (frames * frame_size,)."""
        config = self._config
        codes = np.ascontiguousarray(codes, np.int32)
        if codes.ndim != 2 or len(codes) != config.num_codebooks:
            raise ValueError(f"{config.num_codebooks} codebooks, not {codes.shape}")
        count = codes.shape[1]
        if count and not 0 <= codes.min() <= codes.max() < config.quantizer.bins:
            raise ValueError(f"codes outside of 0 to {config.quantizer.bins - 1}")
        latents = np.empty((count, config.seanet.dimension), np.float32)
        self._lib.pplex_codec_dequantize(
            ctypes.byref(self._quantizer),
            codes.ctypes.data,
            count,
            latents.ctypes.data,
            self._room(self._quantizer_room(count)),
        )
        pcm = np.empty(count * config.frame_size, np.float32)
        direction = ctypes.byref(self._decoder)
        self._lib.pplex_codec_decode(
            direction,
            state.carried.ctypes.data,
            state.end,
            latents.ctypes.data,
            count,
            pcm.ctypes.data,
            self._room(self._lib.pplex_codec_room(direction, count)),
        )
        state.end += count * config.latents_per_frame
        return pcm

    def encode_next(self, parts: Sequence[np.ndarray], state: CodecState) -> Begun:
        """``encode`` of the next frames of a group, which is one recording."""
        made = [self.encode(part, state) for part in parts]
        return lambda: made

    def decode_next(self, parts: Sequence[np.ndarray], state: CodecState) -> Begun:
        """``decode`` of the next codes of a group, which is one recording."""
        made = [self.decode(part, state) for part in parts]
        return lambda: made

    def _quantizer_room(self, frames: int) -> int:
        config = self._config.quantizer
        return frames * (2 * config.dimension + config.bins) + 4 * PANEL

    def _room(self, floats: int) -> int:
        """The address of memory of this thread that a call may write over."""
        room = getattr(self._rooms, "room", None)
        if room is None or len(room) < floats:
            self._rooms.room = room = _aligned_zeros(floats)
        return room.ctypes.data


def activate(activation: int, x: np.ndarray) -> np.ndarray:
    """``ELU``, ``GELU`` or, for x up to 88, ``EXP`` of float32 values, as in layers."""
    lib = load_library("codec")
    if lib is None:
        raise ValueError("the compiled codec is missing")
    y = np.array(x, np.float32, order="C")
    lib.pplex_codec_activate(activation, y.ctypes.data, y.size)
    return y


def _aligned_zeros(floats: int) -> np.ndarray:
    """Zeros that start at a cache line."""
    whole = np.zeros(floats + PANEL, np.float32)
    start = -whole.ctypes.data % (4 * PANEL) // 4
    return whole[start : start + floats]


class _Weights:
    """Arrays in the library's order, kept as long as it may read them."""

    def __init__(self) -> None:
        library = load_library("lm")
        assert library is not None
        self._library = library
        self._memory = Arena()
        self._kept: list[np.ndarray] = []

    def keep(self, array: np.ndarray) -> int:
        """Its address, of a copy that starts at a cache line and ends with room."""
        copy = _aligned_zeros(array.size + PANEL)
        copy[: array.size] = array.reshape(-1)
        self._kept.append(copy)
        return copy.ctypes.data

    def vector(self, array: mx.array | np.ndarray) -> int:
        return self.keep(np.array(array, np.float32))

    def matrix(self, weight: np.ndarray, bias: np.ndarray | None = None) -> _Matrix:
        """A matrix (n, k), as of ``nn.Linear``, with its bias (n,)."""
        n, k = weight.shape
        weight = np.ascontiguousarray(weight, np.float32)
        # The language model's blocks of lanes are these panels.
        blocks = Matrix(None, n, k, 0, 0, FLOAT32)
        assert LANES == PANEL
        size = self._library.pplex_lm_packed_bytes(ctypes.byref(blocks))
        blocks.data = self._memory.take(size)
        self._library.pplex_lm_pack(
            ctypes.byref(blocks),
            weight.ctypes.data,
            None,
            None,
            0,
            FLOAT32,
            num_cores(),
        )
        panels = -(-n // PANEL)
        return _Matrix(
            blocks.data, None if bias is None else self._bias(bias, panels), k, n
        )

    def _bias(self, bias: np.ndarray, panels: int) -> int:
        padded = np.zeros(panels * PANEL, np.float32)
        padded[: len(bias)] = bias
        return self.keep(padded)


class _StateSize:
    """Places in a stream's state; both directions have theirs in the same one."""

    def __init__(self) -> None:
        self.total = PANEL  # whole vectors may be read at its end

    def add(self, floats: int) -> int:
        """Where the next ``floats`` lie."""
        start = self.total - PANEL
        self.total += -(-floats // PANEL) * PANEL
        return start


def _array(parameter: mx.array) -> np.ndarray:
    return np.asarray(parameter.astype(mx.float32))


def _convolution(
    weights: _Weights,
    size: _StateSize,
    layer: nn.Module,
    flags: int = 0,
    activation: int = 0,
    moments: int = 1,
) -> _Convolution:
    """A convolution, transposed or not, as a product with a few inputs at a time.

    One of a single channel makes so many ``moments`` at once: half a panel has room
    for them.
    """
    weight = _array(layer.weight)
    bias = _array(layer.bias) if "bias" in layer else None
    if isinstance(layer, StreamConv):
        out, kernel, channels = weight.shape
        stride, overlap = layer.stride, kernel - layer.stride
        rows = weight.reshape(out, kernel * channels)
        if out == stride == 1:
            stride = moments
            rows = _staggered(rows, moments, channels)
            bias = None if bias is None else np.tile(bias, moments)
        matrix = weights.matrix(rows, bias)
    else:
        assert isinstance(layer, StreamConvTranspose)
        now, before = np.split(weight, 2)
        channels, overlap, stride = len(now), 1, 1
        bias = None if bias is None else np.tile(bias, now.shape[1] // len(bias))
        matrix = weights.matrix(np.concatenate([before, now]).T, bias)
    state = size.add(overlap * channels)
    return _Convolution(matrix, channels, stride, overlap, state, activation, flags)


def _staggered(weight: np.ndarray, times: int, step: int) -> np.ndarray:
    """The matrix (times, ...) of one row (1, k) ``step`` further on each time.

    Its sums are the row's and zeros.
    """
    k = weight.shape[1]
    wide = np.zeros((times, (times - 1) * step + k), weight.dtype)
    for idx, row in enumerate(wide):
        row[idx * step : idx * step + k] = weight[0]
    return wide


def _convolutions(
    weights: _Weights, size: _StateSize, model: Iterable[nn.Module], frame_size: int
) -> list[_Convolution]:
    """The convolutions of a SEANet, each with what happens to its result."""
    moments = math.gcd(frame_size, PANEL // 2)
    made: list[_Convolution] = []
    for layer in model:
        if isinstance(layer, Elu):
            made[-1].activation = ELU
        elif isinstance(layer, ResidualBlock):
            made[-1].activation = ELU
            made[-1].flags |= KEEP
            made.append(_convolution(weights, size, layer.conv1, activation=ELU))
            made.append(_convolution(weights, size, layer.conv2, flags=ADD))
        else:
            made.append(_convolution(weights, size, layer, moments=moments))
    return made


def _direction(
    weights: _Weights,
    size: _StateSize,
    config: MimiConfig,
    seanet: Seanet,
    layers: CodecTransformer,
    encodes: bool,
) -> _Direction:
    made = _convolutions(weights, size, seanet.model, config.frame_size)
    width = config.seanet.dimension
    latents = config.latents_per_frame
    # Floats of a frame before and after each convolution.
    floats = [config.frame_size if encodes else latents * width]
    ends = []  # where a residual block of many rows ends: nothing is kept there
    for idx, conv in enumerate(made, 1):
        rows = floats[-1] // conv.channels // conv.stride
        floats.append(rows * conv.matrix.n)
        if conv.flags & ADD and rows >= _FINE_ROWS:
            ends.append(idx)
    if encodes:
        cut = max(ends, default=0)
        fine, coarse, num_fine = floats[: cut + 1], floats[cut:], cut
    else:
        cut = min(ends, default=len(made))
        coarse, fine, num_fine = floats[: cut + 1], floats[cut:], len(made) - cut
    overlaps = [conv.overlap * conv.channels for conv in made]
    return _Direction(
        convolutions=(_Convolution * len(made))(*made),
        num_convolutions=len(made),
        num_fine=num_fine,
        head=-(-max(*overlaps, 4 * width) // PANEL) * PANEL,
        fine=max(fine),
        coarse=max(coarse),
        between=floats[cut],
        transformer=_transformer(weights, size, config, layers),
        samples=config.frame_size,
        latents=latents,
    )


def _transformer(
    weights: _Weights, size: _StateSize, config: MimiConfig, source: CodecTransformer
) -> _Transformer:
    t = config.transformer
    dim = t.d_model // t.num_heads
    layers = []
    for layer in source.layers:
        in_proj = _array(layer.self_attn.in_proj.weight).copy()
        in_proj[: t.d_model] /= math.sqrt(dim)
        matrices = {
            "in_proj": in_proj,
            "out_proj": _scaled(layer.self_attn.out_proj, layer.layer_scale_1),
            "linear1": _array(layer.linear1.weight),
            "linear2": _scaled(layer.linear2, layer.layer_scale_2),
        }
        norms = (layer.norm1, layer.norm2)
        vectors = [v for norm in norms for v in (norm.weight, norm.bias)]
        layers.append(
            _Layer(
                *(weights.vector(vector) for vector in vectors),
                *(weights.matrix(matrices[name]) for name in _MATRICES),
            )
        )
    slots = -(-t.window // PANEL) * PANEL
    return _Transformer(
        layers=(_Layer * len(layers))(*layers),
        frequencies=weights.keep(frequencies(dim, t.max_period)),
        num_layers=len(layers),
        width=t.d_model,
        heads=t.num_heads,
        feed_forward=t.dim_feedforward,
        window=t.window,
        block=config.latents_per_frame,
        state=size.add(len(layers) * 2 * slots * t.d_model),
    )


def _scaled(linear: nn.Linear, scale: mx.array) -> np.ndarray:
    """The weight of ``linear`` with its outputs scaled."""
    weight: np.ndarray = _array(scale)[:, None] * _array(linear.weight)
    return weight


def _quantizer(weights: _Weights, source: SplitQuantizer) -> _Quantizer:
    """Both parts side by side: the semantic projection's columns come first."""
    parts = (source.semantic, source.acoustic)
    codebooks = np.concatenate([_array(part.codebooks) for part in parts])
    num_codebooks, bins, dim = codebooks.shape
    tables = [
        weights.matrix(table, -0.5 * np.square(table).sum(axis=-1))
        for table in codebooks
    ]
    projections: dict[str, Sequence[np.ndarray]] = {
        name: [_array(getattr(part, name).weight) for part in parts]
        for name in ("input_proj", "output_proj")
    }
    return _Quantizer(
        input=weights.matrix(np.concatenate(projections["input_proj"])),
        output=weights.matrix(np.concatenate(projections["output_proj"], axis=1)),
        tables=(_Matrix * num_codebooks)(*tables),
        rows=weights.keep(codebooks),
        num_codebooks=num_codebooks,
        bins=bins,
        dim=dim,
    )
