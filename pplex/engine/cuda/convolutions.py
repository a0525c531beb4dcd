"""What lies between the codec's convolutions as one CUDA kernel."""

from __future__ import annotations

import functools

import mlx.core as mx

from pplex.engine.cuda.compiler import Kernel, read_source, with_constants

_THREADS = 256
_EACH = 4  # values of four channels that a thread makes


def elu_behind(
    x: mx.array,
    bias: mx.array,
    skip: tuple[mx.array, mx.array] | None,
    state: mx.array | None,
) -> mx.array:
    """``elu(x + bias + skip)`` behind ``state`` (batch, room + t, channels).

    All are float32: ``x`` (batch, t, channels) and ``bias`` (channels,), which ``skip``
    has two of as well, to be added; ``state`` is (batch, room, channels), None for no
    room. Channels are a multiple of 4.
    """
    batch, rows, channels = x.shape
    room = 0 if state is None else state.shape[1]
    values = (room + rows) * channels // 4
    (y,) = _kernel()(
        [x, bias, *(skip or (x, bias)), bias if state is None else state],
        [((batch, room + rows, channels), mx.float32)],
        [rows, room, channels // 4, int(skip is not None)],
        blocks=(-(-values // (_EACH * _THREADS)), batch),
    )
    return y


def source() -> str:
    """The text of the kernel."""
    texts = read_source("common.cu"), read_source("elu_behind.cu")
    return with_constants({"THREADS": _THREADS}, *texts)


@functools.cache
def _kernel() -> Kernel:
    return Kernel.of("elu_behind", source(), _THREADS)
