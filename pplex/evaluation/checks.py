"""Checks of an output for scripts: each passes or fails, with its reason in a line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pplex.audio.files import read_pcm, resampled_length
from pplex.errors import PplexError
from pplex.evaluation.find import SAMPLE_RATE, Item, Track, find, read_stats
from pplex.evaluation.measure import SILENT_DB, decibels, measure_levels
from pplex.respond.stats import Outcome
from pplex.respond.transcript import Word

# A speaking agent is at least this loud in its loudest tenth of a second.
_LOUD_S = 0.1


@dataclass(frozen=True)
class Checks:
    """What to check; what is None or False is not asked about.

    ``max_late_frames`` is a percentage of the frames; ``length_of`` and ``says`` are
    a recording and a regular expression. ``input_length`` asks that an answer is as
    long as the recording it answers.
    """

    not_silent: bool = False
    no_clipping: bool = False
    max_rtf: float | None = None
    max_late_frames: float | None = None
    length_of: Path | None = None
    says: str | None = None
    input_length: bool = False

    def asked(self) -> dict[str, Any]:
        """What is asked, as JSON."""
        asked = {
            k: v for k, v in asdict(self).items() if v is not None and v is not False
        }
        return {k: str(v) if isinstance(v, Path) else v for k, v in asked.items()}

    def __call__(
        self,
        source: Path,
        files: dict[str, Path],
        figures: Mapping[str, Any],
        words: Sequence[Word] | None,
    ) -> list[Outcome]:
        """Check the answer to ``source`` that was written to ``files``."""
        checks = replace(self, length_of=source) if self.input_length else self
        audio = files.get("agent") or files["audio"]
        return run_checks(audio, checks, figures, words)


def run_checks(
    audio: Path,
    checks: Checks,
    stats: Path | Mapping[str, Any] | None = None,
    words: Sequence[Word] | str | None = None,
) -> list[Outcome]:
    """Check an output; that it can be read is always checked first.

    ``audio`` is stereo or the agent alone. ``stats`` is a file, or the figures as
    ``asdict(Stats)`` has them; ``words`` is what the agent said. What of them is not
    given is looked for beside the output. A check whose figures are nowhere to
    be found fails.
    """
    item, notes = _item(audio)
    if item.agent is None:
        return [Outcome("readable", False, item.error or f"{audio} cannot be read")]
    try:
        pcm = item.agent.read()
    except PplexError as e:
        return [Outcome("readable", False, str(e))]
    seconds = len(pcm) / SAMPLE_RATE
    found = [Outcome("readable", True, f"{seconds:.2f} s")]
    if isinstance(stats, Path):
        figures = read_stats(stats)
    else:
        figures = {**(item.stats or {}), **(stats or {})}
    if checks.not_silent:
        found.append(_not_silent(pcm))
    if checks.no_clipping:
        levels = measure_levels(pcm, SAMPLE_RATE)
        where = "" if levels.first_clip_s is None else f", {levels.first_clip_s:.2f} s"
        detail = f"{levels.clips} clipped stretches{where}, peak {levels.peak_db:.1f}"
        found.append(Outcome("no-clipping", not levels.clips, f"{detail} dB"))
    if checks.length_of is not None:
        found.append(_length(item.agent, checks.length_of, figures))
    if checks.max_rtf is not None:
        found.append(_rtf(figures, checks.max_rtf, notes))
    if checks.max_late_frames is not None:
        found.append(_late(figures, checks.max_late_frames, notes))
    if checks.says is not None:
        said = words if words is not None else item.words
        if said is not None and not isinstance(said, str):
            said = " ".join(word.text for word in said)
        found.append(_says(said, checks.says, notes))
    return found


def passed(outcomes: Sequence[Outcome]) -> bool:
    """Whether every check passed."""
    return all(outcome.passed for outcome in outcomes)


def _item(audio: Path) -> tuple[Item, list[str]]:
    """The output, and what is to be said of the files beside it."""
    if not audio.exists():
        agent = audio.with_suffix(".agent.wav")
        if not agent.exists():
            return Item(audio.name, "missing", f"{audio} does not exist"), []
        audio = agent
    if audio.is_dir():
        raise PplexError(f"{audio} is a folder; give one output in it")
    found = find([audio])
    return found.items[0], found.notes


def _not_silent(pcm: Any) -> Outcome:
    block = round(_LOUD_S * SAMPLE_RATE)
    power = [float((pcm[i : i + block] ** 2).mean()) for i in range(0, len(pcm), block)]
    level = decibels(max(power, default=0.0) ** 0.5)
    return Outcome(
        "not-silent",
        level > SILENT_DB,
        f"the agent's loudest 0.1 s is at {level:.1f} dB; {SILENT_DB:.0f} is silence",
    )


def _length(agent: Track, source: Path, stats: dict[str, Any] | None) -> Outcome:
    """Same length after resampling, plus the tail where stats know of one."""
    ours = read_pcm(
        agent.path, sample_rate=SAMPLE_RATE, channel=agent.channel, most_kept=0
    )
    theirs = read_pcm(source, sample_rate=SAMPLE_RATE, most_kept=0)
    tail_s = (stats or {}).get("tail_s") or 0.0
    rate = ours.source_rate
    wanted = resampled_length(theirs.source_frames, theirs.source_rate, rate)
    wanted += round(tail_s * rate)
    tail = f" with a tail of {tail_s:g} s" if tail_s else ""
    return Outcome(
        "length-of",
        ours.source_frames == wanted,
        f"{ours.source_frames} samples at {rate} Hz; {source.name}{tail} makes "
        f"{wanted}",
    )


def _rtf(stats: dict[str, Any] | None, limit: float, notes: list[str]) -> Outcome:
    value = (stats or {}).get("real_time_factor")
    if value is None:
        return Outcome("max-rtf", False, "; ".join([_NO_STATS, *notes]))
    detail = f"real-time factor {value:.3f}, at most {limit:g}"
    return Outcome("max-rtf", value <= limit, detail)


def _late(stats: dict[str, Any] | None, limit: float, notes: list[str]) -> Outcome:
    late = ((stats or {}).get("step_ms") or {}).get("late_frames")
    frames = (stats or {}).get("frames")
    if late is None or not frames:
        return Outcome("max-late-frames", False, "; ".join([_NO_STATS, *notes]))
    share = 100 * late / frames
    return Outcome(
        "max-late-frames",
        share <= limit,
        f"{late:.0f} of {frames:.0f} frames over 80 ms, {share:.2f} %; at most "
        f"{limit:g} %",
    )


def _says(said: str | None, pattern: str, notes: list[str]) -> Outcome:
    if said is None:
        missing = "no transcript: write one with --transcript NAME.json"
        return Outcome("says", False, "; ".join([missing, *notes]))
    shown = said if len(said) <= 200 else said[:197] + "..."
    hit = re.search(pattern, said, re.IGNORECASE)
    return Outcome("says", hit is not None, f'/{pattern}/ in "{shown}"')


_NO_STATS = "no stats: give --stats, or write them beside the output"
