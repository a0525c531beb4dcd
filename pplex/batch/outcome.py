"""How a batch gets on, and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pplex.checkpoint.hub import LocalModel
from pplex.respond.stats import Outcome


class Report(Protocol):
    """Who is told how a batch gets on."""

    shows_bars: bool

    def note(self, message: str) -> None:
        """Something worth a line happened."""

    def loading(self, local: LocalModel) -> None:
        """The model's files are there and will be loaded."""

    def computing(self, how: str) -> None:
        """The model is loaded and computes in this form, for this reason."""

    def starting(self, count: int, audio_s: float) -> None:
        """So many recordings, of so many seconds in all, will be answered."""

    def finished(self, key: str, audio_s: float) -> None:
        """A recording's outputs are written."""

    def checked(self, outcomes: Sequence[Outcome], key: str) -> None:
        """A recording's outputs were checked."""

    def failed(self, key: str, error: str, audio_s: float) -> None:
        """A recording cannot be answered."""


@dataclass
class Summary:
    """How a batch went; ``failed`` says why, ``failed_before`` counts earlier ones.

    ``checks_failed`` of the recordings that were ``checked`` did not pass.

    ``audio_s`` is what was answered now, in ``run_s`` seconds after loading.
    """

    done: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    failed_before: int = 0
    not_run: int = 0
    checked: int = 0
    checks_failed: int = 0
    audio_s: float = 0.0
    load_s: float = 0.0
    run_s: float = 0.0
    total_s: float = 0.0
    batch_size: int | None = None
    peak_memory_gb: float = 0.0
