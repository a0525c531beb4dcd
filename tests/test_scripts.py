"""What scripts and CI read: formats of transcripts, results, JUnit, annotations."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_help import section

SAMPLES = Path(__file__).parents[1] / "samples"


@pytest.fixture
def calls(tmp_path) -> Path:
    """Two recordings, and a file that is none."""
    folder = tmp_path / "calls"
    folder.mkdir()
    for name, sample in (("a", "unknown.wav"), ("b", "noisy.wav")):
        shutil.copy(SAMPLES / sample, folder / f"{name}.wav")
    (folder / "bad.wav").write_text("no sound")
    return folder


@pytest.fixture
def answered(run, calls, tmp_path):
    """Answer the recordings in ``out``."""

    def go(*args: object):
        return run("batch", calls, "-o", tmp_path / "out", "-m", "mini", *args)

    return go


@pytest.fixture
def respond(run, calls, tmp_path):
    """Answer one recording as ``r.wav``."""

    def go(*args: object, output: object = tmp_path / "r.wav"):
        return run("respond", calls / "a.wav", "-o", output, "-m", "mini", *args)

    return go


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_formats_are_written_beside_the_output_and_files_where_they_are_named(
    respond, tmp_path, capfd
):
    named = tmp_path / "x.vtt"
    stats = tmp_path / "s.json"
    asked = ("--transcript", "srt,json", "--transcript", named, "--transcript", "-")
    result = respond(*asked, "--stats", stats)
    assert result.exit_code == 0, result.stderr
    outputs = json.loads(stats.read_text())["outputs"]
    assert {key: Path(path).name for key, path in outputs.items()} == {
        "audio": "r.wav",
        "transcript": "r.transcript.json",
        "transcript_srt": "r.srt",
        "transcript_vtt": "x.vtt",
        "transcript_words": "-",
        "stats": "s.json",
    }
    assert names(tmp_path) == {Path(p).name for p in outputs.values()} - {"-"}
    text = json.loads((tmp_path / "r.transcript.json").read_text())["text"]
    assert text and capfd.readouterr().out == text + "\n"


def test_all_are_all_formats(respond, tmp_path):
    assert respond("--transcript", "all").exit_code == 0
    kinds = ("transcript.json", "srt", "vtt", "tsv", "txt", "wav")
    assert names(tmp_path) == {f"r.{kind}" for kind in kinds}


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["json,jsn"], 2, "'jsn' is no format of a transcript"),
        (["json", "--line-width", "30"], 2, "give --transcript srt or vtt"),
        (["a.txt", "--transcript", "txt"], 1, "two transcripts of one format"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(
    respond, tmp_path, args, code, said
):
    result = respond("--transcript", *args)
    assert result.exit_code == code and said in result.stderr
    assert names(tmp_path) == set()


def test_formats_need_an_output_with_a_name(respond):
    result = respond("--transcript", "json", output="-")
    assert result.exit_code == 2 and "give a file name" in result.stderr


def test_a_batch_goes_on_whatever_the_order_of_its_formats(answered, calls, tmp_path):
    (calls / "bad.wav").unlink()
    assert answered("--transcript", "srt,json").exit_code == 0
    assert {"a.srt", "a.transcript.json"} < names(tmp_path / "out")
    again = answered("--transcript", "json,srt")
    assert "0 done, 2 skipped" in again.stderr
    other = answered("--transcript", "json,srt", "--cue-lines", "2")
    assert "2, answered with other settings" in other.stderr


def test_the_table_of_the_manifest_has_every_key_and_no_other(answered, tmp_path):
    answered("--check", "not-silent")
    rows = re.findall(r"^\| (`.*?) \|", section("files", "Manifest"), re.MULTILINE)
    told = [key for row in rows for key in re.findall(r"`(\w+)`", row)]
    lines = (tmp_path / "out/manifest.jsonl").read_text().splitlines()
    keys = set().union(*map(json.loads, lines))
    assert sorted(told) == sorted(keys)


def test_results_are_the_latest_of_each_recording(answered, run, tmp_path):
    out = tmp_path / "out"
    sampling = ("--temp", 0.5, "--text-top-k", 7, "--tail", 2)
    answered(*sampling)
    assert answered(*sampling, "--retry-failed").exit_code == 3
    assert len((out / "manifest.jsonl").read_text().splitlines()) == 4
    lines = json.loads(run("results", out, "--format", "json").stdout)
    known = {line["recording"]: line["status"] for line in lines}
    assert known == {"a.wav": "done", "b.wav": "done", "bad.wav": "failed"}
    assert {(line["schema"], line["temp"], line["text_top_k"]) for line in lines} == {
        (1, 0.5, 7)
    }
    assert len(lines[0]["text"].split()) == lines[0]["words"] > 0
    table = list(
        csv.DictReader(io.StringIO(run("results", out, "--format=csv").stdout))
    )
    assert [row["outputs.audio"] for row in table] == ["a.wav", "b.wav", ""]
    assert table[0]["text"] == lines[0]["text"] and float(table[0]["timings.steps_s"])
    failed = run("results", out, "--status", "failed").stdout.splitlines()
    assert len(failed) == 2 and failed[1].startswith("bad.wav")


def test_results_of_no_batch_are_refused(run, tmp_path):
    result = run("results", tmp_path)
    assert result.exit_code == 1 and "has no manifest.jsonl" in result.stderr


def test_junit_has_a_case_a_check_and_replaces_nothing_unasked(respond, run, tmp_path):
    respond("--transcript", "json")
    junit = tmp_path / "checks.xml"
    args = ("check", tmp_path / "r.wav", "--not-silent", "--says", "<\x01&", "--junit")
    assert run(*args, junit).exit_code == 1
    suite = ElementTree.fromstring(junit.read_text("utf-8")).find("testsuite")
    counts = (suite.get("tests"), suite.get("failures"), suite.get("errors"))
    assert counts == ("3", "1", "0")
    failed = [x.get("name") for x in suite if x.find("failure") is not None]
    assert failed == ["says"]
    assert "/<\ufffd&/" in suite.find("testcase/failure").get("message")
    before = junit.read_bytes()
    assert "exists already" in run(*args, junit).stderr
    assert junit.read_bytes() == before
    assert run(*args, junit, "--overwrite").exit_code == 1


def annotations(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("::")]


def test_failures_are_annotated_in_github_actions_alone(
    respond, answered, run, tmp_path, monkeypatch
):
    check = ("--check", "says=50%,", "-q")
    reply, out = tmp_path / "r.wav", tmp_path / "out"
    assert annotations(respond(*check).stderr) == []
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    (one,) = annotations(respond(*check, "--overwrite").stderr)
    title = "title=pplex check%3A says"
    assert one.startswith(f"::error file={reply},{title}::/50%25,/ in ")
    two = annotations(answered(*check).stderr)
    assert {line.partition(",")[0] for line in two} == {
        f"::error file={out / name}" for name in ("a.wav", "b.wav")
    }
    (one,) = annotations(run("check", reply, "--max-rtf", "1").stderr)
    assert one.startswith(
        f"::error file={reply},title=pplex check%3A max-rtf::no stats"
    )
    limits = ("--vad", "energy", "--fail-if", "recordings>=0")
    (one,) = annotations(run("score", out, *limits).stderr)
    assert one.startswith("::error title=pplex score --fail-if::recordings>=0: it is ")
