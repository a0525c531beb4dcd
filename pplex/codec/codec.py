"""The codec as a conversation sees it: NumPy frames in, NumPy codes out, and back."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from pplex.codec import native
from pplex.codec.mimi import CodecState, Mimi
from pplex.config import MimiConfig
from pplex.layers.device import on_cpu


class Codec(Protocol):
    """PCM to codes and back, in chunks of whole frames of any number.

    ``concurrent``: whether calls may run in a thread while MLX computes in another.
    """

    concurrent: ClassVar[bool]

    @property
    def nbytes(self) -> int:
        """Bytes of its weights in memory."""

    def make_state(self) -> Any:
        """A fresh state, for one direction of one stream."""

    def encode(self, frames: np.ndarray, state: Any) -> np.ndarray:
        """PCM (frames, frame_size) to codes int32 (codebooks, frames)."""

    def decode(self, codes: np.ndarray, state: Any) -> np.ndarray:
        """Codes (codebooks, frames) to PCM (frames * frame_size,).

        On a CPU it is the same bits however many frames come at a time.
        """


def make_codec(mimi: Mimi, config: MimiConfig) -> Codec:
    """The fastest codec there is with the weights of ``mimi``."""
    if on_cpu() and native.library() is not None:
        return native.NativeCodec(mimi, config)
    return MlxCodec(mimi)


class MlxCodec:
    """The codec by MLX's operations."""

    concurrent: ClassVar[bool] = False

    def __init__(self, mimi: Mimi) -> None:
        self._mimi = mimi
        # Plans of CUDA convolutions that are kept: more than the shapes used here.
        os.environ.setdefault("MLX_CUDA_CONV_CACHE_SIZE", "2048")

    @property
    def nbytes(self) -> int:
        """Bytes of its weights in memory."""
        return sum(array.nbytes for _, array in tree_flatten(self._mimi.parameters()))

    def make_state(self) -> CodecState:
        """A fresh state, for one direction of one stream."""
        return self._mimi.make_state()

    def encode(self, frames: np.ndarray, state: CodecState) -> np.ndarray:
        """PCM (frames, frame_size) to codes int32 (codebooks, frames)."""
        num_frames = len(frames)
        padded = np.pad(frames, ((0, _padding(num_frames)), (0, 0)))
        pcm = mx.array(padded.reshape(1, -1))
        return np.array(self._mimi.encode(pcm, state)[0, :, :num_frames])

    def decode(self, codes: np.ndarray, state: CodecState) -> np.ndarray:
        """Codes (codebooks, frames) to PCM (frames * frame_size,)."""
        num_frames = codes.shape[1]
        if on_cpu():
            # The order in which sums are taken depends on the length of a chunk.
            frames = [codes[None, :, i : i + 1] for i in range(num_frames)]
            parts = [self._mimi.decode(mx.array(frame), state)[0] for frame in frames]
            return np.array(mx.concatenate(parts))
        padded = np.pad(codes, ((0, 0), (0, _padding(num_frames))))
        pcm = np.array(self._mimi.decode(mx.array(padded[None]), state)[0])
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
        results: list[np.ndarray] = [np.empty(0)] * len(recordings)

        def finish(group: list[int], parts: list[mx.array]) -> None:
            arrays = [np.asarray(part) for part in parts]
            for row, idx in enumerate(group):
                whole = np.concatenate([array[row] for array in arrays])
                results[idx] = whole[: len(recordings[idx])]

        # One group is computed while another is copied: more at a time would only take
        # more memory, and new memory is slow.
        under_way: deque[tuple[list[int], list[mx.array]]] = deque()
        for group in groups:
            begun = self._begin([recordings[idx] for idx in group], run)
            under_way.append((group, begun))
            if len(under_way) > 1:
                finish(*under_way.popleft())
        for group, begun in under_way:
            finish(group, begun)
        return results

    def _begin(
        self,
        group: Sequence[np.ndarray],
        run: Callable[[np.ndarray, CodecState], mx.array],
    ) -> list[mx.array]:
        """Chunks of ``run`` over a group, in ascending length, being computed."""
        longest, width = group[-1].shape
        num_rows = next(n for n in GROUP_SIZES if n >= len(group))
        size = next((n for n in CHUNK_SIZES if n >= longest), CHUNK_SIZES[-1])
        state, parts = self.make_state(), []
        for start in range(0, longest, size):
            chunk = np.zeros((num_rows, size, width), group[0].dtype)
            for row, frames in enumerate(group):
                part = frames[start : start + size]
                chunk[row, : len(part)] = part
            parts.append(run(chunk, state))
            mx.async_eval(parts[-1])
        return parts


# Rows and frames of a group's chunk: few shapes, as a GPU plans convolutions for each.
# What is causal does not see the padding.
GROUP_SIZES = 1, 4, 16
GROUP_ROWS = GROUP_SIZES[-1]
CHUNK_SIZES = 32, 128


def _padding(num_frames: int) -> int:
    """Frames to add to a chunk, the last of its stream if it is a ragged one.

    A GPU's convolutions are planned for each shape, which takes longer than they do;
    so there only powers of two are used. What is causal does not see the padding.
    """
    return 0 if on_cpu() else (1 << (num_frames - 1).bit_length()) - num_frames
