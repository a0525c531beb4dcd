"""Which engine runs here, and in what form weights compute: the one table of both.

What is faster depends on what computes and on how many recordings there are at a time.
``KINDS`` records what was found, and why; memory has the last word. A new engine is a
module of its own and a line there.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.resources
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import mlx.core as mx

from pplex.checkpoint.weights import LmTensors
from pplex.engine.base import Cost, Engine, form_name
from pplex.engine.c import binding, pace
from pplex.engine.c import engine as c
from pplex.engine.cuda import compiler
from pplex.engine.cuda import engine as cuda
from pplex.engine.device import device_name, memory_gb, on_cpu
from pplex.engine.mlx import engine as mlx
from pplex.engine.mlx.ring import RING_STEP
from pplex.model.config import ModelConfig

Compute = Literal["auto", "quantized", "dense", "alone"]

# Of the free memory, what weights that are written out may take, and what rows may.
_WEIGHTS_SHARE = 0.5
_ROWS_SHARE = 0.9

_MIN_ROWS_C = 4  # so many are computed with each vector of weights that is read
_FULL_ROWS_C = 8  # more than these share in no vector of weights (lm.h)
_MAX_ROWS_C = 16
# Keys and values are read by every step: twice as fast from a cache as from memory.
# `mini`: 0.25 ms a frame with 4 rows, 0.225 with 8 at 325 positions; 0.74 and 1.25 at
# 1500. These are of the longest recordings at their end, twice what is read on average.
CACHE_BYTES = 96 << 20
# Of takes of a recording, which have most in common: what all say is computed once.
_TAKES_BYTES = 256 << 20
_MAX_ROWS_GPU = 256


@dataclass(frozen=True)
class Form:
    """Whether quantized weights are written out, and why, in a clause.

    ``alone`` is what a GPU does for one conversation by itself: other bits come of it
    than where rows share a step. ``lacks_memory``: the form that is faster, with other
    bits, does not fit.
    """

    dense: bool
    reason: str
    alone: bool = False
    lacks_memory: bool = False

    def __str__(self) -> str:
        """In words, for messages."""
        return f"{form_name(self.dense, self.alone)}: {self.reason}"


class Make(Protocol):
    """Makes an engine."""

    def __call__(
        self,
        config: ModelConfig,
        lm: LmTensors,
        codec: Mapping[str, mx.array],
        *,
        alone: bool = False,
    ) -> Engine:
        """``lm`` is emptied; with ``alone`` for one conversation by itself."""


@dataclass(frozen=True)
class Kind:
    """An engine where it is the best, and what is best for it.

    What has ``cost_alone`` computes one conversation by itself in a form of its own,
    which takes so much; with ``shares_prompts`` rows hold what is said after a prompt
    only.

    ``is_available`` tells whether MLX's default device is one for it; ``make`` makes it
    and ``cost`` tells before what a model takes on it. ``one`` and
    ``many`` are the faster forms of weights for one recording at a time and for many;
    ``max_rows`` how many rows of so many bytes may step together, of a model's cost and
    with so many bytes free, and of takes of a recording, if that is more, those whose
    keys and values have ``takes_bytes``. ``bytes_per_s`` measures how fast a step reads
    weights of so many bits; None where a step takes more than reading.
    """

    is_available: Callable[[], bool]
    make: Make
    cost: Callable[[ModelConfig, LmTensors], Cost]
    one: Form
    many: Form
    max_rows: Callable[[Cost, int, float], int]
    takes_bytes: int = 0
    cost_alone: Callable[[ModelConfig, LmTensors], Cost] | None = None
    shares_prompts: bool = False
    bytes_per_s: Callable[[int], float] | None = None


def _rows_in_cache(cost: Cost, row_bytes: int, free: float) -> int:
    """As many as a cache holds keys and values of, up to a product's.

    Or, where weights take more, as weights take, for each row's share in reading these
    is less the more rows there are.
    """
    rows = max(min(CACHE_BYTES // row_bytes, _FULL_ROWS_C), cost.step // row_bytes)
    return min(max(rows, _MIN_ROWS_C), _MAX_ROWS_C)


def _rows_in_memory(cost: Cost, row_bytes: int, free: float) -> int:
    """As many as memory holds beside the codec's work."""
    room = _ROWS_SHARE * free - cost.codec_work
    return min(int(room / row_bytes), _MAX_ROWS_GPU)


