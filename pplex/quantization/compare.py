"""How far one model's choices lie from another's, on the same conversation.

Both read the same tokens, so a difference is that of the weights and not of a
conversation that went another way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pplex.engine.base import FORCED_FRAMES, Engine, Logits
from pplex.errors import PplexError
from pplex.model.sampling import SamplingConfig, largest
from pplex.quantization.forced import Script, forced_logits

DEPTH_FRAMES = 12 * FORCED_FRAMES  # half a minute of a conversation


@dataclass(frozen=True)
class StreamFigures:
    """One stream over all frames.

    ``kl`` is the mean divergence of B from A in nats, ``top1`` the share of frames
    with the same likeliest token, ``differ`` the share of frames whose sampled token
    differs even if both draw with the same luck (half the L1 distance of what is drawn
    from), ``perplexity_a`` and ``perplexity_b`` those of A's own tokens.
    """

    stream: str
    kl: float
    top1: float
    differ: float
    perplexity_a: float
    perplexity_b: float


def keep_logits(engine: Engine, script: Script) -> list[Logits]:
    """What a model says of ``script``, stretch by stretch, so that it can be freed."""
    return [logits for logits, _ in forced_logits(engine, script)]


class Tally:
    """Sums of the figures over frames, a row a stream: text, agent codebooks."""

    def __init__(self, sampling: SamplingConfig) -> None:
        """``sampling`` is how tokens would be drawn."""
        self._sampling = sampling
        self._sums: np.ndarray | float = 0.0
        self.num_frames = 0

    def add(self, ours: Logits, other: Logits, targets: np.ndarray) -> None:
        """Count A's logits, and B's ``other`` for the same frames.

        ``targets`` (frames, streams) are the tokens that A chose.
        """
        s = self._sampling
        pairs = [(ours.text, other.text, s.text_temp, s.text_top_k)]
        for idx in range(ours.agent.shape[1]):
            pairs.append((ours.agent[:, idx], other.agent[:, idx], s.temp, s.top_k))
        rows = [
            _sums(mx.array(a), mx.array(b), mx.array(targets[:, idx]), temp, top_k)
            for idx, (a, b, temp, top_k) in enumerate(pairs)
        ]
        self._sums = self._sums + np.array(mx.stack(rows))
        self.num_frames += len(ours.text)

    def __add__(self, other: Tally) -> Tally:
        """The frames of both."""
        both = Tally(self._sampling)
        both._sums = self._sums + other._sums
        both.num_frames = self.num_frames + other.num_frames
        return both

    def figures(self) -> list[StreamFigures]:
        """The figures of each stream."""
        if not self.num_frames:
            raise PplexError("nothing to compare: the recordings are under two frames")
        figures = []
        for idx, row in enumerate(np.atleast_2d(self._sums) / self.num_frames):
            kl, top1, differ, nll_a, nll_b = (max(0.0, float(v)) for v in row)
            name = f"agent {idx}" if idx else "text"
            figures.append(
                StreamFigures(
                    name, kl, top1, differ, float(np.exp(nll_a)), float(np.exp(nll_b))
                )
            )
        return figures


def _sums(
    a: mx.array, b: mx.array, targets: mx.array, temp: float, top_k: int
) -> mx.array:
    """Sums over the frames of logits (frames, card): the columns of ``Tally``."""
    log_a = a - mx.logsumexp(a, axis=-1, keepdims=True)
    log_b = b - mx.logsumexp(b, axis=-1, keepdims=True)
    kl = (mx.exp(log_a) * (log_a - log_b)).sum()
    top1 = (mx.argmax(a, axis=-1) == mx.argmax(b, axis=-1)).sum()
    drawn = mx.abs(_drawn_from(a, temp, top_k) - _drawn_from(b, temp, top_k))
    chosen = targets[:, None]
    nll_a = -mx.take_along_axis(log_a, chosen, axis=-1).sum()
    nll_b = -mx.take_along_axis(log_b, chosen, axis=-1).sum()
    values = [kl, top1, 0.5 * drawn.sum(), nll_a, nll_b]
    return mx.stack([value.astype(mx.float32) for value in values])


def _drawn_from(logits: mx.array, temp: float, top_k: int) -> mx.array:
    """The probabilities that ids are drawn with."""
    if temp == 0:
        ids = mx.arange(logits.shape[-1])
        return (ids == mx.argmax(logits, axis=-1, keepdims=True)).astype(mx.float32)
    if 0 < top_k < logits.shape[-1]:
        logits = mx.where(largest(logits, top_k), logits, -mx.inf)
    return mx.softmax(logits / temp, axis=-1)


def compare(
    kept: Sequence[Sequence[Logits]],
    engine: Engine,
    scripts: Iterable[Script],
    sampling: SamplingConfig,
) -> list[StreamFigures]:
    """B's figures against what was kept of A, over all ``scripts``."""
    depths = compare_by_depth(kept, engine, scripts, sampling)
    return sum(depths, Tally(sampling)).figures()


def compare_by_depth(
    kept: Sequence[Sequence[Logits]],
    engine: Engine,
    scripts: Iterable[Script],
    sampling: SamplingConfig,
) -> list[Tally]:
    """The same for each ``DEPTH_FRAMES`` of the conversations, from their start on."""
    depths: list[Tally] = []
    for ours, script in zip(kept, scripts, strict=True):
        stretches = zip(ours, forced_logits(engine, script), strict=True)
        for number, (logits, (other, targets)) in enumerate(stretches):
            depth = number * FORCED_FRAMES // DEPTH_FRAMES
            if depth == len(depths):
                depths.append(Tally(sampling))
            depths[depth].add(logits, other, targets)
    return depths


def mean_kl(figures: Iterable[StreamFigures]) -> float:
    """The mean over the streams, text and codebooks alike."""
    return float(np.mean([figure.kl for figure in figures]))
