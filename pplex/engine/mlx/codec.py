"""The codec by MLX's operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pplex.model.mimi import CodecState, Mimi

# Rows and frames of a group's chunk: few shapes.
GROUP_SIZES = 1, 4, 16
GROUP_ROWS = GROUP_SIZES[-1]
CHUNK_SIZES = 32, 128


@dataclass
class StreamState:
    """One direction of a stream; after the last chunk, which was padded, it is over."""

    codec: CodecState
    is_over: bool = False


class MlxCodec:
    """The codec by MLX's operations.

    On a GPU a chunk of any size takes as long to launch, and a chunk of sixteen
    recordings little longer than one of one: chunks are long, and recordings coded in
    groups. There convolutions are planned for each shape, which takes longer than they
    do; so few shapes are used. What is causal does not see the padding.
    """

    concurrent = False

    def __init__(self, mimi: Mimi, *, on_gpu: bool) -> None:
        self._mimi = mimi
        self._on_gpu = on_gpu
        self.chunk_frames = 128 if on_gpu else 32
        self.group = GROUP_ROWS if on_gpu else 1

    def make_state(self) -> StreamState:
        """A fresh state, for one direction of one stream."""
        return StreamState(self._mimi.make_state())

    def encode(self, frames: np.ndarray, state: StreamState) -> np.ndarray:
        """PCM (frames, frame_size) to codes int32 (codebooks, frames)."""
        num_frames = len(frames)
        padded = np.pad(frames, ((0, self._padding(num_frames, state)), (0, 0)))
        pcm = mx.array(padded.reshape(1, -1))
        return np.array(self._mimi.encode(pcm, state.codec)[0, :, :num_frames])

    def decode(self, codes: np.ndarray, state: StreamState) -> np.ndarray:
        """Codes (codebooks, frames) to PCM (frames * frame_size,)."""
        num_frames = codes.shape[1]
        if not self._on_gpu:
            # The order in which sums are taken depends on the length of a chunk.
            frames = [codes[None, :, i : i + 1] for i in range(num_frames)]
            parts = [
                self._mimi.decode(mx.array(frame), state.codec)[0] for frame in frames
            ]
            return np.array(mx.concatenate(parts))
        padded = np.pad(codes, ((0, 0), (0, self._padding(num_frames, state))))
        pcm = np.array(self._mimi.decode(mx.array(padded[None]), state.codec)[0])
        return pcm.reshape(padded.shape[1], -1)[:num_frames].reshape(-1)

    def encode_many(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        """``encode`` of recordings (frames, frame_size), each from its start."""
        codes = self._in_groups(recordings, self._encode_group)
        return [columns.T for columns in codes]

    def decode_many(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        """``decode`` of codes (codebooks, frames), each from its start."""
        columns = [codes.T for codes in recordings]
        return [pcm.reshape(-1) for pcm in self._in_groups(columns, self._decode_group)]

    def _encode_group(self, chunk: np.ndarray, state: CodecState) -> mx.array:
        """PCM (rows, frames, frame_size) to codes (rows, frames, codebooks)."""
        pcm = mx.array(chunk.reshape(len(chunk), -1))
        return self._mimi.encode(pcm, state).swapaxes(1, 2)

    def _decode_group(self, chunk: np.ndarray, state: CodecState) -> mx.array:
        """Codes (rows, frames, codebooks) to PCM (rows, frames, frame_size)."""
        pcm = self._mimi.decode(mx.array(chunk).swapaxes(1, 2), state)
        return pcm.reshape(*chunk.shape[:2], -1)

    def _in_groups(
        self,
        recordings: Sequence[np.ndarray],
        run: Callable[[np.ndarray, CodecState], mx.array],
    ) -> list[np.ndarray]:
        """``run`` over recordings (frames, width), the longest beside each other."""
        order = sorted(range(len(recordings)), key=lambda idx: len(recordings[idx]))
        groups = [
            order[first : first + GROUP_ROWS]
            for first in range(0, len(order), GROUP_ROWS)
        ]
        results: list[np.ndarray | None] = [None] * len(recordings)

        def take(group: list[int], start: int, part: mx.array) -> None:
            array = np.asarray(part)
            for row, idx in enumerate(group):
                result, length = results[idx], len(recordings[idx])
                if result is None:
                    result = np.empty((length, *array.shape[2:]), array.dtype)
                    results[idx] = result
                into = result[start : start + array.shape[1]]
                into[:] = array[row, : len(into)]

        # A chunk is computed while the one before is copied. More of them at a time
        # would only take more memory, and memory that is new is slow.
        before: tuple[list[int], int, mx.array] | None = None
        for group in groups:
            for start, part in self._chunks([recordings[idx] for idx in group], run):
                if before is not None:
                    take(*before)
                before = group, start, part
        if before is not None:
            take(*before)
        return [result for result in results if result is not None]

    def _chunks(
        self,
        group: Sequence[np.ndarray],
        run: Callable[[np.ndarray, CodecState], mx.array],
    ) -> Iterator[tuple[int, mx.array]]:
        """Where each chunk of a group, in ascending length, begins; ``run`` over it."""
        longest, width = group[-1].shape
        num_rows = next(n for n in GROUP_SIZES if n >= len(group))
        size = next((n for n in CHUNK_SIZES if n >= longest), CHUNK_SIZES[-1])
        state = self._mimi.make_state()
        chunk = np.zeros((num_rows, size, width), group[0].dtype)
        for start in range(0, longest, size):
            for row, frames in enumerate(group):
                part = frames[start : start + size]
                chunk[row, : len(part)] = part
                chunk[row, len(part) :] = 0
            computed = run(chunk, state)
            mx.async_eval(computed, state.arrays())
            yield start, computed

    def _padding(self, num_frames: int, state: StreamState) -> int:
        """Frames to add to a chunk, the last of its stream if it is a ragged one."""
        if not self._on_gpu:
            return 0
        if state.is_over:
            raise ValueError("a chunk came after one of no power of two of frames")
        padding = (1 << (num_frames - 1).bit_length()) - num_frames
        state.is_over = padding > 0
        return padding
