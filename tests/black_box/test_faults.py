"""What fails around the program: disks, links, names, other runs. Nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
from piped import RATE, noise, start

from pplex.respond.manifest import read_lines

LIMIT = 60_000  # bytes that a file may have under `limited`


@pytest.fixture(scope="module")
def model(small_folder):
    return ("--model", small_folder, "--offline", "--prompt", "")


def record(path: Path, seconds: float = 0.4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(round(RATE * seconds)), RATE)
    return path


def pplex(*args: object, **options) -> tuple[int, str]:
    """Run to the end; exit code and messages, which are never a traceback."""
    process = start(*args, **options)
    _, err = process.communicate(timeout=120)
    assert b"Traceback" not in err, err.decode()
    return process.returncode, err.decode()


def limited() -> None:
    """No file of this process may grow beyond LIMIT, as on a disk that fills up."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@pytest.mark.parametrize("source", ["call.wav", "-"])
def test_a_file_that_cannot_grow_leaves_the_old_one(model, tmp_path, source):
    call = record(tmp_path / "call.wav", 2.0)
    out = record(tmp_path / "o.wav")
    before = out.read_bytes()
    source = call if source != "-" else "-"
    with call.open("rb") as stdin:
        args = ("respond", source, "-o", out, "--overwrite", *model)
        code, err = pplex(*args, stdin=stdin, preexec_fn=limited)
    assert code == 1 and f"cannot write {out}: File too large" in err
    assert out.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"call.wav", "o.wav"}


def test_a_side_file_that_cannot_grow_leaves_none_beside_it(model, tmp_path):
    """Sound without the conversation's state would be in the next run's way."""
    record(tmp_path / "in" / "call.wav")
    out, state = tmp_path / "out" / "o.wav", tmp_path / "out" / "o.safetensors"
    out.parent.mkdir()
    args = (tmp_path / "in" / "call.wav", "-o", out, "--save-state", state, *model)
    wanted = "--transcript", "all", "--stats", out.with_suffix(".stats.json")
    for takes in ((), ("--takes", 2)):
        code, err = pplex("respond", *args, *wanted, *takes, preexec_fn=limited)
        failed = state if not takes else state.with_name("o.1.safetensors")
        assert code == 1 and f"cannot write {failed}: File too large" in err
        assert not list(out.parent.iterdir())


def test_a_stream_whose_state_cannot_grow_keeps_its_sound(model, tmp_path):
    call, out = record(tmp_path / "call.wav"), tmp_path / "o.wav"
    args = "respond", "-", "-o", out, "--save-state", tmp_path / "o.safetensors"
    with call.open("rb") as stdin:
        code, err = pplex(*args, *model, stdin=stdin, preexec_fn=limited)
    assert code == 1 and "o.safetensors: File too large; the sound was written" in err
    assert {p.name for p in tmp_path.iterdir()} == {"call.wav", "o.wav"}


