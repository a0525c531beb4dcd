"""Voice and role of the agent: from names, files and words to a prompt, and back.

A voice is a saved one or a recording; of a recording a voice file can be made, which is
what the reference saves of a voice prompt.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from pplex.audio.files import Channel, frames_of, read_pcm
from pplex.audio.loudness import normalize_loudness, trim_silence
from pplex.checkpoint import voice_codes, voices
from pplex.checkpoint.folder import VOICE_SUFFIXES
from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.voices import MADE_FOR, RING_LENGTH, write_voice_file
from pplex.conversation.roles import DEFAULT_ROLE, ROLES
from pplex.conversation.session import Model
from pplex.conversation.state import Opening
from pplex.errors import PplexError
from pplex.model.config import LmConfig, ModelConfig
from pplex.model.prompt import Prompt, initial_column, make_prompt, no_prompt

# Prefilled states that runs of many keep; each is tens of MB for the 7B models.
KEPT_ROLES = 4

_DEFAULT_VOICE = "NATF2"
_MIN_FRAMES = 2

# Told what is odd about a voice recording, in a sentence.
_Warn = Callable[[str], None]


def _ignore(warning: str) -> None:
    """Nobody is told."""


class HasVoices(Protocol):
    """What is asked for voices: a model, loaded or not."""

    @property
    def local(self) -> LocalModel: ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def voices(self) -> dict[str, Path]: ...


@dataclass(frozen=True)
class Role:
    """A prompt laid out for a model, with the names to report, empty of none."""

    prompt: Prompt
    voice: str
    text: str


def choose_voice(model: HasVoices, voice: str | None) -> str:
    """The voice to use: ``voice`` itself, else NATF2, else the first by name.

    Of a model that knows none it is empty.
    """
    if model.config.lm.is_moshi:
        if voice:
            raise PplexError(
                f"{model.local.name} is a Moshi, which has one voice of its own and "
                "takes no other: leave out --voice"
            )
        return ""
    if voice is not None:
        return voice
    if not model.voices:
        raise PplexError(
            f"{model.local.path}: the checkpoint has no voices; give one with "
            "--voice FILE.wav"
        )
    return (
        _DEFAULT_VOICE if _DEFAULT_VOICE in model.voices else next(iter(model.voices))
    )


def choose_text(model: HasVoices, text: str | None) -> str:
    """The role to play: ``text`` itself, else the default one.

    Of a model that knows none it is empty.
    """
    if model.config.lm.is_moshi:
        if text:
            raise PplexError(
                f"{model.local.name} is a Moshi, which takes no role: leave out "
                "--prompt, --prompt-file and --role"
            )
        return ""
    return ROLES[DEFAULT_ROLE] if text is None else text


def make_role(
    model: Model, voice: str | None, text: str | None, warn: _Warn = _ignore
) -> Role:
    """Lay out the prompt of ``voice`` (a name or a file) and the role ``text``.

    None is the model's own.
    """
    name, text = choose_voice(model, voice), choose_text(model, text)
    if model.config.lm.is_moshi:
        return Role(no_prompt(model.config.lm), name, text)
    text_ids = model.tokenizer.encode_prompt(text)
    path = voices.voice_file(name, model.voices)
    if path.suffix.lower() in VOICE_SUFFIXES:
        saved = voices.read_voice_file(path)
        lm = model.config.lm
        voices.check_voice(saved, lm.dim, text_card=lm.text_card, card=lm.card)
        voices.check_made_for(saved, _first_input(model))
        _check_remembered(name, len(saved.embeddings) + 1, lm)
        prompt = make_prompt(
            model.config, text_ids, saved_voice=(saved.embeddings, saved.cache)
        )
    else:
        codes = encode_voice(model, path, warn=warn)
        _check_remembered(name, codes.shape[1], model.config.lm)
        prompt = make_prompt(model.config, text_ids, voice_codes=codes)
    return Role(prompt, name, text)


def _check_remembered(name: str, frames: int, lm: LmConfig) -> None:
    """Of a longer voice the model would forget the beginning."""
    if frames > lm.context:
        raise PplexError(
            f"voice {name}: it has {frames} frames, more than the {lm.context} the "
            "model remembers; shorten it"
        )


def open_role(
    model: Model, voice: str | None, text: str | None, warn: _Warn = _ignore
) -> Opening:
    """Where conversations with ``voice`` and the role ``text`` begin; see there."""
    role = make_role(model, voice, text, warn)
    start = model.engine.prefill(role.prompt)
    return Opening(start, role.voice, role.text, role.prompt.num_frames)


def _first_input(model: Model) -> np.ndarray:
    """The model's input before the first frame, float32 (dim,)."""
    first: np.ndarray = model.engine.embed(initial_column(model.config.lm)[:, None])[0]
    return first


