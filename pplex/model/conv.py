"""Causal convolutions that carry the unread tail of their input between chunks.

Arrays are channels-last, ``(batch, time, channels)``. Follows NVIDIA's PersonaPlex,
``modules/conv.py``, in streaming mode.
"""

from __future__ import annotations

from typing import Literal

import mlx.core as mx
import mlx.nn as nn


class StreamConv(nn.Module):
    """Causal convolution; the state is the last ``kernel - stride`` inputs."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        bias: bool = True,
        pad: Literal["zeros", "edge"] = "zeros",
    ) -> None:
        super().__init__()
        self.stride = stride
        self.overlap = kernel - stride
        self._pad = pad
        self.weight = mx.zeros((out_channels, kernel, in_channels))
        if bias:
            self.bias = mx.zeros((out_channels,))

    def __call__(
        self, x: mx.array, state: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """Convolve a chunk whose length is a multiple of the stride.

        ``state`` is None at the start of a stream; without overlap it stays None.
        """
        if self.overlap:
            if state is None:
                state = self._first_state(x)
            x = mx.concatenate([state, x], axis=1)
            state = tail(x, self.overlap)
        y = mx.conv1d(x, self.weight, stride=self.stride)
        return (y + self.bias if "bias" in self else y), state

    def _first_state(self, x: mx.array) -> mx.array:
        shape = (x.shape[0], self.overlap, x.shape[2])
        if self._pad == "edge":
            return mx.broadcast_to(x[:, :1], shape)
        return mx.zeros(shape, x.dtype)


class StreamConvTranspose(nn.Module):
    """Causal transposed convolution whose kernel is twice its stride.

    Each output block of ``stride`` samples is a linear map of the current and of the
    previous input, so it is one matrix product; the state is the previous input.
    """

    overlap = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = mx.zeros((2 * in_channels, stride * out_channels))
        self.bias = mx.zeros((out_channels,))

    def __call__(
        self, x: mx.array, state: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """Upsample ``x`` (batch, t, in) to (batch, t * stride, out)."""
        b, t, _ = x.shape
        y = _with_previous(x, state) @ self.weight
        return y.reshape(b, t * self.stride, -1) + self.bias, tail(x, 1)


class DepthwiseUpsample(nn.Module):
    """Depthwise transposed convolution, kernel 4, stride 2, no bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = mx.zeros((4, channels))

    def __call__(
        self, x: mx.array, state: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """Upsample ``x`` (batch, t, channels) to (batch, 2 t, channels)."""
        b, t, c = x.shape
        x2 = _with_previous(x, state).reshape(b, t, 2, c)
        w = mx.split(self.weight, 4)
        even = x2[:, :, 0] * w[0] + x2[:, :, 1] * w[2]
        odd = x2[:, :, 0] * w[1] + x2[:, :, 1] * w[3]
        return mx.stack([even, odd], axis=2).reshape(b, 2 * t, c), tail(x, 1)


def tail(x: mx.array, length: int) -> mx.array:
    """The last inputs of ``x`` (batch, t, c), a copy: a view would keep all of it."""
    return mx.contiguous(x[:, -length:])


def _with_previous(x: mx.array, state: mx.array | None) -> mx.array:
    """Each input of ``x`` (batch, t, c) beside the one before it: (batch, t, 2 c).

    ``state`` (batch, 1, c) is the input before the chunk, None for zeros.
    """
    first = mx.zeros_like(x[:, :1]) if state is None else state
    previous = mx.concatenate([first, x[:, :-1]], axis=1)
    return mx.concatenate([x, previous], axis=-1)
