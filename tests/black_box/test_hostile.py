"""What is hostile or broken around the program: one sentence, no result lost."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from piped import RATE, noise, samples, start

HOSTILE = Path(__file__).parents[1] / "data" / "hostile"
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def model(small_folder):
    return ("--model", small_folder, "--offline", "--prompt", "")


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    path = tmp_path_factory.mktemp("call") / "call.wav"
    soundfile.write(path, noise(round(RATE * 0.4)), RATE)
    return path


@pytest.fixture(scope="module")
def reply(call, model):
    """What the agent answers to ``call``."""
    out = call.with_name("reply.wav")
    side = (
        "--stats",
        call.with_name("s.json"),
        "--transcript",
        call.with_name("t.json"),
    )
    code, _, err = pplex("respond", call, "-o", out, *model, *side)
    assert code == 0, err
    return out


def pplex(*args: object, redirect: str = "", **options) -> tuple[int, bytes, str]:
    """Run to the end; ``redirect`` is what a shell is to do with its descriptors."""
    line = ["sh", "-c", f'exec "$0" -m pplex "$@" {redirect}', sys.executable]
    done = subprocess.run(
        [*line, *map(str, args)],
        capture_output=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        **options,
    )
    err = done.stderr.decode()
    assert "Traceback" not in err and "Exception ignored" not in err, err
    return done.returncode, done.stdout, err


@pytest.fixture
def here(run):
    """Run ``pplex`` in this process: exit code, stdout, stderr."""

    def invoke(*args: object) -> tuple[int, str, str]:
        result = run(*args)
        if not isinstance(result.exception, SystemExit | None):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return invoke


# Standard streams.


@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_lose_no_result(call, model, reply, tmp_path, redirect):
    out = tmp_path / "o.wav"
    code, _, err = pplex("respond", call, "-o", out, *model, redirect=redirect)
    assert code == 0, err
    assert out.read_bytes() == reply.read_bytes()


def test_a_closed_stdin_is_an_empty_stream(model, tmp_path):
    out = tmp_path / "o.wav"
    code, _, err = pplex("respond", "-", "-o", out, *model, redirect="<&-")
    assert code == 1 and "is empty" in err
    assert not out.exists()


def test_a_closed_stdout_is_no_place_for_a_result(call, model):
    code, _, err = pplex("respond", call, "-o", "-", *model, redirect=">&-")
    assert code == 1 and "cannot write stdout" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_messages_that_find_no_room_end_no_run(call, model, reply, tmp_path):
    out = tmp_path / "o.wav"
    args = ("respond", call, "-o", out, *model, "-v", "--captions")
    assert pplex(*args, redirect="2>/dev/full")[0] == 0
    assert out.read_bytes() == reply.read_bytes()
    batch = ("batch", call, "-o", tmp_path / "out", *model, "-v")
    assert pplex(*batch, redirect="2>/dev/full")[0] == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("args", [("--help",), ("help", "files"), ("roles", "list")])
def test_what_stdout_does_not_take_is_an_error_in_a_sentence(args):
    code, _, err = pplex(*args, redirect=">/dev/full")
    assert code == 1
    assert err.startswith("Error: ") and "No space left" in err


@pytest.mark.parametrize("kind", ["file", "append", "pipe"])
def test_every_output_fits_on_a_descriptor(call, model, reply, tmp_path, kind):
    names = ("o.wav", "t.npz", "s.json", "w.txt")
    where = {
        "file": " ".join(f"{i}>{tmp_path}/{n}" for i, n in enumerate(names, 3)),
        "append": " ".join(f"{i}>>{tmp_path}/{n}" for i, n in enumerate(names, 3)),
        "pipe": "3>&1 4>/dev/null 5>/dev/null 6>/dev/null",
    }[kind]
    if kind == "append":
        (tmp_path / "s.json").write_text("kept ")
    options = ("--tokens", "/dev/fd/4", "--stats", "/dev/fd/5")
    options += ("--transcript", "/dev/fd/6")
    args = ("respond", call, "-o", "/dev/fd/3", *model, *options)
    code, out, err = pplex(*args, redirect=where)
    assert code == 0, err
    if kind == "pipe":
        assert out[44:] == samples(reply)
        return
    assert samples(tmp_path / "o.wav") == samples(reply)
    with np.load(tmp_path / "t.npz") as tokens:
        assert tokens["user"].shape[1] == 5
    text = (tmp_path / "s.json").read_text()
    assert json.loads(text.removeprefix("kept "))["frames"] == 5
    assert text.startswith("kept ") == (kind == "append")


@pytest.mark.parametrize("name", ["/dev/fd/3", "-", "/dev/stdout"])
def test_pages_pictures_and_voices_go_to_descriptors_too(call, model, reply, name):
    redirect = "3>&1" if "3" in name else ""
    code, page, err = pplex("report", reply, "-o", name, redirect=redirect)
    assert code == 0 and page.startswith(b"<!DOCTYPE html>"), err
    voice = ("voices", "make", call, "/dev/fd/3", *model[:3])
    code, made, err = pplex(*voice, redirect="3>&1 >/dev/null")
    assert code == 0 and b"embeddings" in made[:400], err


@pytest.mark.parametrize("redirect", ["", "3</dev/null"])
def test_a_descriptor_that_takes_nothing_is_refused_before_the_work(
    call, model, tmp_path, redirect
):
    args = ("respond", call, "-o", tmp_path / "o.wav", *model)
    code, _, err = pplex(*args, "--stats", "/dev/fd/3", redirect=redirect)
    assert code == 1 and "cannot write /dev/fd/3" in err
    assert not (tmp_path / "o.wav").exists()


# Folders that are gone.


def test_a_current_folder_that_is_gone_is_said(call, model, tmp_path):
    def leave() -> None:
        here = tmp_path / "here"
        here.mkdir()
        os.chdir(here)
        here.rmdir()

    args = ("respond", call, *model, "-o")
    code, _, err = pplex(*args, "o.wav", preexec_fn=leave)
    assert code == 1 and "current folder is not there" in err
    assert pplex(*args, tmp_path / "o.wav", preexec_fn=leave)[0] == 0


def test_an_output_folder_that_is_taken_away_ends_the_batch(model, tmp_path):
    for i in range(30):
        soundfile.write(tmp_path / f"{i}.wav", noise(RATE * 4), RATE)
    out = tmp_path / "out"
    args = ("batch", tmp_path, "-o", out, *model, "--batch-size", "1")
    with start(*args, stdout=subprocess.DEVNULL) as run:
        while not list(out.glob("*.wav")) and run.poll() is None:
            pass
        os.rename(out, tmp_path / "taken")
        _, err = run.communicate(timeout=60)
    assert run.returncode == 1, err
    assert b"removed or replaced" in err and b"Traceback" not in err
    assert not out.exists()


# Clocks.


@pytest.mark.parametrize("step_s", [0.0, -10.0, 1e9])
def test_a_clock_that_stands_still_or_jumps_ends_no_batch(
    here, call, model, tmp_path, monkeypatch, step_s
):
    now = iter(float(step_s * i) for i in range(10**9))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    code, _, err = here("batch", call, "-o", tmp_path / "out", *model, "--stats", "-v")
    assert code == 0 and "1 done" in err
    code, _, err = here("respond", call, "-o", tmp_path / "o.wav", *model)
    assert code == 0
    code, _, err = here("bench", "--random", "tiny", "--frames", "4")
    assert code == (1 if step_s <= 0 else 0)
    assert ("clock of this machine stands still" in err) == (step_s <= 0)


# Pipes and devices where files were meant.


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "x.wav"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("what", ["fifo", "/dev/zero"])
def test_no_batch_waits_for_what_has_no_end(here, call, model, tmp_path, fifo, what):
    name = fifo if what == "fifo" else what
    jobs = tmp_path / "jobs.jsonl"
    rows = [{"input": str(call)}, {"input": str(name), "output": "zero.wav"}]
    jobs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = here("batch", "--jobs", jobs, "-o", tmp_path / "out", *model)
    assert code == 3 and "1 done, 0 skipped, 1 failed" in err
    assert "device or pipe" in err
    code, _, err = here("batch", "--jobs", jobs, "-o", tmp_path / "out", *model)
    assert code == 3 and "0 done, 1 skipped, 1 failed" in err


def test_a_folder_with_a_pipe_in_it_is_answered_but_for_that(
    here, call, model, tmp_path, fifo
):
    shutil.copy(call, tmp_path / "a.wav")
    code, _, err = here("batch", tmp_path, "-o", tmp_path / "out", *model)
    assert code == 3 and "1 done, 0 skipped, 1 failed" in err


def test_a_pipe_is_none_of_the_files_that_are_read(here, call, model, tmp_path, fifo):
    for name in ("jobs.jsonl", "m.safetensors", "p.json"):
        os.mkfifo(tmp_path / name)
    out = tmp_path / "o.wav"
    for args in (
        ("batch", "--jobs", tmp_path / "jobs.jsonl", "-o", tmp_path / "out"),
        ("respond", call, "-o", out, "--model", tmp_path / "m.safetensors"),
        ("respond", call, "-o", out, *model, "--voice", fifo),
        ("models", "info", tmp_path / "m.safetensors"),
        ("bench", "--compare", tmp_path / "p.json", "--random", "tiny"),
        ("check", call, "--stats", tmp_path / "p.json", "--max-rtf", "1"),
    ):
        code, _, err = here(*args)
        assert code == 1, args
        assert "pipe" in err or "incomplete" in err or "does not exist" in err, err
    assert not out.exists()


@pytest.mark.parametrize("command", ["report", "score", "check"])
@pytest.mark.parametrize("place", ["manifest", "beside"])
@pytest.mark.parametrize("what", ["fifo", "/dev/zero"])
def test_no_side_file_is_read_without_end(here, reply, tmp_path, command, place, what):
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(reply, folder / "a.wav")
    endless = folder / "a.json"
    os.mkfifo(endless) if what == "fifo" else endless.symlink_to(what)
    if place == "manifest":
        write_manifest(folder, stats="a.json")
    end = {"report": ("-o", tmp_path / "r.html"), "score": (), "check": ()}[command]
    target = folder / "a.wav" if command == "check" else folder
    code, out, err = here(command, target, *end)
    assert code == 0, err
    if end:
        out = (tmp_path / "r.html").read_text()
    if command != "check":
        assert "a.json" in out


def write_manifest(folder: Path, **paths: str) -> None:
    size = (folder / "a.wav").stat().st_size
    outputs = {"audio": {"path": "a.wav", "size": size}}
    outputs |= {what: {"path": path} for what, path in paths.items()}
    line = {
        "recording": "a.wav",
        "status": "done",
        "error": None,
        "input": None,
        "settings": "",
        "outputs": outputs,
        "time": "2026",
    }
    (folder / "manifest.jsonl").write_text(json.dumps(line) + "\n")


# Values that are none.


STATS = {
    "a_text": '{"real_time_factor": "fast", "outputs": {"audio": "a.wav"}}',
    "nan": '{"real_time_factor": NaN, "outputs": {"audio": "a.wav"}}',
    "infinite": '{"real_time_factor": 1, "audio_s": 1e999, "outputs": {}}',
    "huge": '{"real_time_factor": 1%s, "outputs": {}}' % ("0" * 4000),
    "steps": '{"real_time_factor": 1, "step_ms_series": ["x"], "outputs": {}}',
    "nan_step": '{"real_time_factor": 1, "step_ms_series": [NaN], "outputs": {}}',
    "channel": '{"real_time_factor": 1, "channel": 1.5, "outputs": {}}',
    "output": '{"real_time_factor": 1, "outputs": {"audio": 5}}',
    "deep": DEEP,
    "not_utf8": '{"real_time_factor": 1, "outputs": {}, "x": "\udcff"}',
    "words": '{"duration_s": 1, "words": [{"text": 1, "start_s": 0, "end_s": 1}]}',
    "nan_word": '{"duration_s": 1, "words": [{"text": "a", "start_s": NaN, '
    '"end_s": 1}]}',
    "no_end": '{"duration_s": 1, "words": [{"text": "a", "start_s": 1}]}',
}


@pytest.mark.parametrize("place", ["manifest", "beside"])
@pytest.mark.parametrize("what", STATS)
def test_a_damaged_side_file_is_named_and_left_out(here, reply, tmp_path, what, place):
    shutil.copy(reply, tmp_path / "a.wav")
    (tmp_path / "a.json").write_bytes(STATS[what].encode("utf-8", "surrogateescape"))
    if place == "manifest":
        write_manifest(tmp_path, stats="a.json")
    code, out, err = here("score", tmp_path, "--format", "json", "--vad", "energy")
    assert code == 0, err
    found = json.loads(out)
    assert found["total"]["scored"] == 1
    (note,) = found["notes"]
    assert "a.json was left out, as it is damaged" in note and len(note) < 500
    page = tmp_path / "r.html"
    code, _, err = here("report", tmp_path, "-o", page)
    assert code == 0, err
    assert "a.json was left out" in page.read_text()
    (data,) = read_data(page)
    assert data["s"] == "cut off"  # it sounds to its end
    check = ("check", tmp_path / "a.wav", "--max-rtf", "1", "--says", "x")
    code, out, err = here(*check)
    assert code == 1 and "a.json was left out" in out


def read_data(page: Path) -> list[dict]:
    """The page's data, as a browser reads it: without NaN."""
    text = page.read_text(encoding="utf-8")
    text = text.split('<script type="application/json"')[1]
    text = text.split(">", 1)[1].split("</script>")[0]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.skipif(sys.platform == "darwin", reason="names there are UTF-8")
