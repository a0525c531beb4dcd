"""The manifest and the lock of an output folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dialogues import write_dialogue
from test_score import ENERGY, score

import pplex.respond.manifest
from pplex.errors import PplexError
from pplex.evaluation.find import find
from pplex.evaluation.measure import Method
from pplex.evaluation.report import make_entries
from pplex.files import read_regular
from pplex.respond.lock import LOCK_NAME, FolderLock
from pplex.respond.manifest import Manifest, file_print, flat, manifest_name, read_lines


def line(recording: str = "a.wav", status: str = "done", **more: object) -> dict:
    plain = {"input": None, "settings": "s", "outputs": {}, "time": "2026-01-01"}
    return {"recording": recording, "status": status, "error": None} | plain | more


def written(folder: Path, *lines: dict | str, shard=None) -> Manifest:
    text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    (folder / manifest_name(shard)).write_text(text + "\n", encoding="utf-8")
    return Manifest(folder)


def test_the_last_line_of_a_recording_counts(tmp_path):
    manifest = written(tmp_path, line(settings="1"), line("b.wav"), line(settings="2"))
    assert manifest.last["a.wav"]["settings"] == "2"


def test_the_last_line_counts_also_when_the_clock_was_set_back(tmp_path):
    """Else a recording would be done again at every run."""
    old, new = line(settings="old", time="2026-01-02"), line(settings="new")
    assert written(tmp_path, old, new).last["a.wav"]["settings"] == "new"


def test_a_line_that_was_cut_off_is_passed_over(tmp_path):
    whole = json.dumps(line("b.wav"))
    manifest = written(tmp_path, line(), whole[:40])
    assert set(manifest.last) == {"a.wav"}


def test_new_lines_go_below_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(line()) + '\n{"recording": "b', encoding="utf-8")
    manifest = Manifest(tmp_path)
    manifest.open()
    manifest.append(line("c.wav"))
    manifest.close()
    assert [x["recording"] for x in read_lines(path)] == ["a.wav", "c.wav"]


def test_a_line_is_in_the_file_as_soon_as_it_is_appended(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.open()
    manifest.append(line())
    assert len(read_lines(manifest.path)) == 1
    manifest.close()


@pytest.mark.parametrize("what", ["fifo", "/dev/zero"])
def test_where_lines_would_be_lost_none_are_written(tmp_path, what):
    path = tmp_path / manifest_name()
    os.mkfifo(path) if what == "fifo" else path.symlink_to(what)
    with pytest.raises(PplexError, match=r"manifest.jsonl is a device or pipe"):
        Manifest(tmp_path).open()


def test_names_that_are_not_utf8_can_be_written(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.open()
    manifest.append(line("caf\udce9.wav"))
    manifest.close()
    assert Manifest(tmp_path).last.keys() == {"caf\udce9.wav"}


def test_each_file_and_each_line_is_read_once(tmp_path, monkeypatch):
    """So that the time to read a manifest grows as its length does, no faster."""
    for shard in (None, (1, 2), (2, 2)):
        names = [f"{shard}-{idx}.wav" for idx in range(1000)]
        text = "\n".join(json.dumps(line(name)) for name in names)
        (tmp_path / manifest_name(shard)).write_text(text + "\n", encoding="utf-8")
    calls = []

    def counted(function):
        def call(*arguments, **options):
            calls.append(function.__name__)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(pplex.respond.manifest, "read_regular", counted(read_regular))
    monkeypatch.setattr(json, "loads", counted(json.loads))
    assert len(Manifest(tmp_path).last) == 3000
    assert (calls.count("read_regular"), calls.count("loads")) == (3, 3000)


def test_a_line_of_a_newer_schema_is_refused_and_one_without_is_of_the_first(tmp_path):
    manifest = written(tmp_path, line(), line("b.wav", schema=1))
    assert [x["schema"] for x in manifest.last.values()] == [1, 1]
    with pytest.raises(PplexError, match="line 2 has schema 2.*update pplex"):
        written(tmp_path, line(), line("b.wav", schema=2))


def test_a_line_as_a_row_has_parts_with_dots_and_files_by_their_paths(tmp_path):
    print_ = {"path": "a.wav", "size": 1, "mtime_ns": 2, "sha256": "3"}
    outcome = {"check": "says", "passed": False, "detail": "d"}
    checks = {"asked": {"says": "x"}, "outcomes": [outcome]}
    row = flat(line(outputs={"audio": print_}, checks=checks, extra={"a": {"b": 1}}))
    shown = {key: row[key] for key in ("outputs.audio", "checks", "extra.a.b")}
    assert shown == {"outputs.audio": "a.wav", "checks": False, "extra.a.b": 1}
    assert flat(line(checks=None))["checks"] is None


def test_an_unsharded_run_takes_over_what_shards_did(tmp_path):
    written(tmp_path, line(settings="old"))
    written(tmp_path, line(settings="new", time="2026-01-02"), shard=(1, 2))
    written(tmp_path, line("b.wav"), shard=(2, 2))
    manifest = Manifest(tmp_path)
    manifest.open()
    manifest.close()
    lines = read_lines(tmp_path / "manifest.jsonl")
    known = {x["recording"]: x["settings"] for x in lines}
    assert known == {"a.wav": "new", "b.wav": "s"}
    assert len(lines) == 3


def test_batch_report_and_score_go_by_order_and_not_by_clock(tmp_path):
    """What was done last counts for all, though the clock was set back before it."""
    write_dialogue(tmp_path / "a.wav", ((1, 3),), ((3.4, 6),), 8.0)
    audio = {"audio": {"path": "a.wav"}}
    first = line(status="failed", time="2026-01-02") | {"error": "no space"}
    manifest = written(tmp_path, first, line(outputs=audio, time="2026-01-01"))
    found = find([tmp_path])
    (entry,) = make_entries(found, Method(vad="energy"))
    (row,) = score(found, ENERGY)["recordings"]
    known = manifest.last["a.wav"]["status"], entry.status, row["status"]
    assert known == ("done", "done", "done")


def test_a_shards_last_line_counts_for_all_if_it_is_the_latest(tmp_path):
    written(tmp_path, line(status="failed", time="2026-01-02"))
    shard = [line(status="done", time="2026-01-04"), line(time="2026-01-01")]
    shard[1]["status"] = "failed"
    manifest = written(tmp_path, *shard, shard=(1, 2))
    assert manifest.last["a.wav"]["time"] == "2026-01-02"
    (item,) = find([tmp_path]).items
    assert item.status == manifest.last["a.wav"]["status"]


@pytest.mark.parametrize(
    "other",
    ['{"recording": "b.wav", "status": "failed"}', line("b.wav", computed=5)],
    ids=["lacks parts", "has odd ones"],
)
def test_a_line_of_another_kind_is_passed_over_by_all(tmp_path, other):
    manifest = written(tmp_path, line(), other)
    found = find([tmp_path])
    assert set(manifest.last) == {item.name for item in found.items} == {"a.wav"}
    assert any("line 2 is none of pplex batch" in note for note in found.notes)


# What is done


@pytest.fixture
def answered(tmp_path):
    """A manifest with one recording that is done, its file and its output."""
    source, output = tmp_path / "in.wav", tmp_path / "out" / "a.wav"
    output.parent.mkdir()
    source.write_bytes(b"recording")
    output.write_bytes(b"answer")
    manifest = Manifest(output.parent)
    manifest.open()
    known = manifest.describe(source, file_print(source))
    written = manifest.describe(output, file_print(output))
    manifest.append(line(input=known, outputs={"audio": written}))
    yield manifest, source, output
    manifest.close()


def is_done(answered, settings: str = "s") -> bool:
    manifest, source, output = answered
    return manifest.is_done("a.wav", settings, source, [output])


def test_what_is_as_it_was_is_done(answered):
    assert is_done(answered)


def test_with_other_settings_it_is_not_done(answered):
    assert not is_done(answered, "t")


@pytest.mark.parametrize("which", [1, 2])
def test_a_file_that_changed_is_not_done(answered, which):
    answered[which].write_bytes(b"x" * len(answered[which].read_bytes()))
    os.utime(answered[which], ns=(1, 1))
    assert not is_done(answered)


@pytest.mark.parametrize("which", [1, 2])
def test_a_file_that_was_only_touched_is_done(answered, which):
    os.utime(answered[which], ns=(1, 1))
    assert is_done(answered)


def test_a_file_of_the_far_future_is_done(answered):
    manifest, source, output = answered
    os.utime(source, ns=(0, 10**19))  # more than 63 bits
    known = manifest.describe(source, file_print(source))
    written = manifest.describe(output, file_print(output))
    manifest.append(line(input=known, outputs={"audio": written}))
    again = Manifest(output.parent)
    assert again.is_done("a.wav", "s", source, [output])


@pytest.mark.parametrize("which", [1, 2])
def test_a_file_that_is_gone_is_not_done(answered, which):
    answered[which].unlink()
    assert not is_done(answered)


def test_another_output_is_not_done(answered):
    manifest, source, output = answered
    more = [output, output.with_suffix(".srt")]
    assert not manifest.is_done("a.wav", "s", source, more)


# The lock

BEGUN = {"recording": "a.wav", "settings": "s", "size": 6, "mtime_ns": 1, "sha256": "0"}


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
@pytest.mark.parametrize("shard", [None, (1, 2)])
def test_a_lock_is_not_written_through_a_link(tmp_path, link, shard):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    name = LOCK_NAME if shard is None else ".pplex-batch.1-of-2.lock"
    (tmp_path / "out").mkdir()
    link(mine, tmp_path / "out" / name)
    with pytest.raises(PplexError, match="remove it"):
        FolderLock(tmp_path / "out", shard)
    assert mine.read_text() == "mine"


def test_a_second_run_is_refused_by_name(tmp_path):
    lock = FolderLock(tmp_path, None)
    with pytest.raises(PplexError, match=f"process {os.getpid()} "):
        FolderLock(tmp_path, None)
    lock.release()
    FolderLock(tmp_path, None).release(ended=True)
    assert not list(tmp_path.iterdir())


def test_shards_run_side_by_side(tmp_path):
    first, second = FolderLock(tmp_path, (1, 2)), FolderLock(tmp_path, (2, 2))
    for shard in (None, (1, 2)):
        with pytest.raises(PplexError, match="another run"):
            FolderLock(tmp_path, shard)
    first.release(ended=True)
    with pytest.raises(PplexError, match="another run"):
        FolderLock(tmp_path, None)
    second.release(ended=True)
    assert (tmp_path / LOCK_NAME).exists() is False
    FolderLock(tmp_path, None).release(ended=True)
    assert not list(tmp_path.iterdir())


def test_a_lock_ends_with_its_process_and_what_it_began_is_known(tmp_path):
    code = (
        "import os, sys, pathlib\n"
        "from pplex.respond.lock import FolderLock\n"
        f"lock = FolderLock(pathlib.Path({str(tmp_path)!r}), None)\n"
        f"for path in ('a.wav', 'a.srt'): lock.begin({{**{BEGUN}, 'path': path}})\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -9
    assert (tmp_path / LOCK_NAME).exists()
    for shard in ((1, 2), None):
        lock = FolderLock(tmp_path, shard)
        assert lock.begun == [BEGUN | {"path": p} for p in ("a.wav", "a.srt")]
        lock.release(ended=True)
    assert not list(tmp_path.iterdir())
