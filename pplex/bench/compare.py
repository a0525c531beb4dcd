"""Two runs of ``pplex bench`` side by side: what became faster, and by how much."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pplex.errors import PplexError
from pplex.files import reading
from pplex.values import fit, read_json

_Json = dict[str, Any]

# What is compared of a run: its name for people, where it lies, and its unit.
_FIGURES = (
    ("frame p50", ("frame_ms", "p50"), "ms"),
    ("frame p95", ("frame_ms", "p95"), "ms"),
    ("frame p99", ("frame_ms", "p99"), "ms"),
    ("frame mean", ("frame_ms", "mean"), "ms"),
    ("encode", ("loop_ms", "encode"), "ms"),
    ("step", ("loop_ms", "step"), "ms"),
    ("decode", ("loop_ms", "decode"), "ms"),
    ("audio", ("audio_s_per_s",), "s/s"),
    ("peak memory", ("peak_memory_gb",), "GB"),
)
# What should be equal for a fair comparison.
_CONDITIONS = ("device", "dtype", "model", "bits", "compute", "frames", "lengths")


@dataclass(frozen=True)
class Change:
    """A figure before and now; ``ratio`` is now over before."""

    batch_size: int
    figure: str
    unit: str
    before: float
    now: float

    @property
    def ratio(self) -> float:
        """Now over before."""
        return self.now / self.before if self.before else float("nan")


def read_bench(path: Path, schema: int) -> _Json:
    """An earlier run's JSON."""
    with reading(f"--compare {path}", "is not a file of `pplex bench --json`"):
        form = {"schema": int, "runs": [{"batch_size": int}]}
        found: _Json = fit(read_json(path), form)
        known = found["schema"]
        runs = {run["batch_size"]: run for run in found["runs"]}
    if known != schema:
        raise PplexError(
            f"--compare {path}: its schema is {known!r}, this version writes {schema}; "
            "measure again"
        )
    return {**found, "runs": runs}


def differences(before: _Json, now: _Json) -> list[str]:
    """Conditions that were others then, in words."""
    return [
        f"{name}: {before.get(name)} then, {now.get(name)} now"
        for name in _CONDITIONS
        if before.get(name) != now.get(name)
    ]


def changes(before: _Json, now: _Json) -> list[Change]:
    """Every figure that both have, by batch size; ``before`` is from ``read_bench``."""
    found = []
    for run in now["runs"]:
        earlier = before["runs"].get(run["batch_size"])
        for name, place, unit in _FIGURES:
            then, later = _value(earlier, place), _value(run, place)
            if then is not None and later is not None:
                found.append(Change(run["batch_size"], name, unit, then, later))
    return found


def _value(run: Any, place: tuple[str, ...]) -> float | None:
    for key in place:
        run = run.get(key) if isinstance(run, dict) else None
    is_number = isinstance(run, int | float) and not isinstance(run, bool)
    return float(run) if is_number else None
