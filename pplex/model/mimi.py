"""Mimi, the streaming audio codec.

Follows NVIDIA's PersonaPlex, ``models/compression.py``, in streaming mode, the only
one used at inference: causal, with a window of latents on each side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from pplex.model.cache import KvCache
from pplex.model.config import CodecTransformerConfig, MimiConfig
from pplex.model.conv import DepthwiseUpsample, StreamConv
from pplex.model.quantizer import SplitQuantizer
from pplex.model.seanet import make_decoder, make_encoder
from pplex.model.transformer import CodecLayer, run_layers


@dataclass
class CodecState:
    """What one direction of the codec carries between chunks."""

    cache: KvCache
    seanet: list[Any] | None = None
    resample: mx.array | None = None

    def copy(self) -> CodecState:
        """A state with the same contents that can go its own way."""
        seanet = None if self.seanet is None else list(self.seanet)
        return CodecState(self.cache.copy(), seanet, self.resample)

    def arrays(self) -> list[mx.array]:
        """The arrays held, for evaluation."""
        held = [self.resample, *(self.seanet or [])]
        return self.cache.arrays() + [a for a in held if isinstance(a, mx.array)]


class CodecTransformer(nn.Module):
    """Transformer over latents."""

    def __init__(self, config: CodecTransformerConfig) -> None:
        super().__init__()
        self._max_period = config.max_period
        self.layers = [
            CodecLayer(config.d_model, config.num_heads, config.dim_feedforward)
            for _ in range(config.num_layers)
        ]

    def __call__(self, x: mx.array, cache: KvCache) -> mx.array:
        """Map latents (batch, t, width) to the same shape."""
        return run_layers(self.layers, x, cache, self._max_period)


class Mimi(nn.Module):
    """PCM to codes and back, in chunks of whole frames of any number."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        self._config = config
        self.cache_kind = KvCache
        width = config.seanet.dimension
        self.encoder = make_encoder(config.seanet)
        self.encoder_transformer = CodecTransformer(config.transformer)
        self.downsample = StreamConv(width, width, 4, stride=2, bias=False, pad="edge")
        self.quantizer = SplitQuantizer(
            width,
            config.quantizer.dimension,
            config.num_codebooks,
            config.quantizer.bins,
        )
        self.upsample = DepthwiseUpsample(width)
        self.decoder_transformer = CodecTransformer(config.transformer)
        self.decoder = make_decoder(config.seanet)

    @property
    def frame_size(self) -> int:
        """Samples of a frame."""
        return self._config.frame_size

    def make_state(self) -> CodecState:
        """A fresh state, for one direction of one stream."""
        transformer = self._config.transformer
        block = self._config.latents_per_frame
        layers, window = transformer.num_layers, transformer.window
        return CodecState(self.cache_kind(layers, window, block))

    def encode_latent(self, pcm: mx.array, state: CodecState) -> mx.array:
        """PCM (batch, frames * frame_size) to latents (batch, frames, width)."""
        x, state.seanet = self.encoder(pcm[..., None], state.seanet)
        x = self.encoder_transformer(x, state.cache)
        x, state.resample = self.downsample(x, state.resample)
        return x

    def encode(self, pcm: mx.array, state: CodecState) -> mx.array:
        """PCM (batch, frames * frame_size) to codes (batch, codebooks, frames)."""
        return self.quantizer.encode(self.encode_latent(pcm, state))

    def decode(self, codes: mx.array, state: CodecState) -> mx.array:
        """Codes (batch, codebooks, frames) to PCM (batch, frames * frame_size)."""
        x = self.quantizer.decode(codes)
        x, state.resample = self.upsample(x, state.resample)
        x = self.decoder_transformer(x, state.cache)
        x, state.seanet = self.decoder(x, state.seanet)
        return x[..., 0]


def make_mimi(config: MimiConfig, weights: Mapping[str, mx.array]) -> Mimi:
    """A codec of these weights, float32 and named as its parameters."""
    mimi = Mimi(config)
    mimi.load_weights(list(weights.items()))
    mx.eval(mimi.parameters())  # any thread may use it
    return mimi
