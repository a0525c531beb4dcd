"""``--check`` of respond and batch: what was just written is checked."""

from __future__ import annotations

import json

import pytest

from pplex.cli.options import checks_from
from pplex.respond.manifest import read_lines


@pytest.fixture
def call(data):
    return data / "respond" / "user_c.wav"


@pytest.fixture
def answer(run, tiny, call, tmp_path):
    """Answer a recording with the checks given."""

    def respond(*args: object):
        checks = [word for check in args for word in ("--check", check)]
        options = ("--model", tiny, "--seed", 3, "--overwrite")
        return run("respond", call, "-o", tmp_path / "a.wav", *options, *checks)

    return respond


def test_checks_that_pass_are_lines_and_exit_0(answer, tmp_path):
    result = answer("not-silent", "max-rtf=1000", "length-of", "says=")
    assert result.exit_code == 2  # says needs a value
    result = answer("not-silent", "max-rtf=1000", "length-of", "max-late-frames=100")
    assert result.exit_code == 0, result.stderr
    for name in ("not-silent", "length-of", "max-rtf", "max-late-frames"):
        assert f"ok   {name}: " in result.stderr
    assert result.stdout == ""


def test_a_check_that_fails_exits_with_1_and_leaves_the_files(answer, tmp_path):
    result = answer("not-silent", "max-rtf=0")
    assert result.exit_code == 1
    assert "ok   not-silent" in result.stderr and "FAIL max-rtf" in result.stderr
    assert (tmp_path / "a.wav").exists()


def test_what_the_agent_said_needs_no_transcript(answer):
    spoken = answer("says=.")
    silent = answer("says=no such words")
    assert spoken.exit_code == 0 and silent.exit_code == 1
    assert 'FAIL says: /no such words/ in "' in silent.stderr


def test_quiet_still_names_what_failed(run, tiny, call, tmp_path):
    args = ("--model", tiny, "-q", "--check", "max-rtf=0", "--check", "not-silent")
    result = run("respond", call, "-o", tmp_path / "a.wav", *args)
    assert result.exit_code == 1
    assert [line[:12] for line in result.stderr.splitlines()] == ["FAIL max-rtf"]


@pytest.mark.parametrize("layout", ["agent", "separate"])
def test_the_agents_own_file_is_checked(run, tiny, call, tmp_path, layout):
    # Of an earlier run: not what is checked.
    (tmp_path / "a.wav").write_text("no sound")
    args = ("--model", tiny, "--layout", layout, "--check", "length-of", "--overwrite")
    result = run("respond", call, "-o", tmp_path / "a.wav", *args)
    assert result.exit_code == 0, result.stderr
    assert "ok   length-of" in result.stderr


def test_the_tail_is_part_of_the_length(run, tiny, call, tmp_path):
    args = ("--model", tiny, "--tail", 0.4, "--check", "length-of")
    result = run("respond", call, "-o", tmp_path / "a.wav", *args)
    assert result.exit_code == 0, result.stderr
    assert "with a tail of 0.4 s" in result.stderr


@pytest.mark.parametrize(
    ("check", "said"),
    [
        ("loud", "is no check; there are not-silent, no-clipping"),
        ("not-silent=1", "takes no value"),
        ("max-rtf", "needs a value"),
        ("max-rtf=x", "is not a number from 0 on"),
        ("max-late-frames=101", "not a number from 0 to 100"),
        ("says=(", "is no regular expression"),
    ],
)
def test_bad_checks_are_refused_before_anything_runs(answer, tmp_path, check, said):
    result = answer(check)
    assert result.exit_code == 2 and said in result.stderr
    assert not (tmp_path / "a.wav").exists()


def test_what_goes_to_stdout_cannot_be_checked(run, tiny, call):
    result = run("respond", call, "-o", "-", "--model", tiny, "--check", "not-silent")
    assert result.exit_code == 2


def test_names_and_values_become_checks():
    given = (("max-rtf", 0.5), ("not-silent", True), ("length-of", True))
    checks = checks_from(given)
    assert checks.input_length and checks.max_rtf == 0.5 and checks.not_silent
    assert checks.length_of is None and not checks.no_clipping
    assert checks_from(()) is None


def test_a_batch_counts_what_fails_and_keeps_its_results(run, tiny, data, tmp_path):
    calls = [data / "respond" / f"user_{name}.wav" for name in "ac"]
    base = ("batch", *calls, "-o", tmp_path / "out", "--model", tiny)
    good = run(*base, "--check", "length-of", "--check", "not-silent")
    assert good.exit_code == 0, good.stderr
    assert "checks: 2 of 2 recordings pass" in good.stderr
    bad = run(*base, "--overwrite", "--check", "max-rtf=0")
    assert bad.exit_code == 1
    assert "checks: 0 of 2 recordings pass" in bad.stderr
    assert "FAIL user_a.wav: max-rtf: real-time factor" in bad.stderr
    lines = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    assert {json.loads(line)["status"] for line in lines[-2:]} == {"done"}
    assert (tmp_path / "out" / "user_a.wav").exists()
    # Nothing to do: but what failed fails again, and what was not asked is asked now.
    again = run(*base, "--check", "max-rtf=0")
    assert again.exit_code == 1 and "0 done, 2 skipped" in again.stderr
    failures = [x for x in bad.stderr.splitlines() if x.startswith("FAIL")]
    assert sorted(failures) == [x for x in again.stderr.splitlines() if "FAIL" in x]
    other = run(*base, "--check", "says=plums", "--check", "length-of")
    assert other.exit_code == 1
    assert other.stderr.count("says: no transcript") == 2
    assert run(*base, "--check", "length-of").exit_code == 0
    assert run(*base).exit_code == 0


def test_the_manifest_has_what_was_asked_and_found(run, tiny, data, tmp_path):
    call = data / "respond" / "user_a.wav"
    base = ("batch", call, "-o", tmp_path / "out", "--model", tiny)
    run(*base, "--check", "max-rtf=0", "--check", "not-silent")
    (line,) = read_lines(tmp_path / "out" / "manifest.jsonl")
    assert line["checks"]["asked"] == {"max_rtf": 0.0, "not_silent": True}
    found = {x["check"]: x["passed"] for x in line["checks"]["outcomes"]}
    assert found == {"readable": True, "not-silent": True, "max-rtf": False}


def test_a_recording_that_cannot_be_read_counts_before_checks(
    run, tiny, data, tmp_path
):
    (tmp_path / "b.wav").write_text("no sound")
    calls = (data / "respond" / "user_c.wav", tmp_path / "b.wav")
    args = ("-o", tmp_path / "out", "--model", tiny, "--check", "max-rtf=0")
    result = run("batch", *calls, *args)
    assert result.exit_code == 3
    assert "checks: 0 of 1 recordings pass" in result.stderr
