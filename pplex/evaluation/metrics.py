"""The figures of recordings, in one table: a new one is an entry here, no more.

``pplex score`` makes its table, CSV and JSON of ``METRICS``, the report its columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from statistics import mean, median
from typing import Any

from pplex.evaluation.measure import Measured

Figure = float | dict[str, float] | None


def ratio(values: Sequence[tuple[float, float]]) -> float | None:
    """Parts over wholes: long recordings weigh more. None where the wholes are 0."""
    whole = sum(whole for _, whole in values)
    return sum(part for part, _ in values) / whole if whole else None


def spread(values: Sequence[Sequence[float]]) -> dict[str, float] | None:
    """How the occurrences in all recordings are spread; its median is what is shown."""
    ordered = sorted(value for several in values for value in several)
    if not ordered:
        return None
    return {
        "n": len(ordered),
        "mean": mean(ordered),
        "median": median(ordered),
        "p90": ordered[math.ceil(0.9 * len(ordered)) - 1],
        "min": ordered[0],
        "max": ordered[-1],
    }


@dataclass(frozen=True)
class Metric:
    """A figure of one recording, and of many together.

    ``value`` is given the field ``of`` of what was measured (of ``Measured`` itself if
    that is ""); without it the field's own ``name`` is taken. ``total`` makes the
    figure from the values of one recording or more. Shares have the unit ``%`` and are
    0 to 1 in JSON and CSV.

    Without a ``title`` it is in JSON only; ``table`` shows it in score's table, and
    ``about``, its explanation, in the report. Above ``limit`` something is wrong.
    ``better`` is 1 if more is better, -1 if less is, 0 if neither can be said; what is
    not ``compared`` belongs to the recordings, not to the answers.
    """

    name: str
    unit: str = ""
    title: str = ""
    of: str = ""
    value: Callable[[Any], Any] | None = None
    total: Callable[[Sequence[Any]], Figure] = sum
    digits: int = 0
    table: bool = True
    about: str = ""
    limit: float = math.inf
    better: int = 0
    compared: bool = True

    @property
    def heading(self) -> str:
        """What is written over it in a table."""
        return f"{self.title} {self.unit.strip('%')}".rstrip()

    @property
    def column(self) -> str:
        """Its name in a CSV file."""
        if self.total is not spread:
            return self.name
        return f"{self.name.removesuffix('_s')}_median_s"

    def of_all(self, recordings: Sequence[Measured]) -> Figure:
        """The figure of some recordings; None if none of them has what it takes."""
        known = [value for value in self.values(recordings) if value is not None]
        return self.total(known) if known else None

    def values(self, recordings: Sequence[Measured]) -> list[Any]:
        """What each recording gives ``total``, None where it has nothing."""
        parts = [getattr(one, self.of) if self.of else one for one in recordings]
        value = self.value or attrgetter(self.name)
        return [None if part is None else value(part) for part in parts]

    def text(self, figure: Figure) -> str:
        """The figure for people, without its unit unless that is ``%``."""
        value = single(figure)
        if value is None:
            return "-"
        if self.unit == "%":
            return f"{100 * value:.{self.digits}f}%"
        return f"{value:.{self.digits}f}"


def single(figure: Figure) -> float | None:
    """The number of a figure, of a spread its median."""
    return figure["median"] if isinstance(figure, dict) else figure


def figures(recordings: Sequence[Measured]) -> dict[str, dict[str, Figure]]:
    """Every figure of these recordings, by what it is of and its name."""
    found: dict[str, dict[str, Figure]] = {}
    for metric in METRICS:
        found.setdefault(metric.of, {})[metric.name] = metric.of_all(recordings)
    return found


def figure_of(metric: Metric, row: Mapping[str, Any]) -> Figure:
    """A metric's figure in a recording's or the total's part of a score's JSON.

    The total has its figures of turns not in a part of their own.
    """
    part = row.get(metric.of)
    if part is None and metric.of in ("", "turns"):
        part = row
    return part.get(metric.name) if part else None


def rounded(value: Any) -> Any:
    """Numbers to four digits after the point, None for what is not finite."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return value


def _rewards(delays_s: Sequence[float]) -> tuple[float, float]:
    """Minus the delays, none better than 0, and how many."""
    return -sum(max(0.0, delay) for delay in delays_s), len(delays_s)


def _real_time(stats: Mapping[str, Any]) -> tuple[float, float] | None:
    factor, audio_s = stats.get("real_time_factor"), stats.get("audio_s")
    if factor is None:
        return None
    audio_s = 1.0 if audio_s is None else audio_s
    return factor * audio_s, audio_s


