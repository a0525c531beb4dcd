"""Times of any number of frames in little memory."""

from __future__ import annotations

import numpy as np

from pplex.respond.stats import FRAME_BUDGET_MS, Latency

_LOWEST_MS = 0.01
_RATIO = 1.005  # bins so much wider than the one before: percentiles to 0.5 %
_NUM_BINS = 4096  # up to 2 hours


class Histogram:
    """Counts of milliseconds; percentiles to 0.5 %, everything else exact."""

    def __init__(self) -> None:
        self._counts = np.zeros(_NUM_BINS, np.int64)
        self._total_ms = self._max_ms = 0.0
        self.late_frames = 0

    def add(self, seconds: float) -> None:
        """Count a frame."""
        ms = max(0.0, seconds * 1000.0)
        steps = np.log(max(ms, _LOWEST_MS) / _LOWEST_MS) / np.log(_RATIO)
        self._counts[min(round(float(steps)), _NUM_BINS - 1)] += 1
        self._total_ms += ms
        self._max_ms = max(self._max_ms, ms)
        self.late_frames += ms > FRAME_BUDGET_MS

    @property
    def count(self) -> int:
        """How many frames there were."""
        return int(self._counts.sum())

    def latency(self) -> Latency | None:
        """The summary; None without frames."""
        if not self.count:
            return None
        return Latency(
            p50=self._percentile(50),
            p95=self._percentile(95),
            p99=self._percentile(99),
            max=self._max_ms,
            mean=self._total_ms / self.count,
            late_frames=self.late_frames,
        )

    def _percentile(self, percent: float) -> float:
        wanted = percent / 100 * self.count
        bin_idx = int(np.searchsorted(np.cumsum(self._counts), wanted))
        return min(self._max_ms, _LOWEST_MS * _RATIO**bin_idx)
