"""What an engine is: one loaded model on one device, NumPy in, NumPy out.

An engine is made from a checkpoint's tensors and owns its weights' form, its memory of
past positions and its codec. The loop around it (``conversation``) is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import DTypeLike

from pplex.model.config import LmConfig, MimiConfig, ModelConfig
from pplex.model.mimi import Mimi
from pplex.model.prompt import Prompt
from pplex.model.sampling import SamplingConfig
from pplex.model.streams import NOT_FORCED

KV_AT_8 = "keys and values at 8 bits"  # as forms are named
FORCED_FRAMES = 32  # positions whose logits are computed at a time

# What a conversation goes on from, by name: bfloat16 as its bits in uint16.
Arrays = Mapping[str, np.ndarray]


# What waits for the results of a call that has begun, one for each recording.
Begun = Callable[[], list[np.ndarray]]


class Codec(Protocol):
    """PCM to codes and back, in chunks of whole frames.

    A chunk has any number of frames, and the bits do not depend on how a stream was
    cut. ``concurrent``: calls may run in a thread beside the steps. ``chunk_frames``
    are best taken at a time where nobody waits for them; ``group`` recordings are best
    coded together, 1 for one by one, and ``launcher`` begins that in its one thread
    beside the steps; None where it waits its turn. ``form`` is added to
    ``Engine.compute`` where it computes otherwise than it usually does in that;
    ``version`` tells by what a library chose to compute, empty where none chooses.
    """

    @property
    def concurrent(self) -> bool: ...

    @property
    def chunk_frames(self) -> int: ...

    @property
    def group(self) -> int: ...

    @property
    def launcher(self) -> Executor | None: ...

    @property
    def form(self) -> str: ...

    @property
    def version(self) -> str: ...

    def make_state(self, saved: Arrays | None = None) -> Any:
        """A state for one direction of one stream: a fresh one, or as it was ``saved``.

        ValueError for arrays of another model's codec.
        """

    def save(self, state: Any) -> dict[str, np.ndarray]:
        """A copy of a state, for ``make_state``."""

    def encode(self, frames: np.ndarray, state: Any) -> np.ndarray:
        """PCM (frames, frame_size) to codes int32 (codebooks, frames)."""

    def decode(self, codes: np.ndarray, state: Any) -> np.ndarray:
        """Codes (codebooks, frames) to PCM (frames * frame_size,)."""

    def encode_next(self, parts: Sequence[np.ndarray], state: Any) -> Begun:
        """Begin to ``encode`` the next frames of each recording of a group, or none.

        All but its last are ``chunk_frames``, as those were when ``state`` was made.
        """

    def decode_next(self, parts: Sequence[np.ndarray], state: Any) -> Begun:
        """Begin to ``decode`` the next codes of each recording of a group, as these."""


@dataclass(frozen=True)
class Start:
    """Where rows begin: after a prompt that was read, or where one was saved.

    ``memory`` is the engine's own. A saved conversation made so many ``steps``, and its
    ``prompt`` is the last column; ``encoder`` and ``decoder`` are the codec's states,
    ``rest`` the user's samples (samples,) after the last whole frame.
    """

    prompt: Prompt
    memory: Any
    steps: int = 0
    encoder: Arrays | None = None
    decoder: Arrays | None = None
    rest: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


@dataclass(frozen=True)
class Logits:
    """Text (frames, text_card) and agent (frames, codebooks, card), float32."""

    text: np.ndarray
    agent: np.ndarray


class Pending(Protocol):
    """A step that has begun."""

    def tokens(self) -> np.ndarray:
        """The agent's column int32 (capacity, agent streams), once it is there.

        What it holds for places that nobody has means nothing.
        """


class Rows(Protocol):
    """Conversations that step together, each in a place of its own."""

    def join(self, start: Start, seed: int, frames: int | None = None) -> int:
        """Begin a conversation after a prompt, of ``frames`` if known; its place."""

    def step(self, user: np.ndarray, text: np.ndarray | None = None) -> Pending:
        """Give every row its next user tokens int32 (capacity, codebooks), by place.

        They are those of the column that is made; of Moshi, and live, of the one that
        is read: what the agent says of a frame does not wait for the user's then.
        ``text`` int32 (capacity,) is the agent's text of the column that is made where
        it is given, in any case or ``instead`` of words, else ``NOT_FORCED``. The next
        step may be asked for before this one's tokens are.
        """

    def save(self, row: int, ahead: int = 0) -> dict[str, np.ndarray]:
        """What a conversation goes on from after the steps that were asked for.

        But without the last ``ahead``, 0 or 1; then its column is the caller's affair.
        It is for ``Engine.restore``.
        """

    def leave(self, row: int) -> None:
        """End the conversation in a place; another may join there."""


@dataclass(frozen=True)
class Cost:
    """What a model takes on an engine, in bytes.

    ``step``: weights that a step reads, once for all its rows; ``position``: keys and
    values of one position of one row; ``codec``: weights of the codec, read once a
    chunk, ``codec_state`` what it keeps of one direction of a stream, and
    ``codec_work`` what computing a chunk takes; ``held``: all weights in memory; what
    is ``alone`` computes one conversation at a time.
    """

    step: int
    position: int
    codec: int
    codec_state: int
    codec_work: int
    held: int
    alone: bool = False


class Engine(Protocol):
    """Runs one loaded model on one device.

    ``dtype`` is what it computes in, ``compute`` whether any of its weights stay
    ``quantized``, or all are ``dense``, on a GPU whether one conversation is computed
    ``alone``, and whether keys and values are kept at 8 bits: by engines of one name
    and version on one kind of device, equal forms give equal bits. With ``is_async`` a
    step goes on while the host does something else.
    """

    name: str
    config: ModelConfig
    dtype: str
    compute: str
    is_async: bool
    codec: Codec

    def prefill(self, prompt: Prompt) -> Start:
        """Read a prompt, so that conversations can start after it."""

    def restore(self, saved: Arrays) -> Start:
        """Where a row was saved, so that conversations can go on from there.

        ValueError for arrays of another model, or of an engine of another name or form.
        """

    def rows(
        self, capacity: int, sampling: SamplingConfig, *, live: bool = False
    ) -> Rows:
        """Places for ``capacity`` conversations whose tokens are drawn so.

        With ``live`` memory is taken at the start: no frame waits for it later; and a
        step is made before the user's tokens of its column are there: see ``Rows``.
        """

    def forced(self, start: Start, columns: np.ndarray) -> Iterator[Logits]:
        """The logits of each of ``columns`` (streams, frames), given all before it.

        They are the columns after a prompt; in stretches of ``FORCED_FRAMES``.
        """

    def embed(self, columns: np.ndarray) -> np.ndarray:
        """The model's inputs float32 (frames, dim) for columns (streams, frames)."""

    def cost(self) -> Cost:
        """What the model takes."""


