"""Who took the turn when: what happened between two tracks, as events and figures.

A user's turn is speech with no silence over ``max_pause_s`` in it; shorter silences are
pauses. The agent's speech is joined over gaps of ``agent_gap_s`` and each stretch is

* a backchannel: inside a user's turn, short and of few words;
* a reply: after a user's turn, or begun less than ``early_s`` before its end;
* a pause taken: begun in a pause of a turn that then goes on;
* an interruption: begun while the user speaks;
* an opening: before the user said anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pplex.evaluation.speech_activity import (
    TOLERANCE_S,
    Segment,
    common,
    gaps,
    merge,
    total_s,
)
from pplex.respond.transcript import Word

Kind = Literal[
    "opening",
    "reply",
    "speech",
    "backchannel",
    "pause_taken",
    "interruption",
    "user_interruption",
    "user_backchannel",
    "no_reply",
]
_TALKING_OVER = ("pause_taken", "interruption")


@dataclass(frozen=True)
class TurnSettings:
    """Limits in seconds and words; those of takeovers are Full-Duplex-Bench's."""

    max_pause_s: float = 1.0
    min_pause_s: float = 0.2
    agent_gap_s: float = 0.5
    early_s: float = 0.2
    backchannel_s: float = 1.0
    backchannel_words: int = 2
    takeover_s: float = 1.0
    takeover_words: int = 3
    user_backchannel_s: float = 1.0
    pause_speech_s: float = 1.0
    backchannel_apart_s: float = 1.0


@dataclass(frozen=True)
class Event:
    """Something one side did; ``value_s`` is a reply's delay or the time to yield."""

    kind: Kind
    start_s: float
    end_s: float
    text: str = ""
    value_s: float | None = None


@dataclass
class Turns:
    """What happened in one recording; a list has a value per occurrence.

    ``interruption_delays_s`` are those of ``reply_delays_s`` after turns with which the
    user interrupted; in ``pauses_talked_in`` speech of over ``pause_speech_s`` began.
    """

    duration_s: float
    user_speech_s: float = 0.0
    agent_speech_s: float = 0.0
    overlap_s: float = 0.0
    talk_over_s: float = 0.0
    silence_s: float = 0.0
    user_turns: int = 0
    judged_turns: int = 0
    takeovers: int = 0
    reply_delays_s: list[float] = field(default_factory=list)
    pauses: int = 0
    pauses_respected: int = 0
    pauses_talked_in: int = 0
    backchannels: int = 0
    agent_interruptions: int = 0
    user_interruptions: int = 0
    interruption_delays_s: list[float] = field(default_factory=list)
    yields_s: list[float] = field(default_factory=list)
    words: int | None = None
    events: list[Event] = field(default_factory=list)


def analyse(
    user: Sequence[Segment],
    agent: Sequence[Segment],
    words: Sequence[Word] | None,
    duration_s: float,
    settings: TurnSettings | None = None,
) -> Turns:
    """Judge two tracks by their speech segments and the agent's words, if known."""
    settings = settings or TurnSettings()
    turns = merge(user, settings.max_pause_s)
    speeches = merge(agent, settings.agent_gap_s)
    said = _words_by_speech(speeches, words)
    kinds = [
        _kind(
            speech, len(said[i]) if words is not None else None, user, turns, settings
        )
        for i, speech in enumerate(speeches)
    ]
    result = Turns(
        duration_s=duration_s,
        user_speech_s=total_s(user),
        agent_speech_s=total_s(agent),
        overlap_s=total_s(common(user, agent)),
        user_turns=len(turns),
        words=None if words is None else len(words),
    )
    result.silence_s = max(0.0, duration_s - total_s(merge([*user, *agent], 0.0)))
    for kind, speech, spoken in zip(kinds, speeches, said, strict=True):
        text = " ".join(word.text for word in spoken)
        if kind in _TALKING_OVER:
            inside = [s for s in agent if s.overlap_s(speech) > 0]
            result.talk_over_s += total_s(common(user, inside))
        result.backchannels += kind == "backchannel"
        result.agent_interruptions += kind == "interruption"
        result.events.append(Event(kind, speech.start_s, speech.end_s, text))
    _judge_replies(result, turns, agent, speeches, kinds, said, words, settings)
    talk = [s for s, kind in zip(speeches, kinds, strict=True) if kind != "backchannel"]
    _judge_pauses(result, user, turns, talk, settings)
    _judge_yields(result, turns, talk, settings)
    result.events.sort(key=lambda event: (event.start_s, event.end_s))
    return result


def _words_by_speech(
    speeches: Sequence[Segment], words: Sequence[Word] | None
) -> list[list[Word]]:
    """Give each word to the stretch of speech it is nearest to."""
    said: list[list[Word]] = [[] for _ in speeches]
    for word in words or ():
        middle = (word.start_s + word.end_s) / 2
        away = [max(s.start_s - middle, middle - s.end_s, 0.0) for s in speeches]
        if away and min(away) <= 0.5:
            said[away.index(min(away))].append(word)
    return said


def _kind(
    speech: Segment,
    num_words: int | None,
    user: Sequence[Segment],
    turns: Sequence[Segment],
    settings: TurnSettings,
) -> Kind:
    host = next((t for t in turns if t.start_s <= speech.start_s < t.end_s), None)
    if host is None:
        before = [t for t in turns if t.end_s <= speech.start_s]
        return "speech" if before else "opening"
    if host.end_s - speech.start_s <= settings.early_s + TOLERANCE_S:
        return "speech"
    short = speech.duration_s < settings.backchannel_s
    if short and (num_words is None or num_words <= settings.backchannel_words):
        return "backchannel"
    talking = any(s.start_s <= speech.start_s < s.end_s for s in user)
    return "interruption" if talking else "pause_taken"


