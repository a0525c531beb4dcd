"""Checks for scripts: what passes, what fails, and what is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from dialogues import track, write_dialogue
from test_score import transcript

from pplex.errors import PplexError
from pplex.evaluation.checks import Checks, passed, run_checks
from pplex.evaluation.measure import measure_levels

RATE = 16_000


@pytest.fixture
def reply(tmp_path) -> Path:
    """An output with its stats and transcript beside it."""
    path = tmp_path / "reply.wav"
    write_dialogue(path, ((1, 3),), ((3.4, 6),), 8.0)
    transcript(tmp_path / "reply.json", ("Good", 3.4, 4), ("morning.", 4, 5))
    stats = {
        "input": "call.wav",
        "outputs": {"audio": str(path)},
        "real_time_factor": 0.5,
        "frames": 100,
        "tail_s": 2.0,
        "step_ms": {"late_frames": 3},
    }
    (tmp_path / "reply.stats.json").write_text(json.dumps(stats))
    soundfile.write(tmp_path / "call.wav", track("user", ((1, 3),), 6.0), RATE)
    return path


def one(path: Path, **checks: object):
    return run_checks(path, Checks(**checks))[-1]


def test_what_holds_passes(reply):
    checks = Checks(
        not_silent=True,
        no_clipping=True,
        max_rtf=0.5,
        max_late_frames=3,
        length_of=reply.with_name("call.wav"),
        says="good m",
    )
    outcomes = run_checks(reply, checks)
    assert passed(outcomes)
    assert [outcome.check for outcome in outcomes] == [
        "readable",
        "not-silent",
        "no-clipping",
        "length-of",
        "max-rtf",
        "max-late-frames",
        "says",
    ]


@pytest.mark.parametrize(
    ("checks", "said"),
    [
        ({"max_rtf": 0.49}, "real-time factor 0.500, at most 0.49"),
        ({"max_late_frames": 2.9}, "3 of 100 frames over 80 ms, 3.00 %"),
        ({"says": "evening"}, '/evening/ in "Good morning."'),
    ],
)
def test_what_does_not_hold_fails(reply, checks, said):
    outcome = one(reply, **checks)
    assert not outcome.passed and said in outcome.detail


def test_the_length_counts_the_tail(reply):
    call = reply.with_name("call.wav")
    assert one(reply, length_of=call).passed
    reply.with_name("reply.stats.json").unlink()
    outcome = one(reply, length_of=call)
    assert not outcome.passed
    assert "128000 samples at 16000 Hz; call.wav makes 96000" in outcome.detail


def test_a_silent_agent_is_caught_whatever_the_user_says(tmp_path):
    write_dialogue(tmp_path / "a.wav", ((1, 3),), (), 5.0)
    assert not one(tmp_path / "a.wav", not_silent=True).passed


def test_clipping_is_three_samples_at_full_scale(tmp_path):
    pcm = np.zeros(RATE, np.float32)
    pcm[100:102] = 1.0
    assert measure_levels(pcm, RATE).clips == 0
    pcm[8000:8003] = -1.0
    soundfile.write(tmp_path / "a.wav", np.repeat(pcm, 3), 24_000)
    outcome = one(tmp_path / "a.wav", no_clipping=True)
    assert not outcome.passed and "clipped stretches, 0.01 s" in outcome.detail
    assert measure_levels(pcm, RATE).first_clip_s == 0.5


def test_figures_that_are_nowhere_fail(tmp_path):
    write_dialogue(tmp_path / "a.wav", ((1, 3),), ((3.4, 6),), 8.0)
    assert "no stats" in one(tmp_path / "a.wav", max_rtf=1).detail
    assert "no stats" in one(tmp_path / "a.wav", max_late_frames=1).detail
    assert "no transcript" in one(tmp_path / "a.wav", says="a").detail


def test_figures_and_words_may_be_handed_over(tmp_path):
    write_dialogue(tmp_path / "a.wav", ((1, 3),), ((3.4, 6),), 8.0)
    checks = Checks(max_rtf=1.0, says="^hello$")
    stats = {"real_time_factor": 0.2}
    assert passed(run_checks(tmp_path / "a.wav", checks, stats, "Hello"))


def test_the_command_prints_a_line_a_check_and_exits_with_1(reply, run):
    good = run("check", reply, "--not-silent", "--says", "morning")
    assert good.exit_code == 0 and good.stdout.count("ok  ") == 3
    bad = run("check", reply, "--max-rtf", "0.1", "--not-silent")
    assert bad.exit_code == 1
    assert "FAIL max-rtf: real-time factor 0.500, at most 0.1" in bad.stdout
    as_json = run("check", reply, "--max-rtf", "0.1", "--json")
    content = json.loads(as_json.stdout)
    assert as_json.exit_code == 1 and content["passed"] is False
    assert [c["check"] for c in content["checks"]] == ["readable", "max-rtf"]


def test_what_is_no_output_fails(tmp_path, run):
    missing = run("check", tmp_path / "a.wav")
    assert missing.exit_code == 1 and "does not exist" in missing.stdout
    (tmp_path / "b.wav").write_text("not sound")
    broken = run("check", tmp_path / "b.wav", "--json")
    assert broken.exit_code == 1 and not json.loads(broken.stdout)["passed"]
    folder = run("check", tmp_path)
    assert folder.exit_code == 1 and "is a folder" in folder.stderr


def test_a_bad_expression_and_bad_stats_are_named(reply, run, tmp_path):
    assert run("check", reply, "--says", "(").exit_code == 2
    with pytest.raises(PplexError, match="not a stats file"):
        run_checks(reply, Checks(), reply.with_name("reply.json"))
    with pytest.raises(PplexError, match="does not exist"):
        run_checks(reply, Checks(), tmp_path / "none.json")
