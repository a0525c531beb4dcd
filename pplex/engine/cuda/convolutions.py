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
    skip: mx.array | None,
    state: mx.array | None,
    *,
    keep: bool = False,
) -> tuple[mx.array, mx.array | None]:
    """``elu(x + bias + skip)`` behind ``state``, and with ``keep`` that sum.

    All are float32: ``x`` and ``skip`` (batch, t, channels), ``bias`` (channels,) and
    ``state`` (batch, room, channels), None for no room; channels are a multiple of 4.
    The first result is (batch, room + t, channels).
    """
    batch, rows, channels = x.shape
    room = 0 if state is None else state.shape[1]
    values = (room + rows) * channels // 4
    y, total = _kernel()(
        [x, bias, x if skip is None else skip, bias if state is None else state],
        [
            ((batch, room + rows, channels), mx.float32),
            (x.shape if keep else (4,), mx.float32),
        ],
        [rows, room, channels // 4, int(skip is not None), int(keep)],
        blocks=(-(-values // (_EACH * _THREADS)), batch),
    )
    return y, total if keep else None


def source() -> str:
    """The text of the kernel."""
    texts = read_source("common.cu"), read_source("elu_behind.cu")
    return with_constants({"THREADS": _THREADS}, *texts)


@functools.cache
def _kernel() -> Kernel:
    return Kernel.of("elu_behind", source(), _THREADS)