@dataclass(frozen=True)
class Done:
    """A step whose tokens are there already."""

    column: np.ndarray

    def tokens(self) -> np.ndarray:
        """The agent's column int32 (capacity, agent streams)."""
        return self.column


def save_place(column: np.ndarray, given: np.ndarray, steps: int) -> dict[str, Any]:
    """What every engine saves of a row: its last column (streams,), the tokens that
    are given of the agent's next (agent streams,), and how many steps it made.
    """
    return {
        "column": np.array(column, np.int32),
        "given": np.array(given, np.int32),
        "steps": np.array([steps], np.int64),
    }


def restored(config: LmConfig, saved: Arrays, memory: Any) -> Start:
    """Where a row was saved whose keys and values are in ``memory``."""
    column = checked(saved, "column", (config.num_streams,), np.int32)
    given = checked(saved, "given", (config.num_agent_streams,), np.int32)
    cards = np.array([config.text_card] + [config.card] * config.n_q)
    check_tokens(column, cards)
    check_tokens(given, cards[: len(given)])
    pending = np.full(config.num_streams, NOT_FORCED, np.int32)
    pending[: len(given)] = given
    return Start(Prompt(None, column[:, None], pending), memory, number(saved, "steps"))


def checked(
    saved: Arrays, name: str, shape: tuple[int, ...], dtype: DTypeLike
) -> np.ndarray:
    """An array of what was saved; ValueError if it has another shape or type."""
    array = saved.get(name)
    if array is None or array.shape != shape or array.dtype != dtype:
        found = "missing" if array is None else f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"`{name}` is {found}, not {np.dtype(dtype)} {list(shape)}")
    return array


def check_tokens(tokens: np.ndarray, cards: np.ndarray | int) -> None:
    """Raise ValueError unless tables of so many ids have them, or none is needed."""
    if ((tokens > cards) | (tokens < NOT_FORCED)).any():
        raise ValueError("a token is none of this model")


def number(saved: Arrays, name: str) -> int:
    """A count of what was saved."""
    count = int(checked(saved, name, (1,), np.int64)[0])
    if not 0 <= count < 1 << 31:
        raise ValueError(f"`{name}` is {count}")
    return count


def form_name(dense: bool, alone: bool, kv_bits: int | None = None) -> str:
    """A form that a model computes in; see ``Engine.compute``."""
    words = ["dense" if dense else "quantized", *["alone"] * alone]
    return ", ".join(words if kv_bits is None else [*words, KV_AT_8])


def codec_bytes(config: MimiConfig) -> tuple[int, int]:
    """Bytes of a codec's weights, and of what one direction of a stream keeps.

    In float32, as every engine has them.
    """
    weights = dict(tree_flatten(Mimi(config).parameters()))
    return 4 * sum(array.size for array in weights.values()), codec_state_bytes(config)


def codec_state_bytes(config: MimiConfig) -> int:
    """Bytes of what one direction of a stream keeps, in float32."""
    t = config.transformer
    return 4 * 2 * t.num_layers * t.d_model * t.window
