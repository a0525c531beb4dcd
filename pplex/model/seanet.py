"""SEANet: the convolutional encoder and decoder of the codec.

Follows NVIDIA's PersonaPlex, ``modules/seanet.py``, with the module numbers of its
checkpoints: index ``i`` here is ``encoder.model.<i>`` there.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from pplex.model.config import SeanetConfig
from pplex.model.conv import StreamConv, StreamConvTranspose


class ResidualBlock(nn.Module):
    """``x + conv1(elu(conv3(elu(x))))`` through a narrower middle."""

    def __init__(self, channels: int, kernel: int, compress: int) -> None:
        super().__init__()
        hidden = channels // compress
        self.conv1 = StreamConv(channels, hidden, kernel)
        self.conv2 = StreamConv(hidden, channels, 1)

    def __call__(
        self, x: mx.array, state: mx.array | None
    ) -> tuple[mx.array, mx.array | None]:
        """Map ``x`` (batch, t, channels) to the same shape."""
        y, state = self.conv1(nn.elu(x), state)
        y, _ = self.conv2(nn.elu(y), None)
        return x + y, state


class Elu(nn.Module):
    """ELU without state, with the call of the streaming layers."""

    def __call__(self, x: mx.array, state: None) -> tuple[mx.array, None]:
        """Apply ELU to ``x``."""
        return nn.elu(x), None


class Seanet(nn.Module):
    """A sequence of streaming layers; the state is one entry a layer."""

    def __init__(self, model: list[nn.Module]) -> None:
        super().__init__()
        self.model = model

    def __call__(
        self, x: mx.array, state: list[Any] | None
    ) -> tuple[mx.array, list[Any]]:
        """Run a chunk ``x`` (batch, t, channels) through all layers."""
        after = []
        for idx, layer in enumerate(self.model):
            x, s = layer(x, None if state is None else state[idx])
            after.append(s)
        return x, after


def make_encoder(config: SeanetConfig) -> Seanet:
    """PCM (batch, samples, 1) to latents (batch, samples / hop, dimension)."""
    channels = config.n_filters
    model: list[nn.Module] = [StreamConv(1, channels, config.kernel_size)]
    for ratio in reversed(config.ratios):
        model += [
            ResidualBlock(channels, config.residual_kernel_size, config.compress),
            Elu(),
            StreamConv(channels, 2 * channels, 2 * ratio, stride=ratio),
        ]
        channels *= 2
    model += [Elu(), StreamConv(channels, config.dimension, config.last_kernel_size)]
    return Seanet(model)


def make_decoder(config: SeanetConfig) -> Seanet:
    """Latents (batch, t, dimension) to PCM (batch, t * hop, 1)."""
    channels = config.n_filters << len(config.ratios)
    model: list[nn.Module] = [
        StreamConv(config.dimension, channels, config.kernel_size)
    ]
    for ratio in config.ratios:
        model += [
            Elu(),
            StreamConvTranspose(channels, channels // 2, ratio),
            ResidualBlock(channels // 2, config.residual_kernel_size, config.compress),
        ]
        channels //= 2
    model += [Elu(), StreamConv(channels, 1, config.last_kernel_size)]
    return Seanet(model)
