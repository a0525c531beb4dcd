"""The codec on CUDA: convolutions, and one kernel for all between two of them.

By itself each bias, activation, residual and carried input is a pass over arrays of up
to a gigabyte, and those take longer than the convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from pplex.engine.cuda.convolutions import elu_behind
from pplex.engine.cuda.rows import (
    LATENTS_WIDTH,
    add_rows,
    add_scaled,
    attend_latents,
    gelu_rows,
)
from pplex.model.cache import KvCache, Mask
from pplex.model.conv import StreamConv, StreamConvTranspose, tail
from pplex.model.mimi import Mimi
from pplex.model.quantizer import ResidualQuantizer
from pplex.model.rotary import turns
from pplex.model.transformer import CodecLayer

_LEAST_OUTPUTS = 8  # of fewer, cuDNN turns whole arrays around


@dataclass(frozen=True)
class _Convolution:
    """A product of ``kernel`` inputs; ``place`` is where its state is kept.

    With ``keeps``, what goes into its activation, which a convolution made, is added to
    what comes out of the next one, which ``adds`` it.
    """

    place: int
    weight: mx.array
    bias: mx.array
    stride: int
    overlap: int
    channels: int
    upsamples: bool
    keeps: bool = False
    adds: bool = False
    known: dict[tuple[int, ...], bool] = field(default_factory=dict)

    def __call__(self, x: mx.array) -> mx.array:
        """``x`` (batch, overlap + t, in) to (batch, t', channels), without the bias."""
        count = len(x)
        while not self._is_place_free((count, *x.shape[1:])):
            count = 1 if count % 2 else count // 2
        parts = [self._product(x[i : i + count]) for i in range(0, len(x), count)]
        y = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        if self.upsamples:
            return y.reshape(len(y), -1, self.channels)
        return y[..., : self.channels]

    def _product(self, x: mx.array) -> mx.array:
        return mx.conv1d(x, self.weight, stride=self.stride)

    def _is_place_free(self, shape: tuple[int, ...]) -> bool:
        """Whether a row's bits are the same in every place of a batch.

        cuDNN may split the sums of the last outputs that it computes, to keep all of a
        GPU busy. It is asked for every shape, with a row in all places.
        """
        if shape[0] > 1 and shape not in self.known:
            row = mx.random.uniform(shape=(1, *shape[1:]), key=mx.random.key(0))
            y = self._product(mx.contiguous(mx.broadcast_to(row, shape)))
            self.known[shape] = bool(mx.array_equal(y[1:], y[:-1]).item())
        return self.known.get(shape, True)


def fuse(mimi: Mimi) -> None:
    """Let the kernels run what they can of ``mimi``."""
    quantizer = mimi.quantizer
    for name in ("semantic", "acoustic"):
        setattr(quantizer, name, _Quantizer(quantizer[name]))
    for transformer in (mimi.encoder_transformer, mimi.decoder_transformer):
        for layer in transformer.layers:
            if all(width % 4 == 0 for width in layer.linear1.weight.shape):
                layer.__class__ = _Layer
    (layer, *_) = mimi.encoder_transformer.layers
    if layer.linear1.weight.shape[1] == layer.self_attn.num_heads * LATENTS_WIDTH:
        mimi.cache_kind = _Cache
    for name in ("encoder", "decoder"):
        fused = FusedSeanet(mimi[name].model)
        if fused.is_served:
            setattr(mimi, name, fused)


class _Cache(KvCache):
    """Keys and values of a chunk's rows, to which one kernel a layer attends."""

    def mask(self, t: int) -> Mask:
        """None where the kernel attends: it knows."""
        return super().mask(t) if t <= self.block else None

    def attend(
        self, layer: int, qkv: mx.array, max_period: float, mask: Mask
    ) -> mx.array:
        """Attention of new positions (batch, 3 heads, t, head_dim), which are added."""
        _, _, t, width = qkv.shape
        if t <= self.block:
            return super().attend(layer, qkv, max_period, mask)
        keys, values = self._keys[layer], self._values[layer]
        kept = None if keys is None or values is None else (keys, values)
        angles = turns(self.end, t, width, max_period)
        y, self._keys[layer], self._values[layer] = attend_latents(
            qkv.transpose(0, 2, 1, 3), kept, angles, self.end, self.window, self.block
        )
        return y.transpose(0, 2, 1, 3)


class _Layer(CodecLayer):
    """A ``CodecLayer`` whose products have kernels between them."""

    def finish(self, x: mx.array, y: mx.array) -> mx.array:
        """The layer's output from its input ``x`` and the attended values ``y``."""
        x = add_scaled(x, self.self_attn.join(y), self.layer_scale_1)
        y = self.linear2(gelu_rows(self.linear1(self.norm2(x))))
        return add_scaled(x, y, self.layer_scale_2)


class _Quantizer:
    """A ``ResidualQuantizer`` whose rows a kernel looks up."""

    def __init__(self, plain: ResidualQuantizer) -> None:
        self._plain = plain
        books = plain.codebooks
        self._tables = [book.squeeze(0) for book in mx.split(books, len(books))]
        self._halves = [0.5 * mx.sum(t * t, axis=-1) for t in self._tables]
        mx.eval(self._tables, self._halves)

    def encode(self, latent: mx.array) -> mx.array:
        """Latents (batch, t, width) to codes (batch, codebooks, t)."""
        residual = self._plain.input_proj(latent)
        codes = []
        for table, half in zip(self._tables, self._halves, strict=True):
            code = mx.argmax(residual @ table.T - half, axis=-1)
            residual = add_rows(residual, table, code, subtract=True)
            codes.append(code)
        return mx.stack(codes, axis=1)

    def decode(self, codes: mx.array) -> mx.array:
        """Codes (batch, codebooks, t) to latents (batch, t, width)."""
        b, _, t = codes.shape
        total = mx.zeros((b, t, self._tables[0].shape[1]))
        for idx, table in enumerate(self._tables):
            total = add_rows(total, table, codes[:, idx])
        return self._plain.output_proj(total)


class FusedSeanet:
    """A ``Seanet``'s layers, with the state that it has."""

    def __init__(self, model: Sequence[nn.Module]) -> None:
        """``model`` is residual blocks, and convolutions with an ELU before them.

        The first convolution has none.
        """
        self._num_layers = len(model)
        self._convolutions: list[_Convolution] = []
        for place, layer in enumerate(model):
            if isinstance(layer, StreamConv | StreamConvTranspose):
                self._convolutions.append(_convolution(place, layer))
            elif "conv1" in layer:
                self._convolutions.append(_convolution(place, layer.conv1, keeps=True))
                self._convolutions.append(_convolution(place, layer.conv2, adds=True))
        # Whether there is a kernel for what lies between the convolutions.
        between = self._convolutions[:-1]
        self.is_served = all(conv.channels % 4 == 0 for conv in between)

    def __call__(
        self, x: mx.array, state: list[Any] | None
    ) -> tuple[mx.array, list[Any]]:
        """Run a chunk ``x`` (batch, t, channels) through all layers."""
        after: list[Any] = [None] * self._num_layers
        first, *rest = self._convolutions
        x = mx.concatenate([_before(first, x, state), x], axis=1)
        after[first.place] = tail(x, first.overlap)
        x, bias, skip, kept = first(x), first.bias, None, None
        for conv in rest:
            before = _before(conv, x, state) if conv.overlap else None
            if conv.keeps:  # to add these again costs less than to write their sum
                kept = x, bias
            x = elu_behind(x, bias, skip, before)
            if conv.overlap:
                after[conv.place] = tail(x, conv.overlap)
            x, bias, skip = conv(x), conv.bias, kept if conv.adds else None
        return x + bias, after


def _before(conv: _Convolution, x: mx.array, state: list[Any] | None) -> mx.array:
    """The inputs (batch, overlap, channels) before ``x``."""
    if state is not None:
        kept: mx.array = state[conv.place]
        return kept
    return mx.zeros((x.shape[0], conv.overlap, x.shape[2]), x.dtype)


def _convolution(
    place: int,
    layer: StreamConv | StreamConvTranspose,
    *,
    keeps: bool = False,
    adds: bool = False,
) -> _Convolution:
    if isinstance(layer, StreamConvTranspose):
        # A block of outputs from two inputs side by side.
        now, before = mx.split(layer.weight, 2)
        weight = mx.stack([before, now], axis=1).transpose(2, 1, 0)
        stride, upsamples = 1, True
    else:
        weight, stride, upsamples = layer.weight, layer.stride, False
        if (short := _LEAST_OUTPUTS - len(weight)) > 0:
            weight = mx.pad(weight, [(0, short), (0, 0), (0, 0)])
    weight = mx.contiguous(weight)
    mx.eval(weight)
    return _Convolution(
        place=place,
        weight=weight,
        bias=layer.bias,
        stride=stride,
        overlap=layer.overlap,
        channels=len(layer.bias),
        upsamples=upsamples,
        keeps=keeps,
        adds=adds,
    )