def test_a_name_that_is_not_utf8_has_its_line_in_report_and_score(
    here, call, model, reply, tmp_path
):
    calls, out = tmp_path / "calls", tmp_path / "out"
    calls.mkdir()
    shutil.copy(call, calls / "good.wav")
    shutil.copy(call, os.fsencode(calls) + b"/b\xe9.wav")
    assert here("batch", calls, "-o", out, *model)[0] == 3
    code, _, err = here("report", out, "-o", tmp_path / "r.html")
    assert code == 0, err
    names = [entry["n"] for entry in read_data(tmp_path / "r.html")]
    assert names == ["b\udce9.wav", "good.wav"]
    assert "b\\udce9.wav" in (tmp_path / "r.html").read_text()
    for form in ("json", "csv", "table"):
        code, shown, err = here("score", out, "--format", form, "--vad", "energy")
        assert code == 0 and "\\udce9.wav" in shown, err


@pytest.mark.skipif(sys.platform == "darwin", reason="names there are UTF-8")
def test_an_output_whose_name_is_not_utf8_is_shown_and_linked(here, reply, tmp_path):
    shutil.copy(reply, os.fsencode(tmp_path) + b"/c\xe9.wav")
    code, _, err = here("report", tmp_path, "-o", tmp_path / "r.html")
    assert code == 0, err
    (entry,) = read_data(tmp_path / "r.html")
    assert (entry["n"], entry["a"]) == ("c\udce9.wav", "c%E9.wav")