def _on_cpu(make: Callable[..., Engine]) -> Make:
    """Makes an engine whose rows are the same bits alone and beside others."""

    def made(
        config: ModelConfig,
        lm: LmTensors,
        codec: Mapping[str, mx.array],
        *,
        alone: bool = False,
    ) -> Engine:
        return make(config, lm, codec)

    return made


_FEWER_BYTES = "a frame reads fewer bytes so"

# The first that is available is taken.
KINDS: dict[str, Kind] = {
    # Our C on a CPU. Medium random model on 2 cores, AVX-512: 12.9 ms a step against
    # 24.1 written out, with 8 rows 37 ms against 54.
    "c": Kind(
        is_available=lambda: on_cpu() and binding.is_built(),
        make=_on_cpu(c.CEngine),
        cost=c.cost_of,
        one=Form(False, "the compiled step reads fewer bytes so"),
        many=Form(False, "the compiled step reads fewer bytes so"),
        max_rows=_rows_in_cache,
        takes_bytes=_TAKES_BYTES,
        bytes_per_s=pace.bytes_per_s,
    ),
    # MLX on a CPU. 4096 x 4096, one row: 0.83 ns a weight at 4 bits, 0.27 in float32.
    "cpu": Kind(
        is_available=on_cpu,
        make=_on_cpu(functools.partial(mlx.MlxEngine, on_gpu=False)),
        cost=functools.partial(mlx.cost_of, on_gpu=False),
        one=Form(True, "MLX's CPU products are 3 times as fast so"),
        many=Form(True, "MLX's CPU products are 3 times as fast so"),
        max_rows=lambda *_: 1,  # they share nothing
    ),
    # H200, 7B: 3.4 ms a frame at 4 bits; in bfloat16 it reads 4 times as many bytes.
    # MLX's CUDA kernels for quantized weights take the rows one by one.
    "cuda": Kind(
        is_available=lambda: not on_cpu() and compiler.is_usable(),
        make=cuda.CudaEngine,
        cost=cuda.cost_of,
        one=Form(False, "one kernel makes a frame, and reads fewer bytes so"),
        many=Form(True, "CUDA's products of many rows are faster so"),
        max_rows=_rows_in_memory,
        cost_alone=functools.partial(cuda.cost_of, alone=True),
        shares_prompts=True,
    ),
    # Metal, and GPUs that our kernels do not know; nothing here was measured on a Mac.
    "gpu": Kind(
        is_available=lambda: not on_cpu(),
        make=functools.partial(mlx.MlxEngine, on_gpu=True),
        cost=functools.partial(mlx.cost_of, on_gpu=True),
        one=Form(False, _FEWER_BYTES),
        many=Form(False, _FEWER_BYTES),
        max_rows=_rows_in_memory,
        cost_alone=functools.partial(mlx.cost_of, on_gpu=True, alone=True),
    ),
}


def kind_here() -> str:
    """The key in ``KINDS`` of what is best on MLX's default device."""
    return next(name for name, kind in KINDS.items() if kind.is_available())


