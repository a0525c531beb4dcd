"""Voice prompts: find those of a checkpoint, read one, write one.

A voice is what NVIDIA's `save_voice_prompt_embeddings` stores: the summed input
vectors of its frames and the ring of tokens at their end.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from pplex.checkpoint import safetensors, torchfile
from pplex.checkpoint.folder import (
    VOICE_SUFFIXES,
    VOICES_ARCHIVE,
    VOICES_FOLDER,
    CheckpointFolder,
)
from pplex.checkpoint.safetensors import TensorSpec
from pplex.checkpoint.unpack import unpack_voices
from pplex.errors import PplexError, did_you_mean

_NUM_STREAM_ROWS = 17
RING_LENGTH = 4
MADE_FOR = "pplex_model"

# How far a voice's first vector may lie from the model's, relative to its length:
# tables may be quantized, voices rounded.
_FIRST_VECTOR_TOLERANCE = 0.1

_FLOATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class VoicePrompt:
    """A stored voice.

    `embeddings` is float32 (frames, dim), one less than the voice's frames; `cache`
    is int32 (17, 4), rows as text, agent, user; `dtype` is what the file held;
    `notes` what pplex wrote of a voice that it made, empty for others.
    """

    name: str
    embeddings: np.ndarray
    cache: np.ndarray
    dtype: str
    notes: Mapping[str, str] = field(default_factory=dict)


def read_voice_file(path: Path) -> VoicePrompt:
    """Read a voice from a `.pt` or `.safetensors` file; nothing in it is executed."""
    path = Path(path)
    if path.suffix.lower() not in VOICE_SUFFIXES:
        raise PplexError(f"{path} is not a voice file: give a .pt or .safetensors file")
    if not path.is_file():
        raise PplexError(f"the voice file {path} does not exist; check the name")
    notes: dict[str, str] = {}
    if path.suffix.lower() == ".pt":
        arrays = torchfile.read_tensors(path)
    else:
        notes = safetensors.read_metadata(path)
        arrays = safetensors.read_arrays(path, ("embeddings", "cache"))
    missing = [name for name in ("embeddings", "cache") if name not in arrays]
    if missing:
        raise PplexError(f"{path} is not a voice file: it has no {missing[0]!r} tensor")
    dtype, embeddings = arrays["embeddings"]
    return VoicePrompt(
        name=path.stem,
        embeddings=_check_embeddings(path, dtype, embeddings),
        cache=_check_cache(path, arrays["cache"][1]),
        dtype=dtype,
        notes=notes,
    )


def fits_first(voice: VoicePrompt, first: np.ndarray) -> bool:
    """Whether a voice begins as the model does: with its input before any frame.

    ``first`` is float32 (dim,), the sum of the rows of all initial ids.
    """
    apart = np.linalg.norm(voice.embeddings[0] - first)
    return bool(apart <= _FIRST_VECTOR_TOLERANCE * np.linalg.norm(first))


def check_made_for(voice: VoicePrompt, first: np.ndarray) -> None:
    """Refuse a voice of `pplex voices make` that was made for another model."""
    if MADE_FOR in voice.notes and not fits_first(voice, first):
        raise PplexError(
            f"voice {voice.name!r} was made for the model {voice.notes[MADE_FOR]}, and "
            "this is another; make it again with `pplex voices make`"
        )


def check_voice(
    voice: VoicePrompt,
    dim: int,
    *,
    text_card: int | None = None,
    card: int | None = None,
) -> None:
    """Refuse a voice made for another model.

    `dim` is the temporal transformer's width. With `text_card` and `card`, ids in the
    ring must lie in that model's tables: -2 (not yet made) up to the initial id.
    """
    width = voice.embeddings.shape[1]
    if width != dim:
        raise PplexError(
            f"voice {voice.name!r} was made for a model of width {width}, this model "
            f"has width {dim}; choose another voice"
        )
    limits = [(0, 1, text_card, "text"), (1, _NUM_STREAM_ROWS, card, "audio")]
    for start, stop, limit, stream in limits:
        rows = voice.cache[start:stop]
        if limit is not None and (rows.min() < -2 or rows.max() > limit):
            raise PplexError(
                f"voice {voice.name!r} has {stream} ids from {rows.min()} to "
                f"{rows.max()}, this model's end at {limit}; choose another voice"
            )


def voice_file(name: str, known: Mapping[str, Path]) -> Path:
    """The file of one of a model's ``known`` voices, or the file of this name."""
    path = known.get(name, Path(name))
    if path.is_file():
        return path
    raise PplexError(
        f"voice {name!r}: neither a voice of this model "
        f"({', '.join(known) or 'none'}) nor a file" + did_you_mean(name, known)
    )


