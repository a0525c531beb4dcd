"""Look at the machine and the models on it: what runs here, and how fast."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pplex.bench.estimate import (
    estimate_frame_s,
    live_in_words,
    loop_frame_s,
    minute_in_words,
    need_gb,
)
from pplex.bench.random_model import random_lm
from pplex.checkpoint.download import Online
from pplex.checkpoint.hub import LocalModel, list_models, locate, resolve
from pplex.checkpoint.hub_cache import ModelEntry
from pplex.checkpoint.known import PUBLISHED_BITS, known_repo
from pplex.checkpoint.published import check_files, summary
from pplex.checkpoint.reference import PERSONAPLEX
from pplex.checkpoint.verify import Finding, verify_quickly
from pplex.checkpoint.voices import find_voices
from pplex.checkpoint.weights import lm_tensors
from pplex.conversation.prompts import make_role
from pplex.conversation.session import load
from pplex.engine.choose import KINDS, kind_here
from pplex.engine.device import (
    compute_dtype,
    copy_bandwidth_gb_s,
    device_name,
    memory_gb,
    on_cpu,
)
from pplex.errors import PplexError, first_line
from pplex.model.config import ModelConfig

_TEST_MODEL = "mini"


@dataclass(frozen=True)
class Machine:
    """What computes here; memory in GB (1e9 bytes), None where nobody says.

    ``engine`` is what runs models, ``form`` how it takes quantized weights, and why.
    """

    python: str
    platform: str
    pplex: str
    mlx: str
    device: str
    engine: str
    form: str
    dtype: str
    cpu_cores: int
    memory_gb: float | None
    free_memory_gb: float | None
    bandwidth_gb_s: float


@dataclass(frozen=True)
class OnDisk:
    """A model: what is here of it, whether its files hold together, and a verdict.

    ``need_gb`` is what a conversation takes with a full memory. ``real_time_factor`` is
    measured where ``is_measured``, else an estimate from a short measurement of the
    engine; None where there is nothing to go by. ``published`` is what the quick checks
    of the published values say, None where they were not asked for or do not apply.
    """

    name: str
    path: str | None
    complete: bool
    faults: tuple[str, ...]
    num_voices: int
    need_gb: float | None
    fits: bool | None
    real_time_factor: float | None
    is_measured: bool
    published: str | None
    verdict: str


@dataclass(frozen=True)
class Diagnosis:
    """Everything ``pplex doctor`` found; ``network`` only if it was asked for."""

    machine: Machine
    models: tuple[OnDisk, ...]
    runs: bool
    test_run: str
    network: Online | None

    @property
    def is_well(self) -> bool:
        """Whether no file is at fault and something runs."""
        return self.runs and not any(m.faults for m in self.models)


def diagnose(
    names: tuple[str, ...],
    network: Callable[[], Online] | None,
    looking: Callable[[str], None],
) -> Diagnosis:
    """Look at everything, or at the models of these ``names``.

    ``network`` asks online, None for not at all; ``looking`` is told what comes next.
    """
    machine = look_at_machine()
    looking(_TEST_MODEL)
    factor, test_run = _try_model()
    entries = [_entry_of(name) for name in names] if names else list_models()
    models = []
    for entry in entries:
        looking(entry.name)
        models.append(look_at_model(entry, machine, factor, closely=bool(names)))
    online = network() if network else None
    return Diagnosis(machine, tuple(models), factor is not None, test_run, online)


def look_at_machine() -> Machine:
    """Versions, memory, and what runs models."""
    total, free = memory_gb()
    kind = kind_here()
    return Machine(
        python=platform.python_version(),
        platform=platform.platform(),
        pplex=importlib.metadata.version("pplex"),
        mlx=importlib.metadata.version("mlx"),
        device=device_name(),
        engine=kind,
        form=str(KINDS[kind].one),
        dtype=str(compute_dtype(not on_cpu())).removeprefix("mlx.core."),
        cpu_cores=os.cpu_count() or 1,
        memory_gb=total,
        free_memory_gb=free,
        bandwidth_gb_s=copy_bandwidth_gb_s(),
    )


def _try_model() -> tuple[float | None, str]:
    """Answer noise with the built-in model; the real-time factor, and how it went."""
    try:
        model = load(resolve(_TEST_MODEL, offline=True))
        start = model.engine.prefill(make_role(model, None, "").prompt)
        frame_s = loop_frame_s(model.engine, start)
    except (PplexError, RuntimeError) as e:
        return None, f"the built-in model does not run: {first_line(e)}"
    if math.isnan(frame_s):
        return None, "the built-in model gave sound that is no finite number"
    factor = frame_s * model.config.frame_rate
    return factor, f"the built-in model runs, real-time factor {factor:.3f}"


def _entry_of(name: str) -> ModelEntry:
    """A model that was named, as the list has it."""
    known = {entry.name: entry for entry in list_models()}
    if name in known:
        return known[name]
    local = locate(name)
    return ModelEntry(
        name,
        local.repo,
        path=local.path,
        revision=local.revision,
        complete=local.folder.fault is None,
    )


def look_at_model(
    entry: ModelEntry, machine: Machine, factor: float | None, *, closely: bool = False
) -> OnDisk:
    """What is here of a model, and whether it will run.

    ``closely``: compare its files with the published ones too.
    """
    faults: list[str] = []
    num_voices, published = 0, None
    config, bits = ModelConfig(), PUBLISHED_BITS.get(entry.name)
    needed_gb = entry.memory_gb
    tensors = random_lm(config.lm, bits) if bits else None
    if entry.path is not None and entry.complete:
        local = LocalModel(entry.name, entry.path, entry.repo, entry.revision)
        found = list(verify_quickly(local))
        if closely and (checks := list(_published(local))):
            published = summary(checks, PERSONAPLEX.name, True).text
            # What is not known by name may well be another model of these sizes.
            found += checks if known_repo(local.repo) else []
        faults = [f"{f.what}: {f.text}" for f in found if f.level == "fault"]
        try:
            config = local.folder.read_config()
            num_voices = len(find_voices(entry.path))
            tensors = lm_tensors(local.folder, config.lm)
            forms = Counter(form.bits for form in tensors.forms.values())
            most = forms.most_common(1)
            bits = min((8, 4), key=lambda b: abs(b - most[0][0])) if most else 16
        except PplexError:
            tensors = None  # one of the faults
    if tensors is not None:
        needed_gb = need_gb(config, tensors)
    fits = None
    if needed_gb and machine.free_memory_gb is not None:
        fits = needed_gb <= machine.free_memory_gb
    measured = entry.name == _TEST_MODEL and factor is not None
    if not measured:
        factor = None
        if tensors is not None and bits and not faults and fits is not False:
            frame_s = estimate_frame_s(config, bits)
            factor = None if frame_s is None else frame_s * config.frame_rate
    return OnDisk(
        name=entry.name,
        path=str(entry.path) if entry.path else None,
        complete=entry.complete,
        faults=tuple(faults),
        num_voices=num_voices,
        need_gb=needed_gb,
        fits=fits,
        real_time_factor=factor,
        is_measured=measured,
        published=published,
        verdict=_verdict(entry, faults, fits, needed_gb, factor, measured),
    )


def _published(local: LocalModel) -> Iterator[Finding]:
    """The quick checks of a 7B; nothing where a file of it is at fault."""
    try:
        applies = local.folder.read_config().lm == PERSONAPLEX.lm
    except PplexError:
        return
    if applies:
        yield from check_files(local, PERSONAPLEX, quickly=True)


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
        kind = "measured" if measured else "estimated from a short measurement"
        speed = (
            f"; real-time factor {factor:.2f} ({kind}): {live_in_words(factor)}, "
            f"{minute_in_words(factor)}"
        )
    here = "runs" if entry.complete else "not on this machine; it would run"
    return here + speed
