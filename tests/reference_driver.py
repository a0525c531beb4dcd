"""How the tests against recorded values drive what pplex has inside.

Those tests stay as they are while the inside changes; what changes with it is here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
from small import converse_live

from pplex.audio.files import read_pcm, to_pcm16
from pplex.checkpoint.weights import codec_tensors, lm_tensors, make_lm
from pplex.conversation.answer import Answer
from pplex.conversation.prompts import make_role
from pplex.conversation.scheduler import converse
from pplex.conversation.session import Model
from pplex.engine.base import Codec, Engine
from pplex.engine.c.codec import CCodec
from pplex.engine.choose import KINDS
from pplex.model.lm import Lm
from pplex.model.mimi import Mimi, make_mimi
from pplex.model.prompt import Prompt, make_prompt
from pplex.model.sampling import GREEDY

__all__ = ["Prompt", "make_prompt", "read_pcm", "to_pcm16"]

ENGINES = [name for name, kind in KINDS.items() if kind.is_available()]
CODECS = STEPS = ENGINES


@functools.cache
def _engine_at(name: str, path: str) -> Engine:
    from pplex.checkpoint.hub import resolve

    folder = resolve(path, offline=True).folder
    config = folder.read_config()
    lm = lm_tensors(folder, config.lm)
    return KINDS[name].make(config, lm, codec_tensors(folder, config.mimi))


def engine_of(name: str, model: Model) -> Engine:
    """The engine ``name`` with the weights of ``model``."""
    return _engine_at(name, str(model.local.path))


@functools.cache
def _lm_at(path: str) -> Lm:
    from pplex.checkpoint.hub import resolve

    folder = resolve(path, offline=True).folder
    config = folder.read_config().lm
    return make_lm(config, lm_tensors(folder, config), mx.float32)


def spec_lm(model: Model) -> Lm:
    """The specification with the weights of ``model``, in float32."""
    return _lm_at(str(model.local.path))


def spec_mimi(model: Model) -> Mimi:
    """The codec's specification, with the weights of ``model``."""
    config = model.config.mimi
    return make_mimi(config, codec_tensors(model.local.folder, config))


def make_codec(kind: str, model: Model) -> Codec:
    """The codec of an engine (of ``CODECS``)."""
    return engine_of(kind, model).codec


def latents(codec: Codec, model: Model, chunks: list[np.ndarray]) -> np.ndarray:
    """Latents (width, frames) of PCM in chunks (frames, frame_size)."""
    if isinstance(codec, CCodec):
        state = codec.make_state()
        found = [codec.encode_latents(pcm, state) for pcm in chunks]
    else:
        mimi = spec_mimi(model)
        mimi_state = mimi.make_state()
        arrays = [mx.array(pcm.reshape(1, -1)) for pcm in chunks]
        found = [np.array(mimi.encode_latent(pcm, mimi_state)[0]) for pcm in arrays]
    return np.concatenate(found).T


def codebook_rows(model: Model, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The name of each part of the quantizer, and ``rows`` of its codebooks."""
    quantizer = spec_mimi(model).quantizer
    for name in ("semantic", "acoustic"):
        part = getattr(quantizer, name)
        yield name, np.array(part.codebooks[:, mx.array(rows)])


def embeddings(model: Model, tokens: np.ndarray) -> np.ndarray:
    """The specification's inputs (t, dim) for tokens (1, streams, t)."""
    return np.array(spec_lm(model).embed(mx.array(tokens))[0])


def temporal_outputs(
    model: Model, tokens: np.ndarray, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    """The specification's normalised outputs (t, dim) and text logits (t, text_card).

    Of tokens (1, streams, t), ``chunk`` positions at a time.
    """
    lm = spec_lm(model)
    embedded = lm.embed(mx.array(tokens))
    cache = lm.make_cache()
    hidden, logits = [], []
    for start in range(0, tokens.shape[2], chunk):
        x = lm.temporal(embedded[:, start : start + chunk], cache)
        h, text_logits = lm.head(x)
        hidden.append(np.array(h[0]))
        logits.append(np.array(text_logits[0]))
    return np.concatenate(hidden), np.concatenate(logits)


def depformer_logits(
    model: Model, hidden: np.ndarray, forced: np.ndarray
) -> np.ndarray:
    """The specification's logits (t, codebooks, card) after ``hidden`` (t, dim).

    ``forced`` (t, streams) are a frame's tokens, the text first.
    """
    given = mx.array(forced)
    logits: list[mx.array] = []

    def next_forced(step_logits: mx.array, idx: int) -> mx.array:
        logits.append(step_logits)
        return given[:, idx + 1]

    spec_lm(model).depformer(mx.array(hidden), given[:, 0], next_forced)
    return np.stack([np.array(step) for step in logits], axis=1)


def prompt_of(model: Model, voice: str, text: str) -> Prompt:
    """The prompt of a voice (a name or a file) and a role."""
    return make_role(model, voice, text).prompt


def greedy_run(
    model: Model,
    prompt: Prompt,
    chunks: Iterator[np.ndarray],
    *,
    decode: int,
    ahead: bool = True,
    way: str | None = None,
) -> list[Answer]:
    """A whole greedy conversation after ``prompt`` with PCM (frames, frame_size).

    ``way`` is the engine's name; None for the model's own. Not ``ahead`` is live.
    """
    engine = model.engine if way is None else engine_of(way, model)
    start = engine.prefill(prompt)
    if not ahead:
        return converse_live(engine, start, itertools.chain.from_iterable(chunks))
    return list(converse(engine, start, 0, chunks, GREEDY, decode_frames=decode))
