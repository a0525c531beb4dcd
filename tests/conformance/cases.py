"""What every engine is run on: models by how their weights are stored, prompts, rows.

The models are tiny and random, and are read from files in the published layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from random_checkpoint import Arrays, lm_arrays, mimi_arrays

from pplex.bench.random_model import TINY
from pplex.checkpoint.folder import CheckpointFolder
from pplex.checkpoint.weights import LmTensors, codec_tensors, lm_tensors, make_lm
from pplex.model.config import LmConfig, ModelConfig
from pplex.model.lm import Lm
from pplex.model.mimi import Mimi, make_mimi
from pplex.model.prompt import Prompt, make_prompt
from pplex.model.sampling import GREEDY, SamplingConfig
from pplex.model.streams import NOT_FORCED


@dataclass(frozen=True)
class Form:
    """How the weights of a model lie in its files, and its depformer's steps there.

    And how keys and values are kept, which is the engine's.
    ``temporal`` and ``depformer`` are bits and group size; 16 and 32 bits are floats.
    """

    layout: str
    temporal: tuple[int, int]
    depformer: tuple[int, int]
    dep_q: int
    kv_bits: int | None = None

    def __str__(self) -> str:
        """The name of a test's case."""
        forms = dict.fromkeys(f"{b}-{g}" for b, g in (self.temporal, self.depformer))
        kept = "" if self.kv_bits is None else f" kv{self.kv_bits}"
        return f"{self.layout} {'+'.join(forms)} q{self.dep_q}{kept}"

    @property
    def config(self) -> ModelConfig:
        """The sizes of the model."""
        config = replace(TINY, lm=replace(TINY.lm, context=32, dep_q=self.dep_q))
        return config.with_kv_bits(self.kv_bits)

    def files(self) -> dict[str, Arrays]:
        """The language model's tensors by file."""
        made = []
        for bits, group in (self.temporal, self.depformer):
            mx.random.seed(0)
            dtype = mx.float32 if bits == 32 else mx.bfloat16
            made.append(
                lm_arrays(
                    self.config.lm,
                    self.layout,
                    bits=min(bits, 16),
                    group_size=group,
                    dtype=dtype,
                )
            )
        files, others = made
        return files | ({"depformer": others["depformer"]} if len(files) > 1 else {})


# In the split layout tables are not quantized, in the others every matrix is.
FORMS = [
    Form("pytorch", (32, 1), (32, 1), 8),
    Form("pytorch", (16, 1), (16, 1), 16),
    Form("mlx", (8, 32), (8, 32), 16),
    Form("pytorch", (4, 64), (4, 64), 8),
    Form("mlx-split", (4, 32), (8, 64), 16, kv_bits=8),
]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model."""

    folder: Path
    config: ModelConfig

    def lm(self, *, dense: bool = False) -> Lm:
        """The language model in float32, a new one at each call.

        With ``dense``, quantized weights are written out: the specification.
        """
        tensors = self.tensors()
        tensors = tensors.write_out() if dense else tensors
        return make_lm(self.config.lm, tensors, mx.float32)

    def tensors(self) -> LmTensors:
        """The language model's tensors, of which an engine is made."""
        return lm_tensors(CheckpointFolder(self.folder), self.config.lm)

    def codec(self) -> Arrays:
        """The codec's tensors."""
        return codec_tensors(CheckpointFolder(self.folder), self.config.mimi)

    def mimi(self) -> Mimi:
        """The codec, a new one at each call."""
        return make_mimi(self.config.mimi, self.codec())


def write(folder: Path, form: Form) -> Checkpoint:
    """Write a checkpoint of ``form``."""
    codec = {"tokenizer-e351c8d8-checkpoint125": mimi_arrays(form.config.mimi)}
    for name, arrays in (form.files() | codec).items():
        mx.save_safetensors(str(folder / f"{name}.safetensors"), arrays)
    return Checkpoint(folder, form.config)


def prompts(config: ModelConfig) -> dict[str, Prompt]:
    """Prompts with voices of both kinds; all give a part of the first column."""
    lm, rng = config.lm, np.random.default_rng(1)

    def codes(frames: int) -> np.ndarray:
        return rng.integers(0, lm.card, (lm.num_codebooks, frames), np.int32)

    ring = rng.integers(0, lm.card, (lm.num_streams, 4), np.int32)
    embeddings = rng.standard_normal((5, lm.dim)).astype(np.float32)
    made = {
        "codes": make_prompt(config, [7, 90, 33], voice_codes=codes(4)),
        "no role": make_prompt(config, [], voice_codes=codes(2)),
        "past window": make_prompt(config, [5], voice_codes=codes(lm.context)),
        "saved": make_prompt(config, [8, 100], saved_voice=(embeddings, ring)),
    }
    pending = rng.integers(0, lm.card, lm.num_streams, np.int32)
    pending[[2, 5]] = NOT_FORCED
    return made | {"text given": replace(made["codes"], pending=pending)}


def random_columns(config: LmConfig, frames: int, seed: int) -> np.ndarray:
    """Columns (streams, frames) of tokens that any stream may hold."""
    cards = np.array([config.text_card] + [config.card] * config.n_q)
    rng = np.random.default_rng(seed)
    return rng.integers(0, cards, (frames, config.num_streams)).astype(np.int32).T


@dataclass(frozen=True)
class Conversation:
    """One of several: after which of ``prompts``, its seed, when it is there."""

    prompt: str
    seed: int
    first: int
    frames: int

    def user(self, config: LmConfig) -> np.ndarray:
        """The user's tokens (codebooks, frames)."""
        columns = random_columns(config, self.frames, self.seed & 0xFFFF)
        return columns[config.num_agent_streams :]


# By how many places there are. The window is 31 positions, prompts included: rows are
# on both sides of it, at different positions, and places are taken again.
CONVERSATIONS = {
    1: [
        Conversation("codes", 3, 0, 40),
        Conversation("saved", 4, 40, 5),
    ],
    3: [
        Conversation("saved", 2**40 + 5, 0, 36),
        Conversation("past window", 6, 0, 5),
        Conversation("text given", 7, 3, 9),
        Conversation("no role", 8, 5, 25),
        Conversation("codes", 9, 15, 4),
    ],
    8: [
        Conversation("codes", 10, 0, 4),
        Conversation("saved", 11, 0, 22),
        Conversation("past window", 12, 0, 8),
        Conversation("text given", 13, 1, 9),
        Conversation("no role", 14, 1, 23),
        Conversation("codes", 15, 1, 6),
        Conversation("saved", 16, 2, 5),
        Conversation("past window", 17, 2, 7),
        Conversation("saved", 10, 5, 12),
        Conversation("codes", 19, 9, 4),
        Conversation("no role", 20, 11, 3),
    ],
}
SAMPLINGS = {
    "greedy": GREEDY,
    "drawn": SamplingConfig(top_k=20, text_top_k=10),
}
