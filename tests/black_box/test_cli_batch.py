"""``pplex batch`` at the command line: messages, exit codes, what it refuses."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

DONE, NOTHING, USAGE, SOME = 0, 1, 2, 3


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("PPLEX_MODEL", raising=False)


@pytest.fixture
def calls(tmp_path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, samples in (("a", 3000), ("b", 5000)):
        pcm = np.random.default_rng(samples).uniform(-0.3, 0.3, samples)
        soundfile.write(folder / f"{name}.wav", pcm, 24000)
    return folder


@pytest.fixture
def batch(run, tiny, tmp_path):
    """Run ``pplex batch`` into ``tmp_path/out``; expect ``code``."""

    def go(*args: object, code: int = DONE, outdir: Path = tmp_path / "out"):
        result = run("batch", *args, "-o", outdir, "--model", tiny, "--offline")
        assert result.exit_code == code, (result.stderr, result.exception)
        if code in (NOTHING, USAGE):
            assert "Traceback" not in result.stderr
        return result

    return go


def test_a_folder_is_answered(batch, calls, tmp_path):
    result = batch(calls, "--transcript", "srt", "--stats", "--tokens")
    assert result.stdout == ""
    assert "batch size 2" in result.stderr
    assert "2 done, 0 skipped, 0 failed" in result.stderr
    assert "s of audio a second" in result.stderr
    names = {p.name for p in (tmp_path / "out").iterdir()}
    kinds = ("wav", "srt", "stats.json", "npz")
    expected = {f"{stem}.{kind}" for stem in "ab" for kind in kinds}
    assert names == expected | {"manifest.jsonl"}


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("stereo", {"a.wav"}),
        ("agent", {"a.wav"}),
        ("separate", {"a.user.wav", "a.agent.wav"}),
    ],
)
def test_every_layout_of_respond(batch, calls, tmp_path, layout, names):
    batch(calls / "a.wav", "--layout", layout)
    files = {p.name for p in (tmp_path / "out").glob("*.wav")}
    assert files == names
    channels = {soundfile.info(tmp_path / "out" / n).channels for n in names}
    assert channels == {2 if layout == "stereo" else 1}


def test_options_of_the_answer_reach_it(batch, calls, tmp_path):
    batch(
        *(calls / "a.wav", "--prompt", "Plums.", "--voice", "NATM0", "--seed", "3"),
        *("--tail", "0.5", "--greedy", "--channel", "mix"),
    )
    line = json.loads((tmp_path / "out/manifest.jsonl").read_text())
    assert (line["prompt"], line["voice"], line["tail_s"]) == ("Plums.", "NATM0", 0.5)
    assert soundfile.info(tmp_path / "out/a.wav").frames == 3000 + 12000


def test_some_failed(batch, calls):
    (calls / "bad.wav").write_text("no sound")
    result = batch(calls, code=SOME)
    assert "bad.wav: " in result.stderr and "not an audio file" in result.stderr
    assert "2 done, 0 skipped, 1 failed" in result.stderr
    result = batch(calls, code=SOME)
    assert "bad.wav: " in result.stderr
    assert "0 done, 2 skipped, 1 failed" in result.stderr
    assert "--retry-failed" in result.stderr


def test_nothing_could_run(batch, calls):
    (calls / "bad.wav").write_text("no sound")
    result = batch(calls / "bad.wav", calls / "none.wav", code=NOTHING)
    assert "none.wav does not exist" in result.stderr
    assert "0 done, 0 skipped, 2 failed" in result.stderr


def test_done_already_is_done(batch, calls):
    batch(calls)
    assert "0 done, 2 skipped, 0 failed" in batch(calls).stderr


def test_quiet_says_nothing_but_failures(batch, calls):
    assert batch(calls, "--quiet").stderr == ""
    (calls / "bad.wav").write_text("no sound")
    assert batch(calls, "--quiet", code=SOME).stderr.count("\n") == 1


def test_verbose_names_what_is_done(batch, calls):
    result = batch(calls, "--verbose")
    assert "a.wav: done" in result.stderr and "loading" in result.stderr


@pytest.mark.skipif(sys.platform == "darwin", reason="names there are UTF-8")
def test_a_name_that_is_not_text_fails_alone(batch, calls):
    (calls / "caf\udce9.wav").write_bytes((calls / "a.wav").read_bytes())
    result = batch(calls, code=SOME)
    assert "rename" in result.stderr and "2 done" in result.stderr


def test_fail_fast_says_what_was_not_run(batch, calls):
    (calls / "bad.wav").write_text("no sound")
    result = batch(calls, "--fail-fast", code=NOTHING)
    assert "1 failed, 2 not run" in result.stderr


def test_a_damaged_manifest_is_told_and_leaves_no_lock(batch, calls, tmp_path):
    batch(calls)
    manifest = tmp_path / "out" / "manifest.jsonl"
    text = manifest.read_text()
    manifest.write_text(text + "torn\n")
    assert "line 3 is not JSON and was left out" in batch(calls).stderr
    manifest.write_text(text.replace('"schema": 1', '"schema": 2'))
    assert "update pplex" in batch(calls, code=NOTHING).stderr
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"a.wav", "b.wav", "manifest.jsonl"}


def test_a_second_run_on_one_folder_is_refused(batch, calls, tmp_path):
    from pplex.respond.lock import FolderLock

    (tmp_path / "out").mkdir()
    lock = FolderLock(tmp_path / "out", None)
    assert "another run of pplex batch" in batch(calls, code=NOTHING).stderr
    lock.release()


# Kept


def test_answers_of_other_settings_are_named_and_kept(batch, calls, tmp_path):
    batch(calls)
    before = (tmp_path / "out/a.wav").read_bytes()
    result = batch(calls, "--seed", "3", code=NOTHING)
    assert "kept: 2, answered with other settings; --overwrite" in result.stderr
    assert "  a.wav\n  b.wav\n" in result.stderr
    assert "0 done, 0 skipped, 0 failed, 2 kept as they were" in result.stderr
    quiet = batch(calls, "--seed", "3", "--quiet", code=NOTHING)
    assert "kept: 2" in quiet.stderr
    (calls / "c.wav").write_bytes((calls / "a.wav").read_bytes())
    dry = batch(calls, "--seed", "3", "--dry-run", code=SOME)
    assert "kept: 2" in dry.stdout and "replace:" not in dry.stdout
    assert "1 done" in batch(calls, "--seed", "3", code=SOME).stderr
    assert (tmp_path / "out/a.wav").read_bytes() == before
    dry = batch(calls, "--seed", "3", "--overwrite", "--dry-run")
    assert "replace: 3 of them have outputs already" in dry.stdout
    result = batch(calls, "--seed", "3", "--overwrite")
    assert "3 had outputs before, which were replaced" in result.stderr
    assert (tmp_path / "out/a.wav").read_bytes() != before


def test_what_somebody_changed_is_named_and_kept(batch, calls, tmp_path):
    batch(calls)
    path = tmp_path / "out/a.wav"
    path.write_text("mine")
    result = batch(calls, code=SOME)
    assert "kept: 1, an output was changed by somebody" in result.stderr
    assert "0 done, 1 skipped, 0 failed, 1 kept as they were" in result.stderr
    assert path.read_text() == "mine"
    path.rename(tmp_path / "mine.wav")
    assert "1 done, 1 skipped" in batch(calls).stderr


def test_what_is_left_out_is_said(batch, calls):
    (calls / "c.m4a").write_text("x")
    (calls / "within").mkdir()
    result = batch(calls)
    assert "left out: 1 file that is no recording by its name (.m4a 1)" in result.stderr
    assert "left out: 1 folder within; --recursive" in result.stderr
    assert "(.m4a 1)" in batch(calls, "--dry-run", "--overwrite").stdout


def test_a_folder_that_cannot_be_read_is_a_failure(batch, calls, monkeypatch):
    (calls / "locked").mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    result = batch(calls, "--recursive", "--dry-run", code=SOME)
    assert "locked cannot be read: Permission denied" in result.stdout
    result = batch(calls, "--recursive", "--quiet", code=SOME)
    assert "locked cannot be read: Permission denied" in result.stderr


# Dry run


def test_a_dry_run_checks_all_and_writes_nothing(batch, calls, tmp_path, monkeypatch):
    from pplex.conversation import session

    def no_model(*args, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(session, "make_engine", no_model)
    (calls / "bad.wav").write_text("no sound")
    result = batch(calls, "--dry-run", "--tail", "1", code=SOME)
    assert "2 recordings, 2.3 s of audio, the longest 1.2 s" in result.stdout
    assert "bad.wav: " in result.stdout
    for word in ("disk:", "memory:", "time:"):
        assert word in result.stdout
    assert not (tmp_path / "out").exists()


def test_a_dry_run_knows_what_is_done_and_how_long_it_took(batch, calls):
    batch(calls / "a.wav")
    result = batch(calls, "--dry-run")
    assert "1 recording, 0.2 s" in result.stdout
    assert "skipped: 1" in result.stdout
    assert "at the speed so far" in result.stdout


def test_a_dry_run_says_when_the_disk_is_too_small(batch, calls, monkeypatch):
    import shutil
    from types import SimpleNamespace

    small = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    result = batch(calls, "--dry-run", code=NOTHING)
    assert "problem: the outputs need" in result.stdout


# Usage


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "INPUTS or --jobs"),
        (("in", "--jobs", "x.csv"), "INPUTS or --jobs"),
        (("--jobs", "x.csv", "--recursive"), "--recursive"),
        (("in", "--batch-size", "0"), "from 1"),
        (("in", "--batch-size", "many"), "'many'"),
        (("in", "--shard", "0/4"), "K/N"),
        (("in", "--shard", "5/4"), "K/N"),
        (("in", "--shard", "half"), "K/N"),
        (("in", "--output-name", "a/b.wav"), "--output-name"),
        (("in", "--output-name", "b.mp3"), "--output-name"),
        (("--ray", "in"), "--ray=local"),
        (("in", "--transcript", "pdf"), "pdf"),
        (("in", "--prompt", "x", "--role", "casual"), "exclude each other"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(batch, args, says, tmp_path):
    assert says in batch(*args, code=USAGE).stderr
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file_is_a_usage_error(batch, calls):
    batch(calls, outdir=calls / "a.wav", code=USAGE)


def test_an_output_folder_is_not_stdout(batch, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "name a folder" in batch(calls, outdir="-", code=NOTHING).stderr
    assert not Path("-").exists()


def test_an_input_folder_without_recordings_is_refused(batch, tmp_path):
    (tmp_path / "none").mkdir()
    assert "no recording" in batch(tmp_path / "none", code=NOTHING).stderr


def test_ray_that_is_not_installed_is_said(batch, calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pplex[ray]" in batch(calls, "--ray=local", code=NOTHING).stderr
