"""Two sets of answers compared: verdicts, intervals, and limits for scripts."""

from __future__ import annotations

import json
from statistics import median

import numpy as np
import pytest
from click.testing import CliRunner
from dialogues import write_dialogue

from pplex.cli.main import cli
from pplex.errors import PplexError
from pplex.evaluation.against import compare_sets
from pplex.evaluation.limits import Limit
from pplex.evaluation.measure import Levels, Measured
from pplex.evaluation.metrics import METRICS, ratio, single, spread
from pplex.evaluation.speech_activity import Segment
from pplex.evaluation.turns import analyse

QUIET = Levels(peak_db=-3.0, speech_db=-20.0, clips=0, first_clip_s=None)


def talk(rng: np.random.Generator, later_s: float, over: float):
    """The same user twice; B's replies come later, and some of its turns talk over."""
    turns, t = [], 1.0
    for _ in range(rng.integers(3, 7)):
        turns.append(Segment(t, t + rng.uniform(2.5, 5.0)))
        t = turns[-1].end_s + rng.uniform(4.0, 6.0)
    sides = []
    for delay_s, rude in ((0.0, 0.0), (later_s, over)):
        agent = []
        for turn in turns:
            if rng.random() < rude:
                agent.append(Segment(turn.start_s + 0.5, turn.start_s + 2.0))
            start = turn.end_s + 0.1 + rng.gamma(4, 0.1) + delay_s
            agent.append(Segment(start, start + rng.uniform(1.2, 2.0)))
        found = analyse(turns, agent, None, t)
        sides.append(Measured(t, turns, agent, None, "none", found, QUIET, None, None))
    return sides


def sets(seed: int, recordings: int = 24, later_s: float = 0.0, over: float = 0.0):
    rng = np.random.default_rng(seed)
    pairs = [talk(rng, later_s, over) for _ in range(recordings)]
    return tuple(
        {str(i): pair[side] for i, pair in enumerate(pairs)} for side in (0, 1)
    )


def verdicts(found) -> dict[str, str]:
    return {one.name: one.verdict for one in found.differences}


@pytest.mark.parametrize("paired", [True, False])
def test_what_differs_is_found_and_nothing_else(paired):
    alarms, seeds = 0, range(10)
    for seed in seeds:
        a, b = sets(seed, later_s=0.2, over=0.2)
        if not paired:
            b = {f"other {name}": one for name, one in b.items()}
        found = compare_sets(a, b)
        assert found.paired is paired
        said = verdicts(found)
        assert said["reply_delay_s"] == said["talk_over_s"] == "better", seed
        assert said["agent_interruptions"] == "better"
        unlike = {"reply_delay_s", "talk_over_s", "agent_interruptions", "overlap_s"}
        # Later replies leave more silence, and are rewarded less.
        unlike |= {"silence_s", "turn_reward_s"}
        others = {k: v for k, v in said.items() if k not in unlike}
        alarms += any(v not in ("-", "no difference shown") for v in others.values())
    assert alarms <= 2  # 1 of 20 expected at 95 %; 3 or more have a chance of 1.2 %


def test_sets_made_alike_get_no_verdict():
    alarms = 0
    for seed in range(20):
        said = verdicts(compare_sets(*sets(100 + seed)))
        alarms += any(v not in ("-", "no difference shown") for v in said.values())
    assert alarms <= 3


def test_the_interval_holds_the_true_difference_as_often_as_it_says():
    held = 0
    for seed in range(30):
        found = compare_sets(*sets(seed, later_s=0.2))
        (delay,) = (d for d in found.differences if d.name == "reply_delay_s")
        assert delay.low <= delay.difference <= delay.high
        held += delay.low <= -0.2 <= delay.high
    # 28.5 of 30 with a standard deviation of 1.2.
    assert held >= 25


def test_figures_are_those_of_score():
    a, b = sets(3, later_s=0.1, over=0.3)
    for one in compare_sets(a, b).differences:
        metric = next(m for m in METRICS if (m.of, m.name) == (one.of, one.name))
        for figure, side in ((one.a, a), (one.b, b)):
            total = single(metric.of_all(list(side.values())))
            if metric.total is sum:
                total /= len(side)
            assert figure == pytest.approx(total), one.name
        assert one.difference == pytest.approx(one.a - one.b)