def test_a_batch_whose_files_cannot_grow_loses_only_those(model, tmp_path):
    for idx in range(4):
        record(tmp_path / "in" / f"{idx}.wav", 0.3)
    record(tmp_path / "in" / "long.wav", 2.0)
    args = ("batch", tmp_path / "in", "-o", tmp_path / "out", *model)
    code, err = pplex(*args, preexec_fn=limited)
    assert code == 3 and "4 done, 0 skipped, 1 failed" in err
    names = {f"{idx}.wav" for idx in range(4)} | {"manifest.jsonl"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    code, err = pplex(*args, "--retry-failed")
    assert code == 0 and "1 done, 4 skipped, 0 failed" in err


def test_links_in_a_circle_are_refused_in_a_sentence(model, tmp_path):
    call, loop = record(tmp_path / "call.wav"), tmp_path / "loop.wav"
    loop.symlink_to("loop.wav")
    for args in ((call, "-o", loop), (loop, "-o", tmp_path / "o.wav")):
        code, err = pplex("respond", *args, *model)
        assert code == 1 and "Too many levels of symbolic links" in err
    code, err = pplex("batch", tmp_path, "-o", tmp_path / "out", *model)
    assert code == 3 and "1 done, 0 skipped, 1 failed" in err


def test_a_tree_of_links_is_answered_once(model, tmp_path):
    record(tmp_path / "in" / "a" / "x.wav")
    (tmp_path / "in" / "a" / "up").symlink_to("..")
    (tmp_path / "in" / "dead.wav").symlink_to("gone.wav")
    (tmp_path / "real").mkdir()
    out = tmp_path / "out"
    out.symlink_to("real")
    args = ("batch", tmp_path / "in", "-o", out, "--recursive", *model)
    code, err = pplex(*args)
    assert code == 3 and "dead.wav does not exist" in err
    assert out.is_symlink()
    assert [str(p.relative_to(out)) for p in out.rglob("*.wav")] == ["a/x.wav"]


NAMES = [
    b"a b.wav",
    b"two\nlines.wav",
    "Grüße 你好.wav".encode(),
    "e\u0301.wav".encode(),
    b"q'u\"o;$(x)`.wav",
    b"-o.wav",
    b"%s {0}.wav",
    b"x" * 240 + b".wav",
]
NOT_TEXT = [] if sys.platform == "darwin" else [b"caf\xe9.wav"]  # names there are UTF-8


def test_names_of_all_kinds_are_answered_alike(model, tmp_path):
    """Those that are no text, or too long with what is added, fail by themselves."""
    folder = tmp_path / "in \n é"
    content = record(tmp_path / "call.wav").read_bytes()
    folder.mkdir()
    for name in [*NAMES, *NOT_TEXT]:
        (folder / os.fsdecode(name)).write_bytes(content)
    out = tmp_path / "out \n é"
    code, err = pplex(
        "batch", folder, "-o", out, *model, "--greedy", "--transcript", "json"
    )
    assert code == 3, err
    status = {x["recording"]: x["status"] for x in read_lines(out / "manifest.jsonl")}
    assert sorted(status) == sorted(map(os.fsdecode, [*NAMES, *NOT_TEXT]))
    bad = {name for name, how in status.items() if how == "failed"}
    assert bad == {*map(os.fsdecode, [*NOT_TEXT, NAMES[-1]])}
    replies = {(out / os.fsdecode(name)).read_bytes() for name in NAMES[:-1]}
    assert len(replies) == 1
    for name in NAMES[:-1]:
        one = tmp_path / "one" / os.fsdecode(name)
        one.parent.mkdir(exist_ok=True)
        source = folder / os.fsdecode(name)
        stats = one.with_suffix(".json")
        args = ("respond", source, "-o", one, *model, "--greedy", "--stats", stats)
        assert pplex(*args)[0] == 0
        assert {one.read_bytes()} == replies
        assert json.loads(stats.read_text())["input"] == str(source)


def test_a_name_that_is_too_long_is_refused_in_a_sentence(model, tmp_path):
    call, long = record(tmp_path / "call.wav"), "y" * 260
    for args in (
        ("respond", call, "-o", tmp_path / f"{long}.wav", *model),
        ("respond", call, "-o", tmp_path / "o.wav", "--voice", f"{long}.wav", *model),
        ("respond", call, "-o", tmp_path / "o.wav", "--model", long, "--offline"),
        ("respond", tmp_path / f"{long}.wav", "-o", tmp_path / "o.wav", *model),
        ("batch", tmp_path / long, "-o", tmp_path / "out", *model),
        ("batch", tmp_path, "-o", tmp_path / long, *model),
        ("models", "info", long),
    ):
        code, err = pplex(*args)
        assert code in (1, 2) and err.startswith(("Error:", "Usage:")), err
    assert [p.name for p in tmp_path.iterdir()] == ["call.wav"]


def test_of_runs_with_one_output_one_wins_and_says_so(model, tmp_path):
    call, out = record(tmp_path / "call.wav", 2.0), tmp_path / "o.wav"
    runs = [
        start("respond", call, "-o", out, "--seed", seed, *model, "-q")
        for seed in (1, 2, 3)
    ]
    ends = [(run.communicate(timeout=120)[1].decode(), run.returncode) for run in runs]
    winners = [idx for idx, (_, code) in enumerate(ends) if code == 0]
    assert len(winners) == 1
    assert all("exists already" in err for err, code in ends if code)
    alone = tmp_path / "alone.wav"
    pplex("respond", call, "-o", alone, "--seed", winners[0] + 1, *model)
    assert out.read_bytes() == alone.read_bytes()
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"call.wav", "o.wav", "alone.wav"}


JUMPING = """
import itertools, random, sys, time
hours = random.Random(1)
real = time.time
time.time = lambda: real() + 3600 * hours.uniform(-1000, 1000)
time.time_ns = lambda: int(1e9 * time.time())
from pplex.cli.main import cli
cli(sys.argv[1:])
"""


def test_a_wall_clock_that_jumps_changes_no_figure(model, tmp_path):
    call = record(tmp_path / "call.wav", 1.0)
    stats = tmp_path / "s.json"
    args = ["respond", call, "-o", tmp_path / "o.wav", "--stats", stats, *model]
    begin = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", JUMPING, *map(str, args)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    spent = time.monotonic() - begin
    found = json.loads(stats.read_text())
    length = {"audio_s", "tail_s"}
    times = {n: s for n, s in found.items() if n.endswith("_s") and n not in length}
    assert times and all(0 <= seconds <= spent for seconds in times.values()), times
    pplex("respond", call, "-o", tmp_path / "calm.wav", *model)
    assert (tmp_path / "o.wav").read_bytes() == (tmp_path / "calm.wav").read_bytes()