LOCKS = ("5", "null", '"x"', "[1]", DEEP, '{"pid": "x", "host": []}', '{"begun": 3}')


@pytest.mark.parametrize("content", LOCKS, ids=lambda text: text[:8])
def test_a_lock_file_may_hold_anything(here, call, model, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".pplex-batch.lock").write_text(content + "\n")
    code, _, err = here("batch", call, "-o", out, *model)
    assert code == 0 and "1 done" in err


MANIFESTS = {
    "a_number": "5",
    "deep": DEEP,
    "a_surrogate": '{"recording": "\\ud800.wav", "status": "done", "input": null, '
    '"settings": "", "outputs": {"audio": {"path": "\\ud800/a.wav"}}, "time": "1"}',
    "a_nul": '{"recording": "a.wav", "status": "done", "input": {"path": "a\\u0000b"}, '
    '"settings": "", "outputs": {"audio": {"path": "a\\u0000b"}}, "time": "1"}',
    "a_long_name": '{"recording": "a.wav", "status": "done", "input": null, '
    '"settings": "", "outputs": {"audio": {"path": "%s"}}, "time": "1"}' % ("x" * 5000),
    "a_list": '{"recording": ["a"], "status": "done", "input": 3, "settings": 4, '
    '"outputs": [], "time": 1}',
    "a_size": '{"recording": "a.wav", "status": "done", "input": null, "settings": "", '
    '"outputs": {"audio": {"path": "a.wav", "size": []}}, "time": "1"}',
    "not_utf8": '{"recording": "\udcff"}',
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_may_hold_anything(here, call, model, reply, tmp_path, what):
    shutil.copy(reply, tmp_path / "a.wav")
    text = MANIFESTS[what].encode("utf-8", "surrogateescape")
    (tmp_path / "manifest.jsonl").write_bytes(text + b"\n")
    for args in (
        ("report", tmp_path, "-o", tmp_path / "r.html"),
        ("score", tmp_path, "--vad", "energy"),
        ("batch", call, "-o", tmp_path, *model, "--dry-run"),
        ("batch", call, "-o", tmp_path, *model),
        ("score", tmp_path, "--vad", "energy", "--format", "csv"),
    ):
        code, _, err = here(*args)
        assert code == 0, (args, err)


# Files of a model.


@pytest.mark.parametrize("name", ["hash_bomb.pt", "pax_sparse_voices.tgz"])
def test_a_voice_that_is_a_trap_is_refused_in_a_sentence(
    call, model, small_folder, tmp_path, name
):
    args = ["respond", call, "-o", tmp_path / "o.wav", *model]
    if name.endswith(".pt"):
        args += ["--voice", HOSTILE / name]
    else:
        folder = tmp_path / "model"
        shutil.copytree(small_folder, folder)
        shutil.rmtree(folder / "voices", ignore_errors=True)
        shutil.copy(HOSTILE / name, folder / "voices.tgz")
        args[args.index(small_folder)] = folder
    cache = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    code, _, err = pplex(*args, env=cache)
    assert code == 1 and ("not a whole" in err), err
    assert len(err.splitlines()) == 1


def test_an_output_on_a_descriptor_is_a_whole_wav(call, model, reply):
    args = ("respond", call, "-o", "/dev/fd/3", *model)
    code, out, err = pplex(*args, redirect="3>&1")
    assert code == 0, err
    assert soundfile.info(io.BytesIO(out)).frames == soundfile.info(reply).frames