def choose_form(
    wanted: Compute,
    config: ModelConfig,
    lm: LmTensors,
    *,
    many: bool,
    live: bool = False,
) -> Form:
    """How a model is to compute: for ``many`` recordings, or one, which may be live."""
    kind = KINDS[kind_here()]
    alone = wanted == "alone" or live or (wanted == "auto" and not many)
    alone = alone and kind.cost_alone is not None
    if not lm.forms:
        return Form(True, "no weights are stored quantized", alone)
    if wanted in ("dense", "quantized"):
        return Form(wanted == "dense", "as asked for", alone)
    best = replace(kind.one if alone or not many else kind.many, alone=alone)
    if not best.dense:
        return best
    need = kind.cost(config, lm.write_out()).held / 1e9
    _, free = memory_gb()
    if free is None or need > _WEIGHTS_SHARE * free:
        room = "unknown" if free is None else f"{free:.1f} GB"
        reason = f"written out they take {need:.1f} GB, and {room} is free"
        return Form(False, reason, alone, lacks_memory=True)
    return best


@functools.cache
def version_of(name: str) -> str:
    """The version of an engine's arithmetic: what its files and MLX's version say.

    Of another version other bits may come.
    """
    digest = hashlib.sha256(importlib.metadata.version("mlx").encode())
    folders = ("c",) if name == "c" else dict.fromkeys(("mlx", name))
    for folder in folders:
        files = importlib.resources.files("pplex.engine").joinpath(folder).iterdir()
        for file in sorted(files, key=lambda file: file.name):
            if file.name.endswith((".py", ".c", ".h", ".cu")):
                digest.update(file.read_bytes())
    return f"{name} {digest.hexdigest()[:12]}"


def kernels_of(engine: Engine) -> str:
    """The version of what ``engine`` computes by; the codec's where a library chose."""
    return "-".join(filter(None, (version_of(engine.name), engine.codec.version)))


def machine(engine: Engine | None = None) -> dict[str, str]:
    """What computes here, with which versions, and how: for records that are shared."""
    found = {
        "pplex": importlib.metadata.version("pplex"),
        "mlx": importlib.metadata.version("mlx"),
        "platform": platform.platform(),
        "device": device_name(),
        "engine": kind_here(),
    }
    if engine is not None:
        found |= {"dtype": engine.dtype, "weights": engine.compute}
    return found


def make_engine(
    config: ModelConfig,
    lm: LmTensors,
    codec: Mapping[str, mx.array],
    *,
    alone: bool = False,
) -> Engine:
    """The best engine here, made from a checkpoint's tensors; ``lm`` is emptied."""
    return KINDS[kind_here()].make(config, lm, codec, alone=alone)


def cost_of(config: ModelConfig, lm: LmTensors, *, alone: bool = False) -> Cost:
    """What a model takes on the best engine here; no tensor is read."""
    kind = KINDS[kind_here()]
    cost = kind.cost_alone if alone and kind.cost_alone else kind.cost
    return cost(config, lm)


def need_bytes(
    config: ModelConfig, cost: Cost, positions: int | None = None, rows: int = 1
) -> float:
    """What rows of so many positions take, or of the window, weights and all."""
    window = config.lm.window
    kept = window if positions is None else min(window, positions)
    return cost.held + cost.codec_work + rows * kept * cost.position


def batch_size(
    config: ModelConfig,
    cost: Cost,
    frames: int,
    free_bytes: float | None = None,
    *,
    prompt_frames: int = 0,
    takes: bool = False,
) -> int:
    """How many recordings to answer at once, none with more than ``frames`` frames.

    They begin after prompts of ``prompt_frames``. Of the free memory, or of
    ``free_bytes``; one if each is computed alone. With ``takes``, of one recording.
    """
    if cost.alone:
        return 1
    if free_bytes is None:
        free_bytes = 1e9 * (memory_gb()[1] or 0.0)
    kind = KINDS[kind_here()]
    positions = frames + prompt_frames
    if kind.shares_prompts:
        positions = -(-frames // RING_STEP) * RING_STEP
    row_bytes = cost.position * min(config.lm.window, positions)
    of_takes = min(kind.takes_bytes // row_bytes, _MAX_ROWS_C) if takes else 0
    return max(1, kind.max_rows(cost, row_bytes, free_bytes), of_takes)
