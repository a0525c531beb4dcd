"""How the tests against recorded values drive what pplex has inside.

Those tests stay as they are while the inside changes; what changes with it is here.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from pplex.audio.files import read_pcm, to_pcm16
from pplex.checkpoint.weights import load_mimi
from pplex.codec.codec import Codec, MlxCodec
from pplex.codec.mimi import Mimi
from pplex.codec.native import NativeCodec, library
from pplex.conversation.prompt import Prompt, make_prompt, prefill
from pplex.conversation.session import Conversation, Model, Reply, make_role
from pplex.model.native import load_library
from pplex.model.sampling import GREEDY

__all__ = ["Prompt", "make_prompt", "read_pcm", "to_pcm16"]

CODECS = ["native", "mlx"]
STEPS = ["native", "mlx"]


def use_steps(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the language model's steps be made so (of ``STEPS``), or skip the test."""
    if way == "mlx":
        monkeypatch.setattr("pplex.model.native.load_library", lambda: None)
    elif load_library() is None:
        pytest.skip("the compiled step was not built")


def spec_mimi(model: Model) -> Mimi:
    """The codec's specification, with the weights of ``model``."""
    path = next(model.local.path.glob("tokenizer-*.safetensors"))
    return load_mimi(path, model.config.mimi)


def make_codec(kind: str, model: Model) -> Codec:
    """The codec of ``model`` by compiled code or MLX's operations (of ``CODECS``)."""
    mimi = spec_mimi(model)
    if kind == "mlx":
        return MlxCodec(mimi)
    if library() is None:
        pytest.skip("the compiled codec was not built")
    return NativeCodec(mimi, model.config.mimi)


def latents(codec: Codec, model: Model, chunks: list[np.ndarray]) -> np.ndarray:
    """Latents (width, frames) of PCM in chunks (frames, frame_size)."""
    if isinstance(codec, NativeCodec):
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
    return np.array(model.lm.embed(mx.array(tokens))[0])


def temporal_outputs(
    model: Model, tokens: np.ndarray, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
    """The specification's normalised outputs (t, dim) and text logits (t, text_card).

    Of tokens (1, streams, t), ``chunk`` positions at a time.
    """
    lm = model.lm
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

    model.lm.depformer(mx.array(hidden), given[:, 0], next_forced)
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
) -> list[Reply]:
    """A whole greedy conversation after ``prompt`` with PCM (frames, frame_size).

    ``way`` is that of the steps, already in use; None for whatever is best here.
    """
    conversation = Conversation(model, prefill(model.lm, prompt), GREEDY, seed=0)
    return list(conversation.run(chunks, ahead=ahead, decode_frames=decode))