def _judge_replies(
    result: Turns,
    turns: Sequence[Segment],
    agent: Sequence[Segment],
    speeches: Sequence[Segment],
    kinds: list[Kind],
    said: Sequence[Sequence[Word]],
    words: Sequence[Word] | None,
    settings: TurnSettings,
) -> None:
    """Takeover and delay after each turn of the user."""
    for k, turn in enumerate(turns):
        last = k + 1 == len(turns)
        until = result.duration_s if last else turns[k + 1].start_s
        window = Segment(turn.end_s, max(turn.end_s, until))
        first = next(
            (
                i
                for i, (s, kind) in enumerate(zip(speeches, kinds, strict=True))
                if kind == "speech"
                and turn.end_s - settings.early_s - TOLERANCE_S <= s.start_s < until
            ),
            None,
        )
        spoken = [
            i
            for i, (s, kind) in enumerate(zip(speeches, kinds, strict=True))
            if kind != "backchannel" and s.overlap_s(window) > 0
        ]
        if not spoken and last and window.duration_s < settings.max_pause_s:
            continue  # the recording ends too soon to tell
        result.judged_turns += 1
        if first is not None:
            delay = speeches[first].start_s - turn.end_s
            result.reply_delays_s.append(delay)
            before = [
                s
                for s, kind in zip(speeches, kinds, strict=True)
                if kind != "backchannel"
            ]
            if _cut_into(turn, before, settings) and not _is_short(turn, settings):
                result.interruption_delays_s.append(delay)
            kinds[first] = "reply"
            _rename_reply(result, speeches[first], delay)
        if spoken:
            result.takeovers += _takes_over(
                [s for s in agent if s.overlap_s(window) > 0],
                sum(len(said[i]) for i in spoken) if words is not None else None,
                settings,
            )
        else:
            result.events.append(Event("no_reply", turn.end_s, until))


def _rename_reply(result: Turns, speech: Segment, delay_s: float) -> None:
    for i, event in enumerate(result.events):
        if event.start_s == speech.start_s and event.kind == "speech":
            result.events[i] = Event(
                "reply", event.start_s, event.end_s, event.text, delay_s
            )


def _takes_over(
    spoken: Sequence[Segment], num_words: int | None, settings: TurnSettings
) -> bool:
    """Full-Duplex-Bench's rule: short and of few words is no takeover."""
    if not spoken:
        return False
    if spoken[-1].end_s - spoken[0].start_s >= settings.takeover_s:
        return True
    return num_words is not None and num_words > settings.takeover_words


def _judge_pauses(
    result: Turns,
    user: Sequence[Segment],
    turns: Sequence[Segment],
    talk: Sequence[Segment],
    settings: TurnSettings,
) -> None:
    """Pauses that begin while the agent speaks are not judged."""
    for turn in turns:
        for pause in gaps([s for s in user if s.overlap_s(turn) > 0]):
            if pause.duration_s < settings.min_pause_s - TOLERANCE_S:
                continue
            if any(s.start_s < pause.start_s < s.end_s for s in talk):
                continue
            result.pauses += 1
            begun = [s for s in talk if pause.start_s <= s.start_s < pause.end_s]
            result.pauses_respected += not begun
            result.pauses_talked_in += any(
                s.duration_s > settings.pause_speech_s for s in begun
            )


def _judge_yields(
    result: Turns,
    turns: Sequence[Segment],
    talk: Sequence[Segment],
    settings: TurnSettings,
) -> None:
    """Turns of the user that begin while the agent speaks."""
    for turn in turns:
        for speech in _cut_into(turn, talk, settings):
            over_s = speech.end_s - turn.start_s
            if _is_short(turn, settings):
                result.events.append(
                    Event("user_backchannel", turn.start_s, turn.end_s)
                )
                continue
            result.user_interruptions += 1
            yielded = speech.end_s <= turn.end_s + TOLERANCE_S
            if yielded:
                result.yields_s.append(over_s)
            result.events.append(
                Event(
                    "user_interruption",
                    turn.start_s,
                    turn.end_s,
                    value_s=over_s if yielded else None,
                )
            )


def _cut_into(
    turn: Segment, talk: Sequence[Segment], settings: TurnSettings
) -> list[Segment]:
    """The agent's speech that is under way, and goes on, as a turn begins."""
    return [
        speech
        for speech in talk
        if speech.start_s < turn.start_s < speech.end_s
        and speech.end_s - turn.start_s > settings.early_s + TOLERANCE_S
    ]


def _is_short(turn: Segment, settings: TurnSettings) -> bool:
    """Whether a turn is a backchannel of the user."""
    return turn.duration_s < settings.user_backchannel_s


def matching_backchannels(
    agent: Sequence[Segment],
    human: Sequence[Segment],
    settings: TurnSettings | None = None,
) -> tuple[int, int]:
    """Short stretches of both that begin close together, one to one; all of both.

    Twice the first over the second is their F1.
    """
    settings = settings or TurnSettings()
    ours, theirs = (
        [
            s.start_s
            for s in merge(side, settings.agent_gap_s)
            if s.duration_s <= settings.backchannel_s
        ]
        for side in (agent, human)
    )
    matches = i = j = 0
    while i < len(ours) and j < len(theirs):
        if abs(ours[i] - theirs[j]) <= settings.backchannel_apart_s + TOLERANCE_S:
            matches, i, j = matches + 1, i + 1, j + 1
        elif ours[i] < theirs[j]:
            i += 1
        else:
            j += 1
    return matches, len(ours) + len(theirs)
