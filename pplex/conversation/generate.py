"""The step loop: one column of the user's tokens in, one of the agent's out.

Offline, streaming, batch and benchmark commands are all callers of ``generate``.
Follows ``LMGen.step`` of NVIDIA's PersonaPlex, ``models/lm.py``, without what a
conversation never uses: the depformer steps of the user's codebooks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pplex.conversation.prompt import LmState
from pplex.layers.cache import RowCaches
from pplex.layers.device import on_cpu
from pplex.model.config import LmConfig
from pplex.model.depformer import NOT_FORCED
from pplex.model.frame_kernel import FrameCache, frame_kernel
from pplex.model.frame_rows import choose_column, serves
from pplex.model.lm import Lm
from pplex.model.native import NativeCache, native_lm
from pplex.model.sampling import Sampler, SamplingConfig, noise_key, noise_keys


@dataclass(frozen=True)
class Step:
    """The agent's column (rows, agent streams) of one frame; seconds it took."""

    column: np.ndarray
    seconds: float


def generate(
    lm: Lm,
    state: LmState,
    user_columns: Iterable[mx.array],
    sampler: Sampler,
    *,
    ahead: bool = True,
) -> Iterator[Step]:
    """Yield a step for each of ``user_columns`` (rows, codebooks), in order.

    ``state`` is advanced in place; whoever makes ``user_columns`` may exchange rows of
    it before giving the next column. With ``ahead``, the next frame is already under
    way when a step is yielded; without, a frame is yielded before the next column is
    asked for. Compiled steps are not asynchronous: what they make is yielded at once.
    """
    frame: Frame | None = None
    waiting: mx.array | None = None
    for user_column in user_columns:
        start = time.perf_counter()
        if caches := _native_caches(state):
            column = native_step(lm, state, caches, user_column, sampler)
            yield Step(column, time.perf_counter() - start)
            continue
        if isinstance(state.cache, FrameCache):
            column = kernel_step(lm, state, state.cache, user_column, sampler)
        else:
            frame = frame or make_frame(lm, sampler)
            column = step(lm, state, user_column, sampler, frame)
        mx.async_eval(column, state.column)
        ready, waiting = (waiting, column) if ahead else (column, None)
        if ready is not None:
            yield _step(ready, start)
    if waiting is not None:
        yield _step(waiting, time.perf_counter())


def _step(column: mx.array, start: float) -> Step:
    tokens = np.array(column)
    return Step(tokens, time.perf_counter() - start)


def _for_the_host(lm: Lm, column: mx.array) -> mx.array:
    """The agent's part of a column, an array of its own.

    On CUDA what the host has read stays slow for a GPU to write to, and MLX gives it
    to whoever asks for that size next: so it is not to be a column's.
    """
    return mx.contiguous(column[:, : lm.config.num_agent_streams])


def make_sampler(config: LmConfig, sampling: SamplingConfig) -> Sampler:
    """The sampler for a model's heads."""
    return Sampler(sampling, config.text_card, config.card, config.num_codebooks)


# From the temporal transformer's output (rows, dim), the user's tokens, the noise's
# keys and what is given (only where there is any) to the next column (rows, streams).
Frame = Callable[[mx.array, dict[str, mx.array]], mx.array]


def make_frame(lm: Lm, sampler: Sampler) -> Frame:
    """All of a frame after the temporal transformer; compiled on a GPU."""

    def by_kernels(x: mx.array, inputs: dict[str, mx.array]) -> mx.array:
        keys, given = inputs.get("keys"), inputs.get("given")
        return choose_column(lm, x, inputs["user"], keys, given, sampler)

    def frame(x: mx.array, inputs: dict[str, mx.array]) -> mx.array:
        noise = sampler.noise(inputs["keys"]) if "keys" in inputs else None
        given = inputs.get("given")
        hidden, logits = lm.head(x)
        text = sampler.text(logits, noise)
        if given is not None:
            text = mx.where(given[:, 0] == NOT_FORCED, text, given[:, 0])
        codes = lm.depformer(
            hidden,
            text,
            lambda logits, idx: sampler.audio(logits, noise, idx),
            None if given is None else given[:, 1:],
        )
        parts = [text[:, None].astype(mx.int32), codes.astype(mx.int32)]
        return mx.concatenate([*parts, inputs["user"]], axis=1)

    if serves(lm):
        return mx.compile(by_kernels)
    return frame if on_cpu() else mx.compile(frame)


def step(
    lm: Lm, state: LmState, user_column: mx.array, sampler: Sampler, frame: Frame
) -> mx.array:
    """Advance ``state`` by one frame; the agent's column (rows, agent streams)."""
    x = lm.temporal(lm.embed(state.column[..., None]), state.cache)
    inputs = {"user": user_column}
    if sampler.draws:
        inputs["keys"] = noise_keys(state.seeds, state.frames)
    if state.pending is not None:
        inputs["given"] = state.pending
    state.advance(frame(x[:, 0], inputs))
    return _for_the_host(lm, state.column)


def kernel_step(
    lm: Lm,
    state: LmState,
    cache: FrameCache,
    user_column: mx.array,
    sampler: Sampler,
) -> mx.array:
    """``step`` of one row by one CUDA kernel."""
    kernel = frame_kernel(lm)
    assert kernel is not None
    given = None if state.pending is None else state.pending[0]
    key = noise_key(state.seeds[0], state.frames[0])
    tokens, user = state.column[0], user_column[0]
    state.advance(kernel(tokens, user, cache, sampler, key, given)[None])
    return _for_the_host(lm, state.column)


def _native_caches(state: LmState) -> list[NativeCache]:
    """The rows' caches if compiled code makes the steps."""
    caches = state.cache.rows if isinstance(state.cache, RowCaches) else [state.cache]
    return [cache for cache in caches if isinstance(cache, NativeCache)]


def native_step(
    lm: Lm,
    state: LmState,
    caches: list[NativeCache],
    user_column: mx.array,
    sampler: Sampler,
) -> np.ndarray:
    """``step`` by compiled code; the agent's column is there when it returns."""
    native = native_lm(lm)
    assert native is not None
    keys = list(map(noise_key, state.seeds, state.frames))
    column = native.step(caches, state.column, state.pending, sampler, keys)
    state.advance(np.concatenate([column, np.asarray(user_column)], axis=1))
    return column