def test_every_total_of_the_table_can_be_compared():
    from pplex.evaluation.against import _TOTALS

    assert {metric.total for metric in METRICS if metric.compared} <= _TOTALS.keys()
    rng = np.random.default_rng(0)
    lists = [list(rng.random(n)) for n in (1, 4, 2, 7)]
    drawn = np.array([[0, 1, 2, 3], [1, 1, 1, 2], [3, 0, 0, 3]])
    medians = [median(sum((lists[i] for i in row), [])) for row in drawn]
    assert _TOTALS[spread](lists)(drawn) == pytest.approx(medians)
    shares = [(1, 2), (0, 3), (4, 4), (2, 8)]
    assert _TOTALS[ratio](shares)(drawn) == pytest.approx([7 / 17, 4 / 13, 6 / 20])


def test_recordings_without_a_partner_are_named_and_left_out():
    a, b = sets(1, recordings=6)
    a["alone"] = a["0"]
    found = compare_sets(a, b)
    assert (found.only_a, found.only_b) == (["alone"], [])
    assert found.recordings == (6, 6)


def test_words_of_other_sources_are_a_warning():
    a, b = sets(1, recordings=3)
    for one in b.values():
        object.__setattr__(one, "words_from", "asr")
    (warning,) = compare_sets(a, b).warnings
    assert "none in A" in warning and "asr in B" in warning


def test_too_few_recordings_have_no_interval():
    found = compare_sets(*sets(1, recordings=2))
    assert {one.verdict for one in found.differences} == {"-"}
    assert all(one.low is None for one in found.differences)


@pytest.fixture
def folders(tmp_path):
    """Five recordings in two folders; the replies of the second come later."""
    rng = np.random.default_rng(0)
    for folder, delay_s in (("new", 0.3), ("old", 0.8)):
        (tmp_path / folder).mkdir()
        for idx in range(5):
            replies = ((4.0 + delay_s + 0.02 * rng.random(), 7.0), (9.0, 9.5))
            path = tmp_path / folder / f"call{idx}.wav"
            write_dialogue(path, ((1.0, 4.0),), replies, 10.0)
    return tmp_path


def run(*arguments: object):
    return CliRunner().invoke(cli, ["score", *map(str, arguments), "--vad", "energy"])


def test_the_command_compares_folders(folders):
    plot = folders / "difference.svg"
    arguments = (folders / "new", "--against", folders / "old")
    result = run(*arguments, "--plot", plot, "--format", "json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    (delay,) = (
        one
        for one in content["comparison"]["differences"]
        if one["name"] == "reply_delay_s"
    )
    assert delay["difference"] == pytest.approx(-0.5, abs=0.08)
    assert delay["low"] < -0.4 and delay["recordings"] == 5
    assert content["total"]["scored"] == content["against"]["total"]["scored"] == 5
    assert "permutation" in content["comparison"]["method"]
    assert "new minus" in plot.read_text()
    table = run(*arguments)
    assert "5 pairs" in table.stdout and "Method:" in table.stdout
    again = run(*arguments, "--plot", plot)
    assert again.exit_code == 1 and "exists already" in again.stderr


def test_limits_are_failures(folders):
    assert run(folders / "new", "--fail-if", "reply_delay.median>0.6").exit_code == 0
    late = run(folders / "old", "--fail-if", "reply_delay.median>0.6")
    assert late.exit_code == 1
    assert "reply_delay.median>0.6: it is 0.8" in late.stderr
    none = run(folders / "old", "--fail-if", "round_trip.word_error_rate>0.1")
    assert none.exit_code == 1 and "word_error_rate" in none.stderr


@pytest.mark.parametrize("text", ["delay", "reply_delay>much", ">1", "a=1", "x>nan"])
def test_a_limit_that_says_nothing_is_refused(text):
    with pytest.raises(PplexError, match="--fail-if"):
        Limit.parse(text)


def test_names_that_no_score_has_are_refused():
    total = {"reply_delay_s": {"median": 1.0}, "takeover_rate": None}
    with pytest.raises(PplexError, match="known here are reply_delay_s"):
        Limit.parse("delay>1").broken(total)
    with pytest.raises(PplexError, match="add one of .median"):
        Limit.parse("reply_delay>1").broken(total)
    assert "no such figure" in Limit.parse("takeover_rate<0.9").broken(total)
    assert Limit.parse("reply_delay.median>=1").broken(total)
    assert Limit.parse("reply_delay.median<1").broken(total) is None


@pytest.mark.parametrize("option", [("--plot", "x.png"), ("--fail-if", "worse")])
def test_options_of_a_comparison_need_one(folders, option):
    result = run(folders / "new", *option)
    assert result.exit_code == 2 and "--against" in result.stderr
