"""What the agent answers, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pplex.engine.base import Arrays


@dataclass
class Timings:
    """Seconds spent so far, by part; ``steps`` has an entry a frame.

    What the codec does in a thread beside the steps counts only as far as they had to
    wait for it. Where recordings step together each has an even share of a step.
    """

    encode_s: float = 0.0
    decode_s: float = 0.0
    steps: list[float] = field(default_factory=list)


_NOTHING = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Answer:
    """The agent's side of a recording, or of a stretch of one, beside the user's codes.

    ``pcm`` is (samples,), ``text`` (frames,), ``agent`` and ``user`` (codebooks,
    frames); all belong to the same frames of the recording. ``timings`` are those of
    the whole conversation. ``heard`` is the user's side (samples,) of a stretch; that
    of a whole answer is the recording. ``fault`` says why that could not be read on.
    ``saved`` is what the conversation goes on from, where that is wanted. A live reply
    is made before its frame is encoded: it has no ``user``.
    """

    pcm: np.ndarray
    text: np.ndarray
    agent: np.ndarray
    user: np.ndarray
    timings: Timings
    heard: np.ndarray = field(default_factory=lambda: _NOTHING)
    fault: str = ""
    saved: Arrays | None = None


def join(pieces: Sequence[Answer]) -> Answer:
    """The whole answer, from its stretches in order."""
    return Answer(
        pcm=np.concatenate([piece.pcm for piece in pieces]),
        text=np.concatenate([piece.text for piece in pieces]),
        agent=np.concatenate([piece.agent for piece in pieces], axis=1),
        user=np.concatenate([piece.user for piece in pieces], axis=1),
        timings=pieces[-1].timings,
    )


class Kept:
    """What stays of an answer whose sound is written as it is made.

    That is everything but the sound, of which the last frame is kept to be looked at.
    """

    def __init__(self, frame_size: int) -> None:
        self._frame_size = frame_size
        self._pieces: list[Answer] = []
        self._end = _NOTHING
        self.num_samples = 0

    def add(self, piece: Answer) -> None:
        """Keep the next stretch."""
        self.num_samples += len(piece.pcm)
        self._end = np.concatenate([self._end, piece.pcm])[-self._frame_size :]
        self._pieces.append(replace(piece, pcm=_NOTHING, heard=_NOTHING))

    def answer(self) -> Answer:
        """The whole answer; its ``pcm`` is the end only."""
        return replace(join(self._pieces), pcm=self._end)
