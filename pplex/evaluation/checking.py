"""Checks of an answer right after it was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pplex.evaluation.check import Checks, Outcome, run_checks
from pplex.respond.stats import Stats
from pplex.respond.transcript import Word


@dataclass(frozen=True)
class Wish:
    """What to check of each answer; with ``length_of``, against its own recording."""

    checks: Checks = field(default_factory=Checks)
    length_of: bool = False

    def any(self) -> bool:
        """Whether anything is asked."""
        return self.length_of or self.checks.any()


def check_answer(
    wish: Wish,
    source: Path,
    outputs: dict[str, Path],
    stats: Stats,
    spoken: Sequence[Word],
) -> list[Outcome]:
    """Check what was written to ``outputs`` (by what they are) for ``source``."""
    audio = outputs.get("agent") or outputs["audio"]
    checks = wish.checks
    if wish.length_of:
        checks = replace(checks, length_of=source)
    return run_checks(audio, checks, asdict(stats), spoken)
