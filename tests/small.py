"""A small model with random weights, and conversations with it."""

from __future__ import annotations

import numpy as np

from pplex.config import (
    CodecTransformerConfig,
    LmConfig,
    MimiConfig,
    ModelConfig,
    QuantizerConfig,
    SeanetConfig,
)
from pplex.conversation.session import Conversation
from pplex.model.sampling import GREEDY

FRAME = 1920
SMALL = ModelConfig(
    lm=LmConfig(
        dim=64,
        num_heads=2,
        num_layers=2,
        hidden_dim=128,
        context=50,
        text_card=120,
        card=64,
        dep_q=16,
        depformer_dim=64,
        depformer_num_heads=2,
        depformer_num_layers=2,
        depformer_hidden_dim=64,
    ),
    mimi=MimiConfig(
        seanet=SeanetConfig(n_filters=2, dimension=32),
        transformer=CodecTransformerConfig(
            d_model=32, num_heads=2, num_layers=2, dim_feedforward=64, context=20
        ),
        quantizer=QuantizerConfig(dimension=8, n_q=8, bins=64),
    ),
    silence_codes=tuple(range(8)),
    sine_codes=tuple(range(8, 16)),
)


def speech(frames: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 0.1 * rng.standard_normal((frames, FRAME)).astype(np.float32)


def converse(model, prefilled, frames, sampling=GREEDY, seed=0, chunk=16):
    conversation = Conversation(model, prefilled, sampling, seed)
    chunks = (frames[i : i + chunk] for i in range(0, len(frames), chunk))
    replies = list(conversation.run(chunks, decode_frames=chunk))
    return (
        np.concatenate([np.concatenate([r.text[None], r.agent]) for r in replies], 1),
        np.concatenate([r.user for r in replies], 1),
        np.concatenate([r.pcm for r in replies]),
    )
