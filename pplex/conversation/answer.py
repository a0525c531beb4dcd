"""What the agent answers, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Timings:
    """Seconds spent so far, by part; ``steps`` has an entry a frame.

    What the codec does in a thread beside the steps counts only as far as they had to
    wait for it. Where recordings step together each has an even share of a step.
    """

    encode_s: float = 0.0
    decode_s: float = 0.0
    steps: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """The agent's side of a recording, or of a stretch of one, beside the user's codes.

    ``pcm`` is (samples,), ``text`` (frames,), ``agent`` and ``user`` (codebooks,
    frames); all belong to the same frames of the recording. ``timings`` are those of
    the whole conversation.
    """

    pcm: np.ndarray
    text: np.ndarray
    agent: np.ndarray
    user: np.ndarray
    timings: Timings


def join(pieces: Sequence[Answer], num_samples: int) -> Answer:
    """The whole answer of ``num_samples`` samples, from its stretches in order."""
    return Answer(
        pcm=np.concatenate([piece.pcm for piece in pieces])[:num_samples],
        text=np.concatenate([piece.text for piece in pieces]),
        agent=np.concatenate([piece.agent for piece in pieces], axis=1),
        user=np.concatenate([piece.user for piece in pieces], axis=1),
        timings=pieces[-1].timings,
    )
