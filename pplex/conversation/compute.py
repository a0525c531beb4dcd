"""In what form quantized weights compute: as they are stored, or written out.

What is faster depends on what computes and on how many recordings there are at a time.
``FACTS`` records what was found, and why; memory has the last word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlx.core as mx
from mlx.utils import tree_flatten

from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.safetensors import read_specs
from pplex.conversation.session import Model, load
from pplex.errors import PplexError
from pplex.layers.device import on_cpu
from pplex.layers.memory import memory_gb
from pplex.model.config import LmConfig
from pplex.model.lm import Lm
from pplex.model.native import load_library

Compute = Literal["auto", "quantized", "dense"]
# Of the free memory, weights that are written out may take so much.
_MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Fact:
    """What is faster for one recording at a time or for many, and how we know."""

    dense: bool
    reason: str


# By backend, and whether many recordings are answered at a time.
FACTS: dict[tuple[str, bool], Fact] = {
    # Medium random model on 2 cores, AVX-512: 12.9 ms a step against 24.1 written out,
    # with 8 rows 37 ms against 54.
    ("compiled", False): Fact(False, "the compiled step reads fewer bytes so"),
    ("compiled", True): Fact(False, "the compiled step reads fewer bytes so"),
    # 4096 x 4096, one row: 0.83 ns a weight at 4 bits, 0.27 ns in float32.
    ("cpu", False): Fact(True, "MLX's CPU products are 3 times as fast so"),
    ("cpu", True): Fact(True, "MLX's CPU products are 3 times as fast so"),
    # H200, 7B: 4.9 ms a frame at 4 bits; in bfloat16 it reads 4 times as many bytes.
    ("cuda", False): Fact(False, "one kernel makes a frame, and reads fewer bytes so"),
    # MLX's CUDA kernels for quantized weights take the rows one by one.
    ("cuda", True): Fact(True, "CUDA's products of many rows are faster so"),
    # A frame reads every weight once; nothing here was measured on a Mac.
    ("metal", False): Fact(False, "a frame reads fewer bytes so"),
    ("metal", True): Fact(False, "a frame reads fewer bytes so"),
}


@dataclass(frozen=True)
class Choice:
    """Whether to write quantized weights out, and why, in a clause."""

    dense: bool
    reason: str

    def __str__(self) -> str:
        """In words, for messages."""
        return f"{'dense' if self.dense else 'quantized'}: {self.reason}"


def backend() -> str:
    """What computes: compiled (our code on a CPU), cpu (MLX's), metal or cuda."""
    if on_cpu():
        return "cpu" if load_library() is None else "compiled"
    return "metal" if mx.metal.is_available() else "cuda"


def choose(wanted: Compute, lm: LmConfig, *, many: bool) -> Choice:
    """How the quantized weights of a model of these sizes are to compute."""
    if wanted != "auto":
        return Choice(wanted == "dense", "as asked for")
    fact = FACTS[backend(), many]
    if not fact.dense:
        return Choice(False, fact.reason)
    need, (_, free) = dense_gb(lm), memory_gb()
    if free is None or need > _MEMORY_SHARE * free:
        room = "unknown" if free is None else f"{free:.1f} GB"
        return Choice(False, f"written out they take {need:.1f} GB, and {room} is free")
    return Choice(True, fact.reason)


def choose_for(
    local: LocalModel, wanted: Compute, lm: LmConfig, *, many: bool
) -> Choice:
    """How the weights of a model on this machine, of these sizes, are to compute."""
    if not is_quantized(local):
        return Choice(True, "no weights are stored quantized")
    return choose(wanted, lm, many=many)


def loaded_gb(local: LocalModel, lm: LmConfig, *, dense: bool) -> float:
    """About how many GB a model's weights take in use, by the files' headers.

    With ``dense``, those of the language model are written out. The codec is float32.
    """
    folder = local.folder
    codec_gb = _loaded_bytes(folder.codec, 4) / 1e9
    # The compiled step packs its own copy; of 16-bit weights both are 16 bits wide.
    copies = 2 if backend() == "compiled" and is_quantized(local) else 1
    if dense:
        return codec_gb + copies * dense_gb(lm)
    float_bytes = 4 if on_cpu() else 2
    lm_bytes = sum(_loaded_bytes(f, float_bytes) for f in folder.lm_files)
    return codec_gb + copies * lm_bytes / 1e9


def _loaded_bytes(file: Path, float_bytes: int) -> int:
    """Bytes of a file's tensors, those that are not packed at ``float_bytes`` each."""
    return sum(
        spec.num_bytes if spec.dtype == "U32" else math.prod(spec.shape) * float_bytes
        for spec in read_specs(file).values()
    )


def dense_gb(lm: LmConfig) -> float:
    """GB of a language model of these sizes, no weight of it quantized."""
    weights = sum(array.size for _, array in tree_flatten(Lm(lm).parameters()))
    return weights * (4 if on_cpu() else 2) / 1e9


def is_quantized(local: LocalModel) -> bool:
    """Whether any weights of a model on this machine are stored quantized."""
    files = local.folder.lm_files
    return any(name.endswith(".scales") for file in files for name in _names(file))


def _names(path: Path) -> list[str]:
    """The names in a file's header; none where it cannot be read."""
    try:
        return list(read_specs(path))
    except PplexError:
        return []  # loading says what is wrong with it


def load_as(local: LocalModel, wanted: Compute, *, many: bool) -> tuple[Model, Choice]:
    """Load a model in the form that was asked for, or that is faster here."""
    config = local.folder.read_config()
    choice = choose_for(local, wanted, config.lm, many=many)
    return load(local, dense=choice.dense), choice
