"""What a maintainer needs of a machine that nobody has measured: one file.

Each case is a process of its own, `pplex bench` on a model with random weights: MLX
reads its variables once, memory is counted from nothing, and a case that the system
ends is one line of the file.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from pplex.bench.estimate import estimate_frame_s
from pplex.bench.random_model import SIZES, random_lm
from pplex.engine.choose import cost_of, machine
from pplex.engine.device import copy_bandwidth_gb_s, memory_gb, num_cores
from pplex.model.config import ModelConfig
from pplex.respond.stats import Latency

FORMAT = "pplex-bench-1"
LARGE, SMALL = "7b", "medium"
MANY = 8  # rows beside one
LIVE_S = 60
_FRAMES = 150
_MOST_S = 780.0  # of all cases together
# A frame of one row that takes longer would not let the cases end in that time.
_SLOW_FRAME_S = 0.3
_POSITIONS = 512  # of each row, room to grow included
_ROOM_GB = 1.0  # beside weights, keys and values: what is in work
# MLX hands work to a GPU after so many operations, or megabytes that they read.
_BUFFERS = (
    {"MLX_MAX_OPS_PER_BUFFER": "10", "MLX_MAX_MB_PER_BUFFER": "40"},
    {"MLX_MAX_OPS_PER_BUFFER": "200", "MLX_MAX_MB_PER_BUFFER": "200"},
    {"MLX_MAX_OPS_PER_BUFFER": "1000", "MLX_MAX_MB_PER_BUFFER": "1000"},
)


@dataclass(frozen=True)
class Case:
    """One measurement; figures are None where it did not come to an end.

    ``fault`` says why, in the words of the process. ``compute`` and ``dtype`` are how
    the model was computed.
    """

    model: str
    bits: int
    rows: int
    variables: dict[str, str] = field(default_factory=dict)
    compute: str | None = None
    dtype: str | None = None
    frame_ms: Latency | None = None
    parts_ms: dict[str, float] | None = None
    live_ms: Latency | None = None
    load_s: float | None = None
    prefill_s: float | None = None
    warm_up_s: float | None = None
    peak_memory_gb: float | None = None
    peak_process_gb: float | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Submission:
    """The file; ``machine`` is what a record of ``models verify`` says of it."""

    format: str
    machine: dict[str, str]
    python: str
    cores: int
    memory_gb: float | None
    free_memory_gb: float | None
    bandwidth_gb_s: float
    cases: list[Case]
    notes: list[str]


def submission(note: Callable[[str], None]) -> Submission:
    """Measure everything; ``note`` is told what is being done."""
    begun = time.perf_counter()
    total_gb, free_gb = memory_gb()
    here = machine()
    notes: list[str] = []
    cases = _cases(free_gb, notes)
    for said in notes:
        note(said)
    if here["device"].startswith("gpu"):
        first = cases[0]
        cases += [Case(first.model, first.bits, 1, each) for each in _BUFFERS]
    found = []
    for number, case in enumerate(cases, 1):
        is_live = number == 1
        variables = "".join(f", {key}={x}" for key, x in case.variables.items())
        note(
            f"{number} of {len(cases)}: {case.model}, {case.bits} bits, {case.rows} at "
            f"a time{variables}" + (f", then {LIVE_S} s live" if is_live else "")
        )
        found.append(_measured(case, is_live, _MOST_S - (time.perf_counter() - begun)))
    return Submission(
        format=FORMAT,
        machine=here,
        python=f"{platform.python_version()} {platform.machine()}",
        cores=num_cores(),
        memory_gb=total_gb,
        free_memory_gb=free_gb,
        bandwidth_gb_s=copy_bandwidth_gb_s(),
        cases=found,
        notes=notes,
    )


def _cases(free_gb: float | None, notes: list[str]) -> list[Case]:
    """What to measure; what does not suit this machine is left out, and noted."""
    large = SIZES[LARGE]
    cases = []
    for case in (Case(LARGE, bits, rows) for rows in (1, MANY) for bits in (4, 8)):
        need = _need_gb(large, case.bits, case.rows)
        if free_gb is None or need <= free_gb:
            cases.append(case)
        else:
            notes.append(
                f"The 7B at {case.bits} bits, {case.rows} at a time, was left out: it "
                f"takes {need:.1f} GB here, and {free_gb:.1f} GB are free."
            )
    frame_s = estimate_frame_s(large, 4) if cases else None
    if frame_s is not None and frame_s > _SLOW_FRAME_S:
        notes.append(f"The 7B was left out: a frame takes about {frame_s:.1f} s here.")
        cases = []
    if cases:
        return cases
    notes.append("A smaller model was measured instead.")
    return [Case(SMALL, bits, rows) for rows in (1, MANY) for bits in (4, 8)]


def _need_gb(config: ModelConfig, bits: int, rows: int) -> float:
    cost = cost_of(config, random_lm(config.lm, bits))
    return (cost.held + rows * _POSITIONS * cost.position) / 1e9 + _ROOM_GB


def _measured(case: Case, is_live: bool, rest_s: float) -> Case:
    """``case`` with its figures, or with what was wrong."""
    options = ["--random", case.model, "--bits", case.bits, "--frames", _FRAMES]
    options += ["--batch-size", case.rows, "--json", "-", "-q"]
    options += ["--live", LIVE_S] if is_live else []
    if rest_s < 0:
        return replace(case, fault="left out: the time was over")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pplex", "bench", *map(str, options)],
            env=os.environ | case.variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=rest_s + 60.0,
        )
    except subprocess.TimeoutExpired:
        return replace(case, fault="ended: the time was over")
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing was said"]
        fault = f"exit {done.returncode}: {said[-1]}"
        return replace(case, fault=fault.replace(str(Path.home()), "~")[:300])
    found = json.loads(done.stdout)
    (run,) = found["runs"]
    live = found["live_ms"]
    return replace(
        case,
        compute=found["compute"],
        dtype=found["dtype"],
        frame_ms=Latency(**run["frame_ms"]),
        parts_ms=run["parts_ms"],
        live_ms=None if live is None else Latency(**live),
        load_s=found["load_s"],
        prefill_s=found["prefill_s"],
        warm_up_s=run["warm_up_s"],
        peak_memory_gb=run["peak_memory_gb"],
        peak_process_gb=found["peak_process_gb"],
    )