def find_voices(model_path: Path) -> dict[str, Path]:
    """Name the voices of a checkpoint folder (or of a weight file's folder), sorted.

    `voices/*.safetensors` and `voices/*.pt` count, the former first where a name has
    both; without any, `voices.tgz` is unpacked once into the user's cache.
    """
    folder = CheckpointFolder(model_path).path
    voices = _voices_in(folder / VOICES_FOLDER)
    archive = folder / VOICES_ARCHIVE
    if not voices and archive.is_file():
        voices = _voices_in(unpack_voices(archive))
    return voices


def write_voice_file(
    path: Path,
    embeddings: np.ndarray,
    cache: np.ndarray,
    dtype: Literal["float32", "bfloat16"] = "float32",
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write embeddings (frames, dim) and cache (17, 4) as the MLX layouts have them.

    [frames,1,1,dim] in `dtype` and [1,17,4] in float32 (sic), atomically. `notes` go
    into the file's metadata.
    """
    frames, dim = embeddings.shape
    stored = np.asarray(embeddings, "<f4").reshape(frames, 1, 1, dim)
    kind = "F32"
    if dtype == "bfloat16":
        kind, stored = "BF16", safetensors.narrow_bfloat16(stored)
    ring = np.asarray(cache, "<f4").reshape(1, _NUM_STREAM_ROWS, RING_LENGTH)
    specs = [
        TensorSpec("cache", "F32", ring.shape),
        TensorSpec("embeddings", kind, stored.shape),
    ]
    safetensors.write_tensors(Path(path), specs, [ring, stored], notes)


def _voices_in(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for suffix in VOICE_SUFFIXES:
        for path in folder.glob(f"*{suffix}"):
            if path.is_file() and not path.name.startswith("."):
                found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def _check_embeddings(path: Path, dtype: str, embeddings: np.ndarray) -> np.ndarray:
    shape = embeddings.shape
    if dtype not in _FLOATS:
        raise PplexError(f"{path} is not a voice file: its embeddings are {dtype}")
    if len(shape) != 4 or shape[1:3] != (1, 1) or not shape[0] or not shape[3]:
        raise PplexError(
            f"{path} is not a voice file: its embeddings have shape {list(shape)}, "
            "where [frames, 1, 1, width] is expected"
        )
    values = embeddings.reshape(shape[0], shape[3]).astype(np.float32)
    if not np.isfinite(values).all():
        raise PplexError(
            f"{path} is damaged: its embeddings have NaN or infinite values"
        )
    return values


def _check_cache(path: Path, cache: np.ndarray) -> np.ndarray:
    if cache.shape != (1, _NUM_STREAM_ROWS, RING_LENGTH):
        raise PplexError(
            f"{path} is not a voice file: its cache has shape {list(cache.shape)}, "
            f"where {[1, _NUM_STREAM_ROWS, RING_LENGTH]} is expected"
        )
    values = cache[0].astype(np.float64)
    if not (np.abs(values) < 1 << 31).all() or (values != np.rint(values)).any():
        raise PplexError(f"{path} is damaged: its cache has values that are no ids")
    ring: np.ndarray = values.astype(np.int32)
    return ring
