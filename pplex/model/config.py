"""Sizes of a model; the defaults are the published 7B's.

``checkpoint.config`` reads them from a model's ``config.json``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from pplex.errors import PplexError

# Prompt constants of the published codec: eight codes of a silent agent frame and of a
# user frame that holds a sine tone.
_SILENCE_CODES = (948, 243, 1178, 546, 1736, 1030, 1978, 2008)
_SINE_CODES = (430, 1268, 381, 1611, 1095, 1495, 56, 472)

_KV_WIDTHS = 32, 64, 128  # of heads, of which MLX multiplies quantized keys

# How NVIDIA's code draws audio and text tokens unless it is told.
TEMP, TOP_K = 0.8, 250
TEXT_TEMP, TEXT_TOP_K = 0.7, 25

TEXT_EPAD = 0
TEXT_PAD = 3
# Ids 0 to 3 say nothing: end of padding (and unknown characters), start, end, padding.
NUM_SPECIAL = 4


def gated_hidden_dim(feed_forward: int) -> int:
    """Width of a SwiGLU layer whose nominal feed-forward width is ``feed_forward``."""
    return 2 * feed_forward // 3


@dataclass(frozen=True)
class LmConfig:
    """Sizes of the language model: temporal transformer, depformer, token streams.

    ``is_moshi``: Kyutai's Moshi, of which PersonaPlex was made. It knows no prompts,
    reads what the user says in a frame before it answers that frame, and its rings of
    keys hide no slot.
    """

    dim: int = 4096
    num_heads: int = 32
    num_layers: int = 32
    hidden_dim: int = 11264
    context: int = 3000
    max_period: float = 10000.0
    text_card: int = 32000
    card: int = 2048
    n_q: int = 16
    dep_q: int = 16
    delays: tuple[int, ...] = (0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1)
    depformer_dim: int = 1024
    depformer_num_heads: int = 16
    depformer_num_layers: int = 6
    depformer_hidden_dim: int = 2816
    is_moshi: bool = False

    @property
    def num_codebooks(self) -> int:
        """Codebooks of one audio stream (agent or user)."""
        return self.n_q // 2

    @property
    def num_streams(self) -> int:
        """Rows of the token grid: text, agent codebooks, user codebooks."""
        return self.n_q + 1

    @property
    def lag(self) -> int:
        """Columns that a frame is known whole after the first of its tokens."""
        return max(self.delays)

    @property
    def num_agent_streams(self) -> int:
        """Rows that the model writes in a conversation: text and agent codebooks."""
        return 1 + self.num_codebooks

    @property
    def text_initial(self) -> int:
        """Text id before the first frame."""
        return self.text_card

    @property
    def audio_initial(self) -> int:
        """Audio id before the first frame."""
        return self.card

    @property
    def window(self) -> int:
        """Keys a position sees, itself included: NVIDIA's code hides one slot."""
        return self.context if self.is_moshi else self.context - 1

    @property
    def hiding_step(self) -> int:
        """The depformer step that does not see the first one; -1: none.

        NVIDIA's ring has ``dep_q`` slots and hides the oldest when full.
        """
        return self.dep_q - 1 if self.dep_q > 1 and not self.is_moshi else -1


@dataclass(frozen=True)
class SeanetConfig:
    """Sizes of the convolutional encoder and decoder of the codec."""

    n_filters: int = 64
    dimension: int = 512
    ratios: tuple[int, ...] = (8, 6, 5, 4)
    kernel_size: int = 7
    residual_kernel_size: int = 3
    last_kernel_size: int = 3
    compress: int = 2


@dataclass(frozen=True)
class CodecTransformerConfig:
    """Sizes of the transformers on both sides of the codec's quantizer."""

    d_model: int = 512
    num_heads: int = 8
    num_layers: int = 8
    dim_feedforward: int = 2048
    context: int = 250
    max_period: float = 10000.0
    is_moshi: bool = False

    @property
    def window(self) -> int:
        """Keys visible to the last latent of a frame: NVIDIA's code hides one slot."""
        return self.context if self.is_moshi else self.context - 1


@dataclass(frozen=True)
class QuantizerConfig:
    """Sizes of the split residual vector quantizer."""

    dimension: int = 256
    n_q: int = 32
    bins: int = 2048


@dataclass(frozen=True)
class MimiConfig:
    """Sizes of the codec."""

    sample_rate: int = 24000
    frame_rate: float = 12.5
    num_codebooks: int = 8
    seanet: SeanetConfig = field(default_factory=SeanetConfig)
    transformer: CodecTransformerConfig = field(default_factory=CodecTransformerConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    @property
    def frame_s(self) -> float:
        """Seconds that a frame lasts."""
        return 1 / self.frame_rate

    @property
    def frame_size(self) -> int:
        """Samples in a frame."""
        return round(self.sample_rate / self.frame_rate)

    @property
    def latents_per_frame(self) -> int:
        """Latents the transformers see in a frame: the stride of the resamplers."""
        return self.frame_size // math.prod(self.seanet.ratios)


@dataclass(frozen=True)
class ModelConfig:
    """Everything ``config.json`` decides, and in how many bits keys are kept.

    ``kv_bits`` is of keys and values alike: 8, or None for as they are computed.
    """

    lm: LmConfig = field(default_factory=LmConfig)
    mimi: MimiConfig = field(default_factory=MimiConfig)
    silence_codes: tuple[int, ...] = _SILENCE_CODES
    sine_codes: tuple[int, ...] = _SINE_CODES
    kv_bits: int | None = None

    def with_kv_bits(self, bits: int | None) -> ModelConfig:
        """The same model with keys and values in ``bits``; PplexError if it cannot."""
        width = self.lm.dim // self.lm.num_heads
        if bits is not None and width not in _KV_WIDTHS:
            raise PplexError(
                f"keys and values of this model are {width} numbers wide, and only "
                f"those of {', '.join(map(str, _KV_WIDTHS))} are kept at {bits} bits: "
                "leave out --kv-bits"
            )
        return replace(self, kv_bits=bits)

    def kv_bytes(self, item_bytes: int) -> int:
        """Bytes of the keys and values of a position, computed in ``item_bytes``."""
        lm, scale_bytes = self.lm, 4
        key = lm.dim * item_bytes
        if self.kv_bits is not None:
            key = lm.dim * self.kv_bits // 8 + lm.num_heads * scale_bytes
        return 2 * lm.num_layers * key

    def as_moshi(self) -> ModelConfig:
        """The same sizes of Kyutai's Moshi."""
        transformer = replace(self.mimi.transformer, is_moshi=True)
        return replace(
            self,
            lm=replace(self.lm, is_moshi=True),
            mimi=replace(self.mimi, transformer=transformer),
        )

    @property
    def sample_rate(self) -> int:
        """Samples per second of the model's audio."""
        return self.mimi.sample_rate

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.mimi.frame_rate

    @property
    def frame_s(self) -> float:
        """Seconds that a frame lasts."""
        return self.mimi.frame_s

    @property
    def frame_size(self) -> int:
        """Samples in a frame."""
        return self.mimi.frame_size
