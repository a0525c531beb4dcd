"""Turn-taking of dialogues whose times are known."""

from __future__ import annotations

import pytest

from pplex.evaluation.speech_activity import Segment, common, gaps, merge, total_s
from pplex.evaluation.turns import Turns, analyse, matching_backchannels
from pplex.respond.transcript import Word


def segments(*times: tuple[float, float]) -> list[Segment]:
    return [Segment(start, end) for start, end in times]


def words(*times: tuple[float, float]) -> list[Word]:
    return [Word("word", start, end, 0) for start, end in times]


def kinds(turns: Turns) -> list[str]:
    return [event.kind for event in turns.events]


def test_segments_join_over_gaps_up_to_a_limit():
    assert merge(segments((2, 3), (0, 1), (1.5, 1.9)), 0.5) == segments((0, 3))
    assert merge(segments((0, 1), (1.6, 2)), 0.5) == segments((0, 1), (1.6, 2))
    assert gaps(segments((0, 1), (1.6, 2))) == segments((1, 1.6))
    assert common(segments((0, 2), (3, 5)), segments((1, 4))) == segments(
        (1, 2), (3, 4)
    )
    assert total_s(segments((0, 1), (3, 5))) == 3


def test_a_reply_is_timed_from_the_users_end():
    turns = analyse(segments((1, 3)), segments((3.4, 6)), None, 8)
    assert kinds(turns) == ["reply"]
    assert turns.reply_delays_s == [pytest.approx(0.4)]
    assert (turns.judged_turns, turns.takeovers) == (1, 1)


def test_a_reply_may_begin_just_before_the_users_end():
    turns = analyse(segments((1, 3)), segments((2.9, 6)), None, 8)
    assert kinds(turns) == ["reply"]
    assert turns.reply_delays_s == [pytest.approx(-0.1)]
    assert turns.agent_interruptions == 0


def test_no_reply_is_said_unless_the_recording_ends():
    silent = analyse(segments((1, 3)), [], None, 8)
    assert kinds(silent) == ["no_reply"]
    assert (silent.judged_turns, silent.takeovers) == (1, 0)
    assert analyse(segments((1, 3)), [], None, 3.5).judged_turns == 0


def test_a_short_answer_of_few_words_is_a_reply_but_no_takeover():
    short = segments((3.4, 3.9))
    assert analyse(segments((1, 3)), short, words((3.4, 3.8)), 8).takeovers == 0
    many = words((3.4, 3.5), (3.5, 3.6), (3.6, 3.7), (3.7, 3.9))
    turns = analyse(segments((1, 3)), short, many, 8)
    assert turns.takeovers == 1 and len(turns.reply_delays_s) == 1


def test_a_backchannel_is_short_and_inside_a_turn():
    user = segments((1, 3), (3.6, 5))
    turns = analyse(user, segments((3.1, 3.5)), words((3.1, 3.4)), 9)
    assert kinds(turns) == ["backchannel", "no_reply"]
    assert (turns.pauses, turns.pauses_respected) == (1, 1)
    three = words((3.1, 3.2), (3.2, 3.3), (3.3, 3.4))
    assert analyse(user, segments((3.1, 3.5)), three, 9).backchannels == 0


def test_speech_begun_in_a_pause_takes_it():
    turns = analyse(segments((1, 3), (3.8, 6)), segments((3.3, 5)), None, 9)
    assert kinds(turns)[0] == "pause_taken"
    assert (turns.pauses, turns.pauses_respected) == (1, 0)
    assert turns.talk_over_s == pytest.approx(1.2)
    assert turns.overlap_s == pytest.approx(1.2)


def test_a_pause_that_begins_under_the_agents_speech_is_not_judged():
    turns = analyse(segments((1, 3), (3.8, 6)), segments((2, 5)), None, 9)
    assert turns.pauses == 0 and turns.agent_interruptions == 1


def test_a_silence_over_a_second_ends_the_turn():
    turns = analyse(segments((1, 3), (4.2, 6)), segments((3.3, 4)), None, 9)
    assert turns.user_turns == 2 and turns.pauses == 0
    assert turns.reply_delays_s == [pytest.approx(0.3)]


def test_speech_begun_while_the_user_speaks_interrupts():
    turns = analyse(segments((1, 4)), segments((2, 5)), None, 9)
    assert kinds(turns) == ["interruption"]
    assert turns.agent_interruptions == 1
    assert turns.talk_over_s == pytest.approx(2)
    assert (turns.judged_turns, turns.takeovers) == (1, 1)


def test_an_agent_that_is_interrupted_yields():
    turns = analyse(segments((0, 1), (4, 6)), segments((1.3, 4.5)), None, 9)
    assert turns.user_interruptions == 1
    assert turns.yields_s == [pytest.approx(0.5)]
    assert turns.talk_over_s == 0 and turns.overlap_s == pytest.approx(0.5)


def test_an_agent_that_talks_on_does_not_yield():
    turns = analyse(segments((0, 1), (4, 6)), segments((1.3, 7)), None, 9)
    assert turns.user_interruptions == 1 and turns.yields_s == []


def test_a_short_word_of_the_user_is_no_interruption():
    turns = analyse(segments((0, 1), (4, 4.4)), segments((1.3, 7)), None, 9)
    assert turns.user_interruptions == 0
    assert "user_backchannel" in kinds(turns)


def test_speech_before_the_user_is_an_opening():
    turns = analyse(segments((3, 4)), segments((0.5, 2), (4.5, 6)), None, 7)
    assert kinds(turns) == ["opening", "reply"]


def test_silence_is_what_neither_says():
    turns = analyse(segments((1, 3)), segments((2, 5)), None, 10)
    assert turns.silence_s == pytest.approx(6)
    assert (turns.user_speech_s, turns.agent_speech_s) == (2, 3)


def test_nothing_at_all_is_no_error():
    turns = analyse([], [], [], 5)
    assert turns.silence_s == 5 and turns.judged_turns == 0 and turns.words == 0


def test_only_long_speech_begun_in_a_pause_counts_against_the_agent():
    user = segments((1, 3), (3.8, 6))
    short = analyse(user, segments((3.2, 4.1)), words((3.2, 3.4), (3.5, 4.1)), 8)
    long = analyse(user, segments((3.2, 4.4)), None, 8)
    assert (short.pauses, short.pauses_talked_in) == (1, 0)
    assert (long.pauses, long.pauses_talked_in) == (1, 1)


def test_replies_after_an_interruption_are_known():
    user = segments((1, 3), (6, 8), (14, 16))
    agent = segments((3.5, 6.8), (8.6, 12), (16.3, 18))
    turns = analyse(user, agent, None, 20)
    assert turns.reply_delays_s == pytest.approx([0.5, 0.6, 0.3])
    assert turns.interruption_delays_s == pytest.approx([0.6])


def test_backchannels_match_those_of_people_one_to_one():
    human = segments((2, 2.4), (10, 10.5), (20, 24), (30, 30.3))
    agent = segments((2.9, 3.2), (10.4, 10.8), (11.4, 11.8), (20.1, 20.5), (40, 43))
    # 2 and 10 are met, 11.4 by nobody; 20 to 24 and 40 to 43 are none.
    assert matching_backchannels(agent, human) == (2, 4 + 3)
    assert matching_backchannels([], human) == (0, 3)
