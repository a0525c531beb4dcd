"""Two sets of answers compared: every figure of both, what lies between, a verdict.

Recordings are what is drawn at random, not turns: turns of one recording resemble each
other. Intervals are bootstrapped over recordings (bias-corrected and accelerated), a
verdict comes from a permutation test, whose p-values are corrected for the number of
figures by Holm, so that two sets without a difference get a verdict on any figure in
one comparison of twenty. Both are SciPy's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np

from pplex.errors import PplexError
from pplex.evaluation.measure import Measured
from pplex.evaluation.metrics import METRICS, Figure, Metric, ratio, spread
from pplex.plots import BLUE, GREY, ORANGE, plot, shortened

_CONFIDENCE = 0.95
_RESAMPLES = 2000
_PERMUTATIONS = 4999
_LEAST = 3  # recordings; fewer have no interval
_SEED = 0
_BATCH = 250  # draws at a time, which bounds the memory

_Total = Callable[[np.ndarray], np.ndarray]

Verdict = Literal["better", "worse", "higher", "lower", "no difference shown", "-"]


@dataclass(frozen=True)
class Difference:
    """One figure of A and of B, and A minus B with its interval.

    ``p`` is corrected for the number of figures. Without an interval there was too
    little to compare: ``recordings`` counts those (pairs, if paired) that have it.
    Figures that are sums are means per recording here.
    """

    name: str
    of: str
    unit: str
    heading: str
    recordings: int
    a: float | None
    b: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    verdict: Verdict = "-"

    @property
    def better(self) -> int:
        """1 if more is better, -1 if less is, 0 if neither can be said."""
        names = ((m.of, m.name, m.better) for m in METRICS)
        return next(b for of, name, b in names if (of, name) == (self.of, self.name))


@dataclass(frozen=True)
class Against:
    """A comparison; ``only_a`` and ``only_b`` are recordings that have no partner."""

    paired: bool
    recordings: tuple[int, int]
    only_a: list[str]
    only_b: list[str]
    warnings: list[str]
    differences: list[Difference]

    @property
    def worse(self) -> list[Difference]:
        """The figures in which A is worse."""
        return [one for one in self.differences if one.verdict == "worse"]

    def as_json(self) -> dict[str, Any]:
        """Everything, with the method."""
        return {"method": METHOD, **asdict(self)}


METHOD = (
    f"A minus B; sums are means per recording. Intervals of {100 * _CONFIDENCE:.0f} %: "
    f"BCa bootstrap over recordings, {_RESAMPLES} resamples. Verdicts: permutation "
    f"test over recordings, {_PERMUTATIONS} permutations, p by Holm over all figures, "
    f"below {1 - _CONFIDENCE:.2f}."
)


def compare_sets(a: Mapping[str, Measured], b: Mapping[str, Measured]) -> Against:
    """Compare recordings by name; if no name is in both, the sets as wholes."""
    names = sorted(a.keys() & b.keys())
    paired = bool(names)
    of_a = [a[name] for name in (names or sorted(a))]
    of_b = [b[name] for name in (names or sorted(b))]
    found = [
        _difference(metric, of_a, of_b, paired)
        for metric in METRICS
        if metric.title and metric.compared
    ]
    return Against(
        paired,
        (len(of_a), len(of_b)),
        sorted(a.keys() - b.keys()) if paired else [],
        sorted(b.keys() - a.keys()) if paired else [],
        _unlike(of_a, of_b),
        _judged([one for one in found if one is not None]),
    )


def without_folder(
    measured: Mapping[str, Measured], folders: Sequence[Path]
) -> dict[str, Measured]:
    """Recordings by their names in the one folder that was given.

    Names of a benchmark's samples begin with the folder's, which differs in A and B.
    """
    if len(folders) != 1:
        return dict(measured)
    start = f"{folders[0].resolve().name}/"
    return {name.removeprefix(start): one for name, one in measured.items()}


def _unlike(a: Sequence[Measured], b: Sequence[Measured]) -> list[str]:
    """What makes the figures of both sides unlike though nothing else differs."""
    sources = [sorted({one.words_from for one in side}) for side in (a, b)]
    if sources[0] == sources[1]:
        return []
    ours, theirs = (" and ".join(source) or "none" for source in sources)
    return [
        f"words come from {ours} in A and from {theirs} in B, which changes takeovers, "
        "backchannels and word counts; --words takes one source for both"
    ]


def _difference(
    metric: Metric, a: Sequence[Measured], b: Sequence[Measured], paired: bool
) -> Difference | None:
    """A figure of both sets, its test not yet corrected; None where nobody has it."""
    values = [metric.values(side) for side in (a, b)]
    if paired:
        both = [
            pair
            for pair in zip(*values, strict=True)
            if all(_known(metric, value) for value in pair)
        ]
        values = [[x for x, _ in both], [y for _, y in both]]
    else:
        values = [[v for v in side if _known(metric, v)] for side in values]
    if not values[0] and not values[1]:
        return None
    total = _TOTALS[metric.total](values[0] + values[1])
    places = np.split(np.arange(sum(map(len, values))), [len(values[0])])
    of_a, of_b = (float(total(side)) if len(side) else None for side in places)
    head = (metric.name, metric.of, metric.unit, metric.heading)
    few = min(map(len, values))
    if of_a is None or of_b is None or few < _LEAST:
        return Difference(*head, few, of_a, of_b)
    low, high, p = _interval_and_p(total, places[0], places[1], paired)
    return Difference(*head, few, of_a, of_b, of_a - of_b, low, high, p)


def _known(metric: Metric, value: Any) -> bool:
    return value is not None and metric.total([value]) is not None


def _mean(values: Sequence[float]) -> _Total:
    known = np.array(values, float)
    return lambda drawn: known[drawn].mean(-1)


def _ratio(values: Sequence[tuple[float, float]]) -> _Total:
    parts, wholes = np.array(values, float).T
    return lambda drawn: parts[drawn].sum(-1) / wholes[drawn].sum(-1)


def _median(values: Sequence[Sequence[float]]) -> _Total:
    known = np.full((len(values), max(map(len, values))), np.inf)
    for row, several in zip(known, values, strict=True):
        row[: len(several)] = several
    lengths = np.isfinite(known).sum(-1)

    def median(drawn: np.ndarray) -> np.ndarray:
        ordered = np.sort(known[drawn].reshape(*drawn.shape[:-1], -1), axis=-1)
        count = lengths[drawn].sum(-1)[..., None]
        middle = [(count - 1) // 2, count // 2]
        pair = [np.take_along_axis(ordered, places, -1) for places in middle]
        return np.mean(pair, axis=0)[..., 0]

    return median


# What is compared of a metric that is totalled so, given values once and then many
# draws of recordings (..., recordings): of sums their mean.
_TOTALS: dict[Callable[[Sequence[Any]], Figure], Callable[[Sequence[Any]], _Total]] = {
    sum: _mean,
    mean: _mean,
    ratio: _ratio,
    spread: _median,
}


def _interval_and_p(
    total: _Total, a: np.ndarray, b: np.ndarray, paired: bool
) -> tuple[float, float, float]:
    """Bootstrap interval of A minus B, and the p-value of there being none."""
    try:
        from scipy import stats
    except ImportError as e:
        raise PplexError("comparing needs SciPy: install pplex[score]") from e

    def shift(left: np.ndarray, right: np.ndarray, axis: int = -1) -> np.ndarray:
        return total(left) - total(right)

    def of_pairs(pairs: np.ndarray, axis: int = -1) -> np.ndarray:
        return shift(pairs, pairs + len(a))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all resamples alike: no interval, seen below
        found = stats.bootstrap(
            (a,) if paired else (a, b),
            of_pairs if paired else shift,
            n_resamples=_RESAMPLES,
            batch=_BATCH,
            confidence_level=_CONFIDENCE,
            vectorized=True,
            rng=np.random.default_rng(_SEED),
        )
    low, high = (float(edge) for edge in found.confidence_interval)
    if np.isnan(low) or np.isnan(high):
        edges = (1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2
        low, high = map(float, np.quantile(found.bootstrap_distribution, edges))
    test = stats.permutation_test(
        (a, b),
        shift,
        permutation_type="samples" if paired else "independent",
        n_resamples=_PERMUTATIONS,
        batch=_BATCH,
        vectorized=True,
        rng=np.random.default_rng(_SEED),
    )
    return low, high, float(test.pvalue)


def _judged(found: Sequence[Difference]) -> list[Difference]:
    """The differences with corrected p-values and verdicts."""
    tested = sorted(
        (i for i, one in enumerate(found) if one.p is not None),
        key=lambda i: found[i].p or 0.0,
    )
    judged, least = list(found), 0.0
    for rank, idx in enumerate(tested):
        one = found[idx]
        least = min(1.0, max(least, (one.p or 0.0) * (len(tested) - rank)))
        judged[idx] = replace(one, p=least, verdict=_verdict(one, least))
    return judged


def _verdict(one: Difference, p: float) -> Verdict:
    if p >= 1 - _CONFIDENCE or not one.difference:
        return "no difference shown"
    if not one.better:
        return "higher" if one.difference > 0 else "lower"
    return "better" if one.difference * one.better > 0 else "worse"


def plot_differences(path: Path, found: Against, names: tuple[str, str]) -> None:
    """A row a figure: A minus B and its interval, each on a scale of its own.

    Figures that are the same everywhere have none.
    """
    rows = [one for one in found.differences if one.low != one.high]
    with plot(path, 7.5, 1.2 + 0.75 * max(1, len(rows))) as figure:
        a, b = (shortened(name, 40) for name in names)
        pairs = "pairs" if found.paired else "recordings"
        figure.suptitle(
            f"{a} minus {b}\n{min(found.recordings)} {pairs}, "
            f"{100 * _CONFIDENCE:.0f} % intervals"
            + ("" if rows else "\nNo figure differs in any of them."),
            x=0.02,
            ha="left",
        )
        for idx, one in enumerate(rows):
            axes = figure.add_subplot(len(rows), 1, idx + 1)
            scale = 100 if one.unit == "%" else 1
            assert one.low is not None and one.high is not None
            assert one.difference is not None
            sure = one.verdict not in ("-", "no difference shown")
            colour = {"worse": ORANGE}.get(one.verdict, BLUE if sure else GREY)
            axes.axvline(0, color=GREY, lw=1)
            axes.plot([scale * one.low, scale * one.high], [0, 0], color=colour, lw=3)
            axes.plot([scale * one.difference], [0], "o", color=colour)
            axes.set_yticks([])
            axes.grid(visible=False, axis="y")
            unit = {"%": " (points)", "": ""}.get(one.unit, f" ({one.unit})")
            good = {1: ", more is better", -1: ", less is better"}.get(one.better, "")
            name = one.heading.removesuffix(f" {one.unit}")
            title = f"{name}{unit}{good}: {one.verdict}"
            axes.set_title(title, fontsize="small")
            axes.margins(x=0.1, y=0.5)
