"""Look at the machine and the models on it: what runs here, and how fast."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pplex.checkpoint.download import Online
from pplex.checkpoint.hub import LocalModel, list_models, resolve
from pplex.checkpoint.hub_cache import ModelEntry
from pplex.checkpoint.verify import verify_quickly
from pplex.checkpoint.voices import find_voices
from pplex.conversation.prompt import prefill
from pplex.conversation.session import Conversation, load, make_role, warm_up
from pplex.errors import PplexError
from pplex.layers.device import on_cpu
from pplex.layers.memory import memory_gb
from pplex.model.config import LmConfig
from pplex.model.sampling import SamplingConfig
from pplex.respond.stats import device_name

TEST_MODEL = "mini"
TEST_FRAMES = 25
FRAME_MS = 80.0

_SIDE = 4096  # of the matrices that are timed: those of the 7B model
_NUM_MATRICES = 4  # together more than a cache holds
_ROUNDS = 3
_BITS = {"4bit": 4, "8bit": 8, "bf16": 16}


@dataclass(frozen=True)
class Machine:
    """What computes here; memory in GB (1e9 bytes), None where nobody says.

    ``ns_per_weight`` is how long a weight takes in a product of one row, by bits; a
    bandwidth follows from that of 16 bits (32 on a CPU).
    """

    python: str
    platform: str
    pplex: str
    mlx: str
    device: str
    dtype: str
    blas: str
    cpu_cores: int
    memory_gb: float | None
    free_memory_gb: float | None
    ns_per_weight: dict[int, float]
    bandwidth_gb_s: float


@dataclass(frozen=True)
class OnDisk:
    """A model: what is here of it, whether its files hold together, and a verdict.

    ``real_time_factor`` is measured where ``is_measured``, else an estimate from the
    products alone; None where there is nothing to go by.
    """

    name: str
    path: str | None
    complete: bool
    faults: tuple[str, ...]
    num_voices: int
    fits: bool | None
    real_time_factor: float | None
    is_measured: bool
    verdict: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything ``pplex doctor`` found; ``network`` only if it was asked for."""

    machine: Machine
    models: tuple[OnDisk, ...]
    test_run: str
    network: Online | None

    @property
    def is_well(self) -> bool:
        """Whether no file is at fault and something runs."""
        return not any(m.faults for m in self.models) and any(
            m.is_measured for m in self.models
        )


def diagnose(blas: str, network: Callable[[], Online] | None) -> Diagnosis:
    """Look at everything; ``network`` asks online, None for not at all."""
    machine = look_at_machine(blas)
    factor, test_run = try_model()
    models = tuple(look_at_model(e, machine, factor) for e in list_models())
    return Diagnosis(machine, models, test_run, network() if network else None)


def look_at_machine(blas: str) -> Machine:
    """Versions, memory, and products timed."""
    total, free = memory_gb()
    times = {bits: _ns_per_weight(bits) for bits in (4, 8, 16)}
    return Machine(
        python=platform.python_version(),
        platform=platform.platform(),
        pplex=importlib.metadata.version("pplex"),
        mlx=importlib.metadata.version("mlx"),
        device=device_name(),
        dtype="float32" if on_cpu() else "bfloat16",
        blas=blas,
        cpu_cores=os.cpu_count() or 1,
        memory_gb=total,
        free_memory_gb=free,
        ns_per_weight=times,
        bandwidth_gb_s=(4 if on_cpu() else 2) / times[16],
    )


def _ns_per_weight(bits: int) -> float:
    """Nanoseconds a weight in a product of one row, the best of some rounds."""
    dtype = mx.float32 if on_cpu() else mx.bfloat16
    matrices = [
        mx.random.normal((_SIDE, _SIDE)).astype(dtype) for _ in range(_NUM_MATRICES)
    ]
    x = mx.ones((1, _SIDE), dtype)
    if bits < 16:
        # On a CPU no cache helps, and packing takes its time.
        matrices = matrices[:1] if on_cpu() else matrices
        packed = [mx.quantize(m, group_size=64, bits=bits) for m in matrices]
        mx.eval(packed)

        def product() -> list[mx.array]:
            return [
                mx.quantized_matmul(x, *p, transpose=True, group_size=64, bits=bits)
                for p in packed
            ]
    else:
        mx.eval(matrices)

        def product() -> list[mx.array]:
            return [x @ m.T for m in matrices]

    mx.eval(product())
    spent = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        mx.eval(product())
        spent.append(time.perf_counter() - start)
    return min(spent) * 1e9 / (len(matrices) * _SIDE * _SIDE)


