"""What decides the agent's answer, apart from the model and the recording."""

from __future__ import annotations

from dataclasses import dataclass

from pplex.audio.files import Channel
from pplex.model.sampling import SamplingConfig


@dataclass(frozen=True)
class Settings:
    """``voice`` is a name or a file, None for the model's own; ``text`` the role."""

    voice: str | None
    text: str
    sampling: SamplingConfig
    seed: int
    channel: Channel = 1
    tail_s: float = 0.0
