"""Conversations that are saved: what one goes on from, in memory and as a file.

A state has all that later frames depend on: the row's last tokens, keys and values and
place in the noise, both directions of the codec, and the sound after the last whole
frame, which is heard again with what follows it. So answering one recording and going
on with another is answering both at once, to the byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pplex.checkpoint.hashes import model_identity
from pplex.checkpoint.safetensors import (
    BrokenError,
    read_metadata,
    read_specs,
    read_values,
    spec_of,
    write_tensors,
)
from pplex.engine.base import Arrays, Engine, Start, check_tokens, checked
from pplex.engine.choose import kernels_of
from pplex.errors import PplexError
from pplex.files import Place, put_new
from pplex.model.sampling import SamplingConfig
from pplex.model.streams import user_rows
from pplex.values import fit, parse_json

if TYPE_CHECKING:
    from pplex.conversation.session import Model

SCHEMA = 1
_KEY = "pplex_conversation"  # of the file's metadata
_PARTS = "row", "encoder", "decoder"


class Saving:
    """Where a conversation is to be saved, and what is saved of it then.

    ``at`` is how many frames are whole, None until that is known: at its end, or
    before a frame that lacks samples and has ``num_rest``.
    """

    def __init__(self, at: int | None = None, num_rest: int = 0) -> None:
        self.at, self.num_rest = at, num_rest
        self.arrays: dict[str, np.ndarray] = {}

    def add(self, part: str, arrays: Arrays) -> None:
        """Save a part; only the first time counts."""
        for name, array in arrays.items():
            self.arrays.setdefault(f"{part}.{name}", array)

    def has(self, part: str) -> bool:
        """Whether a part was saved."""
        return any(name.startswith(f"{part}.") for name in self.arrays)


def one_by_one(chunks: Iterator[np.ndarray], first: int) -> Iterator[np.ndarray]:
    """``chunks`` (frames, width), from frame ``first`` on of one frame each."""
    done = 0
    for chunk in chunks:
        whole = min(max(0, first - done), len(chunk))
        if whole:
            yield chunk[:whole]
        yield from (chunk[i : i + 1] for i in range(whole, len(chunk)))
        done += len(chunk)


def start_from(engine: Engine, arrays: Arrays) -> Start:
    """Where a conversation was saved; ValueError if it was not one of this engine's."""
    parts: dict[str, dict[str, np.ndarray]] = {part: {} for part in _PARTS}
    for name, array in arrays.items():
        part, _, own = name.partition(".")
        if part in parts and own:
            parts[part][own] = array
    start, lm = engine.restore(parts["row"]), engine.config.lm
    user = checked(arrays, "user.tokens", (lm.num_codebooks,), np.int32)
    check_tokens(user, lm.card)
    rest = arrays.get("user.rest", np.zeros(0, np.float32))
    if rest.ndim != 1 or not len(rest) < engine.config.frame_size:
        raise ValueError(f"`user.rest` is {list(rest.shape)}")
    pending = np.array(start.prompt.pending)
    pending[user_rows(lm)] = user
    for part in ("encoder", "decoder"):  # what does not fit is to show now
        engine.codec.make_state(parts[part])
    return replace(
        start,
        prompt=replace(start.prompt, pending=pending),
        encoder=parts["encoder"],
        decoder=parts["decoder"],
        rest=np.asarray(rest, np.float32),
    )


@dataclass(frozen=True)
class Notes:
    """What is known of a saved conversation beside its arrays.

    It is ``duration_s`` long so far. ``model`` tells the weights, ``name`` what they
    were called; ``kernels`` is the version of the engine's arithmetic.
    """

    schema: int
    model: str
    name: str
    engine: str
    compute: str
    dtype: str
    kernels: str
    duration_s: float
    prompt_frames: int
    voice: str
    prompt: str
    seed: int
    temp: float
    top_k: int
    text_temp: float
    text_top_k: int

    @property
    def sampling(self) -> SamplingConfig:
        """How its tokens were drawn."""
        return SamplingConfig(self.temp, self.top_k, self.text_temp, self.text_top_k)


@dataclass(frozen=True)
class Opening:
    """Where a conversation begins: voice and role, empty of none, and their frames."""

    start: Start
    voice: str
    text: str
    prompt_frames: int