def encode_voice(
    model: Model,
    path: Path,
    *,
    channel: Channel = 1,
    trim: bool = False,
    warn: _Warn = _ignore,
) -> np.ndarray:
    """Codes (codebooks, frames) of a voice recording, normalised to -24 LUFS.

    With ``trim``, without the silence at both ends. The codes are kept in the user's
    cache, for the next time.
    """
    rate = model.config.sample_rate
    try:
        recording = read_pcm(path, sample_rate=rate, channel=channel)
        pcm = recording.pcm
        pcm = normalize_loudness(trim_silence(pcm, rate) if trim else pcm, rate)
    except PplexError as e:
        raise PplexError(f"voice {path}: {e}") from e
    for warning in recording.warnings:
        warn(f"voice {warning}")
    key = voice_codes.key(pcm, model.local.folder.codec, model.engine.name)
    codes = voice_codes.read(key)
    if codes is None or not _are_codes(codes, model.config.lm):
        codes = _encode(model, pcm)
        voice_codes.write(key, codes)
    return codes


def _are_codes(found: np.ndarray, lm: LmConfig) -> bool:
    """Whether an array from the user's cache is codes (codebooks, frames)."""
    return (
        found.ndim == 2
        and found.shape[0] == lm.num_codebooks
        and found.size > 0
        and bool(np.issubdtype(found.dtype, np.integer))
        and bool((found >= 0).all() and (found < lm.card).all())
    )


def _encode(model: Model, pcm: np.ndarray) -> np.ndarray:
    """Codes (codebooks, frames) of a whole recording (samples,)."""
    codec, frames = model.engine.codec, frames_of(pcm, model.config.frame_size)
    state, size = codec.make_state(), codec.chunk_frames
    chunks = [frames[i : i + size] for i in range(0, len(frames), size)]
    return np.concatenate([codec.encode(chunk, state) for chunk in chunks], axis=1)


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


def _make_voice(
    model: Model,
    recording: Path,
    *,
    channel: Channel = 1,
    trim: bool = False,
    warn: _Warn = _ignore,
) -> OwnVoice:
    """Run a voice recording through the model's codec and tables.

    A conversation that starts from the result is the one that starts from the
    recording itself.
    """
    codes = encode_voice(model, recording, channel=channel, trim=trim, warn=warn)
    frames = codes.shape[1]
    if frames < _MIN_FRAMES:
        raise PplexError(f"voice {recording}: it has {frames} frame, too few")
    prompt = make_prompt(model.config, [], voice_codes=codes)
    columns = prompt.columns
    # The ring at the end: the last columns, and of the one after them the rows that
    # are delayed, so that their last codes lie in it.
    ring = np.repeat(columns[:, :1], RING_LENGTH, axis=1)
    for idx in range(max(0, frames - RING_LENGTH), frames):
        ring[:, idx % RING_LENGTH] = columns[:, idx]
    delayed = np.array(model.config.lm.delays) > 0
    ring[delayed, frames % RING_LENGTH] = columns[delayed, frames]
    embeddings = model.engine.embed(columns[:, : frames - 1])
    return OwnVoice(embeddings, ring, frames, frames / model.config.frame_rate)


def write_voice(
    model: Model,
    recording: Path,
    output: Path,
    *,
    channel: Channel = 1,
    trim: bool = False,
    warn: _Warn = _ignore,
) -> OwnVoice:
    """Make a voice and write it to ``output``, with a note of the model it is for."""
    local = model.local
    if model.config.lm.is_moshi:
        raise PplexError(
            f"{local.name} is a Moshi, which takes no voice: make one for a PersonaPlex"
        )
    made = _make_voice(model, recording, channel=channel, trim=trim, warn=warn)
    notes = {
        MADE_FOR: f"{local.repo}@{local.revision}" if local.repo else local.name,
        "pplex_source": recording.name,
        "pplex_version": importlib.metadata.version("pplex"),
    }
    write_voice_file(output, made.embeddings, made.cache, notes=notes)
    return made
