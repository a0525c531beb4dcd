"""Make a voice file from a recording: what the reference saves of a voice prompt."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from pplex.audio.files import Channel
from pplex.checkpoint.voices import MADE_FOR, RING_LENGTH, write_voice_file
from pplex.conversation.prompt import make_prompt
from pplex.conversation.session import Model, encode_voice
from pplex.errors import PplexError

MIN_FRAMES = 2


@dataclass(frozen=True)
class OwnVoice:
    """A voice made from a recording of ``frames`` frames.

    ``embeddings`` is float32 (frames - 1, dim), ``cache`` int32 (streams, ring), as in
    ``VoicePrompt``.
    """

    embeddings: np.ndarray
    cache: np.ndarray
    frames: int
    duration_s: float


def make_voice(
    model: Model, recording: Path, *, channel: Channel = 1, trim: bool = False
) -> OwnVoice:
    """Run a voice recording through the model's codec and tables.

    A conversation that starts from the result is the one that starts from the
    recording itself.
    """
    codes = encode_voice(model, recording, channel=channel, trim=trim)
    frames = codes.shape[1]
    if frames < MIN_FRAMES:
        raise PplexError(f"voice {recording}: it has {frames} frame, too few")
    prompt = make_prompt(model.config, [], voice_codes=codes)
    columns = prompt.columns
    inputs = model.lm.embed(mx.array(columns[None, :, : frames - 1]))
    # The ring at the end: the last columns, and of the one after them the rows that
    # are delayed, so that their last codes lie in it.
    ring = np.repeat(columns[:, :1], RING_LENGTH, axis=1)
    for idx in range(max(0, frames - RING_LENGTH), frames):
        ring[:, idx % RING_LENGTH] = columns[:, idx]
    delayed = np.array(model.config.lm.delays) > 0
    ring[delayed, frames % RING_LENGTH] = columns[delayed, frames]
    embeddings = np.array(inputs[0].astype(mx.float32))
    return OwnVoice(embeddings, ring, frames, frames / model.config.frame_rate)


def write_voice(
    model: Model,
    recording: Path,
    output: Path,
    *,
    channel: Channel = 1,
    trim: bool = False,
) -> OwnVoice:
    """Make a voice and write it to ``output``, with a note of the model it is for."""
    made = make_voice(model, recording, channel=channel, trim=trim)
    local = model.local
    notes = {
        MADE_FOR: f"{local.repo}@{local.revision}" if local.repo else local.name,
        "pplex_source": recording.name,
        "pplex_version": importlib.metadata.version("pplex"),
    }
    write_voice_file(output, made.embeddings, made.cache, notes=notes)
    return made
