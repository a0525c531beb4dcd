"""The codec by MLX's operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
import numpy as np

from pplex.engine.base import Arrays, Begun, codec_state_bytes
from pplex.engine.device import is_out_of_memory
from pplex.engine.mlx.exchange import Coming, Exchange
from pplex.engine.mlx.saved import restore_codec, save_codec
from pplex.model.config import MimiConfig
from pplex.model.mimi import CodecState, Mimi

# Rows of a chunk on a GPU, always, and at most so many frames: libraries choose by the
# shape in which order a convolution takes its sums.
GROUP_ROWS = 16
CHUNK_FRAMES = 128
# What a chunk takes while it is computed, in arrays of as many floats as the widest
# layer has: measured with the published codec, 16 rows of 4 and 8 frames, on a CPU.
ARRAYS = 26
CPU_FRAMES = 32


@dataclass
class StreamState:
    """One direction of a stream, in chunks of ``size`` frames.

    ``codec`` is as before the last that is not full yet, and ``begun`` has its frames
    (frames, width).
    """

    codec: CodecState
    size: int
    begun: np.ndarray | None = None


# From a chunk (rows, frames, width) and a state to what is made of its frames.
Run = Callable[[np.ndarray, CodecState], mx.array]

Chunk = TypeVar("Chunk")


class MlxCodec:
    """The codec by MLX's operations.

    On a GPU a chunk of any size takes as long to launch, and a chunk of sixteen
    recordings little longer than one of one: chunks are long, and recordings coded in
    groups; but ``alone`` is one row, in short ones, as a frame of a live stream costs
    one. A chunk has one shape, so that a recording's bits depend neither on how it
    comes nor on what is coded beside it. What is causal does not see the padding.
    Chunks have ``frames`` frames, and those of groups fewer once memory does not
    suffice. On a CPU a chunk is a frame: 32 of them would be a sixth faster, and
    padding is not.
    """

    concurrent = False
    version = ""

    def __init__(
        self,
        mimi: Mimi,
        *,
        on_gpu: bool,
        alone: bool = False,
        frames: int = CHUNK_FRAMES,
        launcher: Executor | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self._mimi, self._exchange = mimi, exchange or Exchange()
        self.launcher = launcher
        self.group = GROUP_ROWS if on_gpu and not alone else 1
        self._alone_frames = frames if on_gpu else 1
        best_alone = CHUNK_FRAMES if on_gpu else CPU_FRAMES
        self.chunk_frames = frames if self.group > 1 else best_alone
        self._usual_frames = self.chunk_frames

    @property
    def form(self) -> str:
        """What its bits depend on beside the engine's form: chunks that are shorter."""
        if self.chunk_frames == self._usual_frames:
            return ""
        return f", codec by {self.chunk_frames} frames"

    def make_state(self, saved: Arrays | None = None) -> StreamState:
        """A state for one direction of one stream: a fresh one, or as it was saved."""
        size = self.chunk_frames if self.group > 1 else self._alone_frames
        state = StreamState(self._mimi.make_state(), size)
        if saved is not None:
            restore_codec(state.codec, saved, self._after_a_chunk, self.group)
            state.begun = saved.get("begun")
            if state.begun is not None and state.begun.ndim != 2:
                raise ValueError("the codec's state is none of this model")
        return state

    def save(self, state: StreamState) -> dict[str, np.ndarray]:
        """A copy of a state."""
        begun = {} if state.begun is None else {"begun": np.array(state.begun)}
        return save_codec(state.codec) | begun

    @functools.cached_property
    def _after_a_chunk(self) -> list[CodecState]:
        """States of each direction."""
        encoder, decoder = self._mimi.make_state(), self._mimi.make_state()
        silence = mx.zeros((1, self._mimi.frame_size))
        self._mimi.decode(self._mimi.encode(silence, encoder), decoder)
        return [encoder, decoder]

    def encode(self, frames: np.ndarray, state: StreamState) -> np.ndarray:
        """PCM (frames, frame_size) to codes int32 (codebooks, frames)."""
        codes = self._coded(frames, state, self._encode_group)
        return np.swapaxes(codes, 0, 1)

    def decode(self, codes: np.ndarray, state: StreamState) -> np.ndarray:
        """Codes (codebooks, frames) to PCM (frames * frame_size,)."""
        return self._coded(codes.T, state, self._decode_group).reshape(-1)

    def _coded(self, frames: np.ndarray, state: StreamState, run: Run) -> np.ndarray:
        """``run`` over the next frames (frames, width) of a stream."""
        known, size = 0, state.size
        if state.begun is not None:
            known, frames = len(state.begun), np.concatenate([state.begun, frames])

        def chunks() -> Iterator[tuple[Coming, slice]]:
            nonlocal known
            for first in range(0, len(frames), size):
                some = frames[first : first + size]
                is_full = len(some) == size
                # One that is not full yet is run again with what comes.
                state.begun = None if is_full else some
                codec = state.codec if is_full else state.codec.copy()
                made = self._begin(run, _chunk([some], self.group, size), codec)
                yield made, slice(known, len(some))
                known = max(0, known - len(some))
            mx.eval(codec.arrays())  # before that no other thread can go on with it

        return np.concatenate([made.read()[0, new] for made, new in _late(chunks())])

    def _begin(self, run: Run, chunk: np.ndarray, state: CodecState) -> Coming:
        made = self._exchange.bring(run(chunk, state))
        # Until a state is computed it holds all that it is made of.
        mx.async_eval(made.array, state.arrays())
        return made

    def encode_next(self, parts: Sequence[np.ndarray], state: StreamState) -> Begun:
        """Codes (codebooks, frames) of the next PCM (frames, frame_size) of a group."""
        made = self._next(parts, state, self._encode_group)
        return lambda: [codes.T for codes in made()]

    def decode_next(self, parts: Sequence[np.ndarray], state: StreamState) -> Begun:
        """PCM (samples,) of the next codes (codebooks, frames) of a group."""
        columns = [codes.T for codes in parts]
        made = self._next(columns, state, self._decode_group)
        return lambda: [pcm.reshape(-1) for pcm in made()]

    def _encode_group(self, chunk: np.ndarray, state: CodecState) -> mx.array:
        """PCM (rows, frames, frame_size) to codes (rows, frames, codebooks)."""
        pcm = self._exchange.send(chunk.reshape(len(chunk), -1))
        return self._mimi.encode(pcm, state).swapaxes(1, 2)

    def _decode_group(self, chunk: np.ndarray, state: CodecState) -> mx.array:
        """Codes (rows, frames, codebooks) to PCM (rows, frames, frame_size)."""
        codes = self._exchange.send(chunk)
        pcm = self._mimi.decode(codes.swapaxes(1, 2), state)
        return pcm.reshape(*chunk.shape[:2], -1)

    def _next(self, parts: Sequence[np.ndarray], state: StreamState, run: Run) -> Begun:
        """``run`` over the next frames (frames, width) of rows, in chunks that fit."""
        made: list[Coming] = []
        first, most = 0, max(map(len, parts))
        while first < most:
            size, before = self.chunk_frames, state.codec
            after = before.copy()
            try:
                some = [frames[first : first + size] for frames in parts]
                made.append(self._begin(run, _chunk(some, self.group, size), after))
            except (RuntimeError, MemoryError) as e:
                if size == 1 or not is_out_of_memory(e):
                    raise
                self.chunk_frames //= 2
            else:
                state.codec, first = after, first + size
            if self.chunk_frames < size:
                # Only here has the exception let go of the arrays.
                after = before
                mx.clear_cache()

        def wait() -> list[np.ndarray]:
            whole = np.concatenate([one.read() for one in made], axis=1)
            return [row[: len(part)] for row, part in zip(whole, parts, strict=False)]

        return wait


def _late(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Each when the next is under way: one is computed while another is copied.

    More at a time would only take more memory, and memory that is new is slow.
    """
    before: list[Chunk] = []
    for one in chunks:
        yield from before
        before = [one]
    yield from before


def work_bytes(
    config: MimiConfig, frames: int, rows: int = GROUP_ROWS, arrays: int = ARRAYS
) -> int:
    """About what coding chunks of so many frames and rows takes, state and all."""
    widest = 4 * config.frame_size * config.seanet.n_filters
    return rows * (arrays * widest * frames + codec_state_bytes(config))


def frames_within(config: MimiConfig, num_bytes: float, arrays: int = ARRAYS) -> int:
    """Frames of a group's chunk whose work takes no more; a power of two."""
    frames = CHUNK_FRAMES
    while frames > 1 and work_bytes(config, frames, arrays=arrays) > num_bytes:
        frames //= 2
    return frames


def _chunk(group: Sequence[np.ndarray], rows: int, size: int) -> np.ndarray:
    """Frames (frames, width) of some rows, none of more than ``size``, zeros behind."""
    chunk = np.zeros((rows, size, group[0].shape[1]), group[0].dtype)
    for row, frames in enumerate(group):
        chunk[row, : len(frames)] = frames
    return chunk
