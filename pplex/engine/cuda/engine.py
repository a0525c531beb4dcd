"""The engine of NVIDIA GPUs.

One conversation's frame is one kernel. Of a batch, MLX multiplies and kernels of ours
do what lies between its products: launching MLX's own takes the host longer than their
work takes the GPU.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from pplex.checkpoint.weights import LmTensors
from pplex.engine.base import Codec, Cost, Rows
from pplex.engine.cuda import depformer, frame
from pplex.engine.cuda.cache import SharedCache
from pplex.engine.cuda.codec import fuse
from pplex.engine.cuda.exchange import pinned_exchange
from pplex.engine.cuda.rows import (
    MOST_DIM,
    add_norm_rows,
    choose_text,
    embed_column,
    swiglu_rows,
)
from pplex.engine.cuda.weights import DENSE, WrittenOut, form_of
from pplex.engine.device import memory_gb
from pplex.engine.mlx import engine as mlx
from pplex.engine.mlx.codec import GROUP_ROWS, MlxCodec, frames_within, work_bytes
from pplex.engine.mlx.engine import Frame, RowsCache
from pplex.engine.mlx.exchange import Exchange
from pplex.model.cache import KvCache
from pplex.model.config import MimiConfig, ModelConfig
from pplex.model.mimi import Mimi
from pplex.model.sampling import Sampler, SamplingConfig
from pplex.model.transformer import Gating, RmsNorm, TemporalLayer

# Of a chunk of the fused codec, and what it may take of a GPU's memory: the same on all
# of a kind, so that a recording's bits are.
_CODEC_ARRAYS = 11
_CODEC_SHARE = 1 / 6
# Of 128 the first and the last take twice as long, beside which there are no steps.
_GROUP_FRAMES = 64


def _codec_frames(config: MimiConfig) -> int:
    """Frames of a chunk of a group."""
    total_gb, _ = memory_gb()
    if total_gb is None:
        return _GROUP_FRAMES
    room = _CODEC_SHARE * 1e9 * total_gb
    return min(_GROUP_FRAMES, frames_within(config, room, _CODEC_ARRAYS))


def cost_of(config: ModelConfig, lm: LmTensors, *, alone: bool = False) -> Cost:
    """What a model takes; of ``lm`` only shapes are read."""
    cost = mlx.cost_of(config, lm, on_gpu=True, alone=alone)
    return _with_work(config.mimi, cost, alone)


def _with_work(config: MimiConfig, cost: Cost, alone: bool) -> Cost:
    chunk = _codec_frames(config), GROUP_ROWS
    if alone:
        chunk = CudaEngine.alone_frames, 1
    return replace(cost, codec_work=work_bytes(config, *chunk, _CODEC_ARRAYS))


class CudaEngine(mlx.MlxEngine):
    """MLX's engine with kernels of ours where they can run the model."""

    name = "cuda"
    # H100: the 7B's products take as long with 64 rows, a tenth less with 8.
    gpu_rows = 256
    # H200: launching a chunk of up to 16 frames takes 8 ms to encode and 7 to decode.
    # A frame of a recording takes 4.8 ms with 128, 5.6 with 16, 6.4 with 8.
    alone_frames = 32
    short_norms = False

    def __init__(
        self,
        config: ModelConfig,
        lm: LmTensors,
        codec: Mapping[str, mx.array],
        *,
        alone: bool = False,
    ) -> None:
        """Take over ``lm``, which is emptied, and the codec's weights."""
        # Plans of convolutions that are kept: more than the shapes used here.
        os.environ.setdefault("MLX_CUDA_CONV_CACHE_SIZE", "2048")
        if not alone:  # the kernel for rows has no other form for it
            lm = lm.write_out([n for n in lm.forms if n.startswith("depformer.")])
        super().__init__(config, lm, codec, on_gpu=True, alone=alone)
        for module in self.lm.modules():
            if type(module) is nn.QuantizedLinear:
                module.__class__ = WrittenOut
        self._by_kernels = config.lm.dim % 16 == 0 and config.lm.dim <= MOST_DIM

    def _block_maker(
        self, sampling: SamplingConfig, live: bool
    ) -> Callable[[int], Rows]:
        kernel = self._frame_kernel if self.alone else None
        if kernel is None:
            return super()._block_maker(sampling, live)
        return lambda size: frame.FrameRows(kernel, sampling, live, self.exchange)

    @functools.cached_property
    def _frame_kernel(self) -> frame.FrameKernel | None:
        if not frame.supports(self.lm):
            return None
        return frame.FrameKernel(self.lm, self.config.kv_bits)

    @functools.cached_property
    def _depformer_kernel(self) -> depformer.DepformerKernel | None:
        served = depformer.supports(self.lm)
        return depformer.DepformerKernel(self.lm) if served else None

    def cost(self) -> Cost:
        """What the model takes."""
        return _with_work(self.config.mimi, super().cost(), self.alone)

    def make_exchange(self) -> Exchange:
        """What brings arrays to MLX and back, step by step."""
        return pinned_exchange()

    def inputs(self, tokens: mx.array) -> mx.array:
        """Summed rows (batch, t, dim) of tokens (batch, streams, t)."""
        tables = self.lm.text_emb, self.lm.audio_emb
        if any(form_of(table) != DENSE for table in tables):
            return super().inputs(tokens)
        b, streams, t = tokens.shape
        columns = tokens.swapaxes(1, 2).reshape(b * t, streams)
        x = embed_column(columns, *(table.weight for table in tables))
        return x.reshape(b, t, self.config.lm.dim)

    def lead(
        self, before: TemporalLayer, after: TemporalLayer, x: mx.array, y: mx.array
    ) -> tuple[mx.array, mx.array]:
        """A ``Joint`` of two layers."""
        x, h = self._add_norm(before.norm2, x, before.self_attn.join(y))
        x, h = self._add_norm(after.norm1, x, self._gated(before.gating, h))
        return x, after.self_attn.split(h)

    def finish(self, x: mx.array, y: mx.array) -> mx.array:
        """The last layer's output."""
        layer = self.lm.layers[-1]
        x, h = self._add_norm(layer.norm2, x, layer.self_attn.join(y))
        return x + self._gated(layer.gating, h)

    def _add_norm(
        self, norm: RmsNorm, x: mx.array, y: mx.array
    ) -> tuple[mx.array, mx.array]:
        """``x + y`` and its normalisation."""
        if self._by_kernels:
            return add_norm_rows(x, y, norm.weight.astype(mx.float32))
        x = x + y
        return x, norm(x)

    def _gated(self, gating: Gating, x: mx.array) -> mx.array:
        x = gating.linear_in(x)
        if x.shape[-1] % 16 == 0:
            return gating.linear_out(swiglu_rows(x))
        gate, value = mx.split(x, 2, axis=-1)
        return gating.linear_out(nn.silu(gate) * value)

    def make_ring(self, like: KvCache, num_rows: int) -> RowsCache:
        """The keys and values of ``num_rows`` rows that step together."""
        if SharedCache.serves(like):
            return SharedCache(like, num_rows, self.exchange)
        return super().make_ring(like, num_rows)

    def make_frame(self, sampler: Sampler) -> Frame:
        """All of a frame after the temporal transformer.

        What is chosen stays on the GPU, in the next column of tokens.
        """
        kernel = self._depformer_kernel
        if kernel is None:
            return super().make_frame(sampler)
        lm = self.lm

        def by_kernels(x: mx.array, inputs: dict[str, mx.array]) -> mx.array:
            keys, given = inputs.get("keys"), inputs.get("given")
            hidden, logits = lm.head(x)
            column = choose_text(
                logits,
                inputs["user"],
                keys,
                given,
                width=sampler.noise_width,
                temp=sampler.config.text_temp,
                top_k=sampler.text_top_k,
            )
            return kernel(lm.depformer.input(hidden), column, keys, given, sampler)

        return mx.compile(by_kernels)

    def _make_codec(self, mimi: Mimi) -> Codec:
        fuse(mimi)
        codec = MlxCodec(
            mimi,
            on_gpu=True,
            alone=self.alone,
            frames=self.alone_frames if self.alone else _codec_frames(self.config.mimi),
            launcher=_launcher(),
            exchange=self.exchange,
        )
        if codec.group > 1:
            self._print_of(codec)
            codec.version = _launcher().submit(self._print_of, codec).result()
        return codec

    def _print_of(self, codec: Codec) -> str:
        """A digest of what becomes of noise.

        For that kernels are compiled, and convolutions planned in this thread.
        """
        shape = codec.chunk_frames, self.config.frame_size
        noise = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
        (codes,) = codec.encode_next([noise], codec.make_state())()
        (pcm,) = codec.decode_next([codes], codec.make_state())()
        return hashlib.sha256(codes.tobytes() + pcm.tobytes()).hexdigest()[:8]


@functools.cache
def _launcher() -> Executor:
    """The thread of this process that launches what the codec does beside steps.

    MLX plans convolutions in each thread anew: here once, and before rows take the
    memory.
    """
    launcher = ThreadPoolExecutor(1, thread_name_prefix="codec")
    atexit.register(_await_end, launcher.submit(threading.get_native_id).result())
    return launcher


def _await_end(thread: int) -> None:
    """Let a thread that was joined come to its end, while there is an interpreter.

    What MLX has compiled in it is given back then, by way of Python; without, the
    process would be aborted.
    """
    for _ in range(5000):
        if not os.path.exists(f"/proc/self/task/{thread}"):
            return
        time.sleep(0.001)