def weights_per_frame(lm: LmConfig) -> int:
    """Weights that a frame of conversation goes through."""
    temporal = lm.num_layers * (4 * lm.dim**2 + 3 * lm.dim * lm.hidden_dim)
    width = lm.depformer_dim
    layers = lm.depformer_num_layers
    step = layers * (4 * width**2 + 3 * width * lm.depformer_hidden_dim)
    step += width * (lm.dim + lm.card)
    return temporal + lm.num_codebooks * step + lm.dim * lm.text_card


def try_model() -> tuple[float | None, str]:
    """Answer two seconds of noise with the built-in model; the real-time factor."""
    try:
        model = load(resolve(TEST_MODEL, offline=True))
        role = make_role(model, None, "")
        state = prefill(model.lm, role.prompt)
        warm_up(model, state)
        size = model.config.frame_size
        noise = np.random.default_rng(0).uniform(-0.1, 0.1, (TEST_FRAMES, size))
        frames = noise.astype(np.float32)
        talk = Conversation(model, state, SamplingConfig(), seed=0)
        start = time.perf_counter()
        for reply in talk.run((f[None] for f in frames), ahead=False, decode_frames=1):
            if not np.isfinite(reply.pcm).all():
                return None, "the built-in model gave sound that is no finite number"
        spent = time.perf_counter() - start
    except (PplexError, RuntimeError) as e:
        return None, f"the built-in model does not run: {str(e).splitlines()[0]}"
    factor = spent * 1000.0 / FRAME_MS / TEST_FRAMES
    return factor, f"{TEST_FRAMES} frames one by one, real-time factor {factor:.2f}"


def look_at_model(entry: ModelEntry, machine: Machine, factor: float | None) -> OnDisk:
    """What is here of a model, and whether it will run."""
    faults: list[str] = []
    num_voices = 0
    lm = LmConfig()
    if entry.path is not None:
        local = LocalModel(entry.name, entry.path, entry.repo, entry.revision)
        found = list(verify_quickly(local)) if entry.complete else []
        faults = [f"{f.what}: {f.text}" for f in found if f.level == "fault"]
        try:
            lm = local.folder.read_config().lm
            num_voices = len(find_voices(entry.path))
        except PplexError:
            pass  # one of the faults
    measured = entry.name == TEST_MODEL and factor is not None
    bits = _BITS.get(entry.name)
    if not measured:
        known = bits is not None
        ns = machine.ns_per_weight[bits] if bits is not None else 0.0
        factor = weights_per_frame(lm) * ns * 1e-6 / FRAME_MS if known else None
    need_gb = entry.memory_gb
    if need_gb and bits == 16 and machine.dtype == "float32":
        need_gb *= 2  # widened
    fits = None
    if need_gb and machine.free_memory_gb is not None:
        fits = need_gb <= machine.free_memory_gb
    return OnDisk(
        name=entry.name,
        path=str(entry.path) if entry.path else None,
        complete=entry.complete,
        faults=tuple(faults),
        num_voices=num_voices,
        fits=fits,
        real_time_factor=factor,
        is_measured=measured,
        verdict=_verdict(entry, faults, fits, need_gb, factor, measured),
    )


def _verdict(
    entry: ModelEntry,
    faults: list[str],
    fits: bool | None,
    need_gb: float | None,
    factor: float | None,
    measured: bool,
) -> str:
    if faults:
        return f"at fault: {faults[0]}"
    if fits is False:
        return f"will not run: it needs about {need_gb:.0f} GB of free memory"
    speed = ""
    if factor is not None:
        kind = "measured" if measured else "estimated from its products alone"
        live = (
            "keeps up with a live stream" if factor < 0.9 else "slower than real time"
        )
        speed = f"; real-time factor {factor:.2f} ({kind}): {live}"
    here = "runs" if entry.complete else "not on this machine; it would run"
    return here + speed