METRICS: tuple[Metric, ...] = (
    Metric(
        "duration_s",
        "s",
        "length",
        digits=1,
        about="Of the recording and its answer",
        compared=False,
    ),
    Metric("user_turns", "", "turns", "turns", compared=False),
    Metric(
        "reply_delay_s",
        "s",
        "delay",
        "turns",
        attrgetter("reply_delays_s"),
        spread,
        digits=2,
        about="From the user's end to the reply, the median; people leave about 0.2 s",
        better=-1,
    ),
    Metric(
        "takeover_rate",
        "%",
        "taken",
        "turns",
        attrgetter("takeovers", "judged_turns"),
        ratio,
        about="Turns of the user after which the agent speaks, of all that leave it "
        "time to",
        better=1,
    ),
    Metric(
        "pauses_respected_rate",
        "%",
        "pauses kept",
        "turns",
        attrgetter("pauses_respected", "pauses"),
        ratio,
        about="Pauses within the user's turns in which the agent does not begin",
        better=1,
    ),
    Metric(
        "talk_over_s",
        "s",
        "talk-over",
        "turns",
        digits=1,
        about="Talking at once that the agent began, backchannels apart",
        better=-1,
    ),
    Metric(
        "agent_interruptions",
        "",
        "interrupts",
        "turns",
        about="Times the agent began while the user spoke",
        better=-1,
    ),
    Metric(
        "backchannels",
        "",
        "backch.",
        "turns",
        about="Short words inside the user's turn, such as mhm",
    ),
    Metric("overlap_s", "s", "overlap", "turns", digits=1),
    Metric("silence_s", "s", "silence", "turns", digits=1),
    Metric("user_interruptions", "", "interrupted", "turns"),
    Metric(
        "yield_s",
        "s",
        "yields",
        "turns",
        attrgetter("yields_s"),
        spread,
        digits=2,
        better=-1,
    ),
    Metric(
        "words",
        "",
        "words",
        value=lambda found: None if found.words is None else len(found.words),
        table=False,
        about="Words the agent said, by its own text",
    ),
    Metric(
        "said_nothing",
        "",
        "silent",
        "ending",
        value=lambda ending: int(not ending.words),
        table=False,
    ),
    Metric(
        "cut_off_at_end",
        "",
        "cut off",
        "ending",
        value=lambda ending: int(ending.cut_off),
        table=False,
    ),
    Metric(
        "word_error_rate",
        "%",
        "WER",
        "round_trip",
        attrgetter("errors", "words"),
        ratio,
        digits=1,
        better=-1,
    ),
    Metric(
        "speech_db",
        "dBFS",
        "loudness",
        "levels",
        total=mean,
        digits=1,
        table=False,
        about="Of the agent's speech, in dB below full scale (dBFS)",
    ),
    Metric(
        "clips",
        "",
        "clips",
        "levels",
        table=False,
        about="Stretches of the agent's sound at full scale, which distorts; 0 is good",
        limit=0.0,
        better=-1,
    ),
    Metric(
        "real_time_factor",
        "",
        "RTF",
        "stats",
        _real_time,
        ratio,
        digits=2,
        table=False,
        about="Computing time over audio time; below 1 is faster than real time",
        limit=1.0,
        compared=False,
    ),
    # What Kyutai's reinforcement learning of these models rewards (arXiv 2606.11167).
    Metric(
        "pause_reward",
        "",
        "pause reward",
        "turns",
        lambda turns: (-turns.pauses_talked_in, turns.pauses),
        ratio,
        digits=2,
        table=False,
        better=1,
    ),
    Metric(
        "turn_reward_s",
        "s",
        "turn reward",
        "turns",
        lambda turns: _rewards(turns.reply_delays_s),
        ratio,
        digits=2,
        table=False,
        better=1,
    ),
    Metric(
        "interruption_reward_s",
        "s",
        "interrupt reward",
        "turns",
        lambda turns: _rewards(turns.interruption_delays_s),
        ratio,
        digits=2,
        table=False,
        better=1,
    ),
    Metric(
        "backchannel_f1",
        "",
        "backchannel F1",
        "people",
        lambda people: (2 * people["matches"], people["backchannels"]),
        ratio,
        digits=2,
        table=False,
        better=1,
    ),
    *(
        Metric(
            name,
            "",
            f"MOS {name}",
            "mos",
            itemgetter(name),
            mean,
            digits=2,
            table=name == "overall",
            better=1,
        )
        for name in ("overall", "signal", "background", "p808")
    ),
    Metric("score", "", "judged 0-5", "verdict", total=mean, digits=1, better=1),
    Metric("user_speech_s", "s", of="turns"),
    Metric("agent_speech_s", "s", of="turns"),
    Metric("judged_turns", of="turns"),
    Metric("takeovers", of="turns"),
    Metric("pauses", of="turns"),
    Metric("pauses_respected", of="turns"),
    Metric(
        "backchannels_per_minute",
        of="turns",
        value=lambda turns: (turns.backchannels, turns.duration_s / 60),
        total=ratio,
    ),
    Metric(
        "yielded_rate",
        of="turns",
        value=lambda turns: (len(turns.yields_s), turns.user_interruptions),
        total=ratio,
    ),
    Metric("recordings", of="round_trip", value=lambda trip: 1),
    Metric("words", of="round_trip"),
    Metric("heard", of="round_trip"),
    Metric("substitutions", of="round_trip"),
    Metric("deletions", of="round_trip"),
    Metric("insertions", of="round_trip"),
)