@dataclass(frozen=True)
class State:
    """A conversation that can go on; ``name`` is what messages call it."""

    notes: Notes
    arrays: Arrays
    name: str = "the saved conversation"

    @property
    def num_bytes(self) -> int:
        """Bytes of its arrays, which its file hardly exceeds."""
        return sum(array.nbytes for array in self.arrays.values())

    def open(self, model: Model) -> Opening:
        """Where it goes on; PplexError if another model, or form of it, said it."""
        engine, notes = model.engine, self.notes
        if model_identity(model.local) != notes.model:
            raise PplexError(
                f"{self.name} is of the model {notes.name}, and this is another, "
                f"{model.local.name}: a conversation goes on with the model that it "
                "began with"
            )
        here = engine.name, engine.compute, engine.dtype
        if here != (notes.engine, notes.compute, notes.dtype):
            raise PplexError(
                f"{self.name} was computed {notes.compute} in {notes.dtype} by the "
                f"engine {notes.engine}, and this is {engine.compute} in "
                f"{engine.dtype} by {engine.name}: go on on such a machine, with "
                "--compute and --kv-bits as there"
            )
        try:
            start = start_from(engine, self.arrays)
        except ValueError as e:
            raise _damaged(self.name, str(e)) from e
        return Opening(start, notes.voice, notes.prompt, notes.prompt_frames)

    def write(self, path: Path, place: Place = put_new) -> None:
        """Write it as a file, whole or not at all; ``place`` as ``atomic_write``."""
        arrays = dict(sorted(self.arrays.items()))
        specs = [spec_of(name, array) for name, array in arrays.items()]
        notes = {_KEY: json.dumps(asdict(self.notes), sort_keys=True)}
        write_tensors(path, specs, arrays.values(), notes, place=place)


def state_of(
    model: Model,
    arrays: Arrays,
    opening: Opening,
    seed: int,
    sampling: SamplingConfig,
) -> State:
    """What ``Saving`` has saved of a conversation, and how that was led."""
    engine, steps = model.engine, int(arrays["row.steps"][0])
    notes = Notes(
        schema=SCHEMA,
        model=model_identity(model.local),
        name=model.local.name,
        engine=engine.name,
        compute=engine.compute,
        dtype=engine.dtype,
        kernels=kernels_of(engine),
        # Moshi makes a step before the first frame.
        duration_s=max(0, steps - model.config.lm.is_moshi) * model.config.frame_s,
        prompt_frames=opening.prompt_frames,
        voice=opening.voice,
        prompt=opening.text,
        seed=seed,
        **asdict(sampling),
    )
    return State(notes, arrays)


def read_notes(path: Path) -> Notes:
    """What is known of a saved conversation, from its file's header alone."""
    try:
        read_specs(path)
        words = read_metadata(path).get(_KEY)
    except BrokenError as e:
        raise PplexError(
            f"{path} is not a whole saved conversation: {e.why}; save it again"
        ) from e
    if words is None:
        raise PplexError(f"{path} is no saved conversation; --save-state writes one")
    try:
        known = fit(parse_json(words.encode("utf-8", "surrogateescape")), _NOTES)
        if known["schema"] > SCHEMA:
            raise PplexError(
                f"{path} has schema {known['schema']}, and this pplex knows {SCHEMA}: "
                "update pplex"
            )
        return Notes(**{name: known[name] for name in _NOTES})
    except ValueError as e:
        raise _damaged(path, str(e)) from e


def read_state(path: Path) -> State:
    """A saved conversation from its file."""
    notes, specs = read_notes(path), read_specs(path)
    if odd := [spec.dtype for spec in specs.values() if spec.dtype not in _DTYPES]:
        raise _damaged(path, f"it has values of type {odd[0]}")
    arrays = {name: read_values(path, spec) for name, spec in specs.items()}
    return State(notes, arrays, str(path))


_DTYPES = {"BF16", "F32", "I32", "I64", "U32"}
_NOTES: dict[str, Any] = {
    **dict.fromkeys(("schema", "prompt_frames", "seed"), int),
    **dict.fromkeys(("top_k", "text_top_k"), int),
    **dict.fromkeys(("duration_s", "temp", "text_temp"), float),
    **dict.fromkeys(("model", "name", "engine", "compute", "dtype", "kernels"), str),
    **dict.fromkeys(("voice", "prompt"), str),
}


def _damaged(name: object, why: str) -> PplexError:
    return PplexError(f"{name} is a damaged saved conversation: {why}; save it again")
