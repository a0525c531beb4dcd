"""Batches of recordings on the tiny random model: results, resuming, failures."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pplex.batch import answering, decoding
from pplex.batch import run as batch_run
from pplex.batch.answering import Answering
from pplex.batch.decoding import Failure
from pplex.batch.plan import OutputOptions, Selection
from pplex.batch.prepare import Batch
from pplex.batch.run import Summary, run_batch
from pplex.errors import PplexError
from pplex.model.sampling import SamplingConfig
from pplex.respond.manifest import read_lines
from pplex.respond.request import Settings

RATE = 24000
SAMPLING = SamplingConfig(top_k=30, text_top_k=10)
SETTINGS = Settings(voice=None, text="Plums.", sampling=SAMPLING, seed=7)


class Notes:
    """A report that remembers."""

    shows_bars = False

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done: list[str] = []
        self.errors: dict[str, str] = {}

    def note(self, message):
        self.notes.append(message)

    def loading(self, local):
        self.notes.append("loading")

    def computing(self, how):
        self.notes.append(f"compute {how}")

    def starting(self, count, audio_s):
        pass

    def finished(self, key, audio_s):
        self.done.append(key)

    def failed(self, key, error, audio_s):
        self.errors[key] = error


def record(path: Path, samples: int, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pcm = np.random.default_rng(seed).uniform(-0.3, 0.3, samples)
    soundfile.write(path, pcm.astype(np.float32), RATE)


@pytest.fixture
def calls(tmp_path) -> Path:
    """Five recordings of different lengths."""
    for idx, samples in enumerate((9000, 4000, 12001, 1920, 700)):
        record(tmp_path / "in" / f"{'ab'[idx % 2]}" / f"{idx}.wav", samples, idx)
    return tmp_path / "in"


@pytest.fixture
def batch(tmp_path, tiny):
    """A batch of ``calls`` with every output."""
    return Batch(
        selection=Selection((tmp_path / "in",), recursive=True),
        outdir=tmp_path / "out",
        outputs=OutputOptions(transcripts=("json",), tokens=True),
        settings=SETTINGS,
        model_name=str(tiny),
        offline=True,
        batch_size=3,
    )


def go(batch: Batch, **changes: object) -> tuple[Summary, Notes]:
    notes = Notes()
    return run_batch(replace(batch, **changes), notes), notes


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, by its relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.jsonl"
    }


def last_lines(outdir: Path) -> dict[str, dict]:
    return {x["recording"]: x for x in read_lines(outdir / "manifest.jsonl")}


# Results


def test_every_recording_gets_its_outputs_and_its_line(calls, batch):
    summary, notes = go(batch, outputs=replace(batch.outputs, stats=True))
    assert (summary.done, summary.skipped, summary.failed) == (5, 0, {})
    assert summary.audio_s == pytest.approx(27621 / RATE, abs=0.01)
    lines = last_lines(batch.outdir)
    assert len(lines) == 5
    for key, line in lines.items():
        source, output = calls / key, batch.outdir / key
        assert soundfile.info(output).frames == soundfile.info(source).frames
        assert {o["path"] for o in line["outputs"].values()} == {
            key,
            key.replace(".wav", ".transcript.json"),
            key.replace(".wav", ".stats.json"),
            key.replace(".wav", ".npz"),
        }
        stats = json.loads((output.with_suffix(".stats.json")).read_text())
        assert stats["seed"] == line["seed"]
        parts = ("read_s", "encode_s", "steps_s", "decode_s", "write_s")
        assert stats["total_s"] == pytest.approx(sum(stats[p] for p in parts))
    assert not list(batch.outdir.rglob(".*"))


def test_a_result_is_what_respond_gives_for_the_recordings_seed(
    calls, batch, run, tmp_path
):
    go(batch)
    for key, line in last_lines(batch.outdir).items():
        alone = tmp_path / "alone.wav"
        done = run(
            *("respond", calls / key, "-o", alone, "--model", batch.model_name),
            *("--seed", line["seed"], "--prompt", "Plums.", "--top-k", 30),
            *("--text-top-k", 10, "--tokens", tmp_path / "alone.npz"),
            *("--transcript", tmp_path / "alone.json", "--overwrite"),
        )
        assert done.exit_code == 0, done.stderr
        ours = batch.outdir / key
        assert ours.read_bytes() == alone.read_bytes()
        for suffix in (".npz", ".transcript.json"):
            other = alone.with_suffix(suffix.replace(".transcript", ""))
            assert ours.with_suffix(suffix).read_bytes() == other.read_bytes()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_result_does_not_depend_on_its_company(calls, batch, tmp_path, size):
    go(batch)
    alone = {}
    for key in ("a/0.wav", "b/1.wav"):
        selection = Selection((calls,), True, glob=key)
        go(batch, outdir=tmp_path / "alone", selection=selection)
        alone[key] = (tmp_path / "alone" / key).read_bytes()
    go(batch, outdir=tmp_path / "other", batch_size=size)
    assert contents(batch.outdir) == contents(tmp_path / "other")
    assert alone == {key: (batch.outdir / key).read_bytes() for key in alone}


def test_prompts_are_computed_once_for_each_voice_and_role(
    calls, batch, tmp_path, monkeypatch
):
    rows = [
        {"input": str(calls / key), "output": f"{v}/{key}", "voice": v}
        for key in ("a/0.wav", "b/1.wav", "a/2.wav")
        for v in ("NATF0", "NATM0")
    ]
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("\n".join(map(json.dumps, rows)))
    prompts = []
    open_role = decoding.open_role
    monkeypatch.setattr(
        decoding, "open_role", lambda *a: prompts.append(a) or open_role(*a)
    )
    summary, _ = go(batch, selection=Selection(jobs=jobs))
    assert (summary.done, len(prompts)) == (6, 2)
    for key in ("a/0.wav", "b/1.wav"):
        one, other = batch.outdir / "NATF0" / key, batch.outdir / "NATM0" / key
        assert one.read_bytes() != other.read_bytes()


def test_extra_columns_are_kept(calls, batch, tmp_path):
    jobs = tmp_path / "jobs.csv"
    jobs.write_text("input,speaker\nin/a/0.wav,Ann\n")
    go(batch, selection=Selection(jobs=jobs))
    assert last_lines(batch.outdir)["in/a/0.wav"]["extra"] == {"speaker": "Ann"}


def test_results_may_lie_beside_the_recordings(calls, batch):
    for folder in ("1", "2"):
        record(calls / "bench" / folder / "input.wav", 2000)
    tree = calls / "bench"
    selection = Selection((tree,), True, glob="input.wav")
    wanted = OutputOptions(layout="agent", name="output.wav", transcripts=("json",))
    for expected in ((2, 0), (0, 2)):
        done, _ = go(batch, selection=selection, outdir=tree, outputs=wanted)
        assert (done.done, done.skipped) == expected
    names = {p.name for p in (tree / "1").iterdir()}
    assert names == {"input.wav", "output.wav", "output.transcript.json"}


class InFours:
    """A codec that codes four recordings together, one after the other."""

    group, chunk_frames, launcher, form, version = 4, 8, None, "", ""

    def __init__(self, codec):
        self._codec = codec

    def make_state(self, saved=None):
        return [self._codec.make_state() for _ in range(4)]

    def encode_next(self, parts, state):
        made = map(self._codec.encode, parts, state)
        return lambda codes=list(made): codes

    def decode_next(self, parts, state):
        made = map(self._codec.decode, parts, state)
        return lambda sounds=list(made): sounds


@pytest.mark.parametrize("coded", [lambda codec: codec, InFours])
def test_who_has_so_many_ahead_as_it_wants_never_waits_for_another(
    tmp_path, batch, monkeypatch, coded
):
    for idx in range(250):
        record(tmp_path / "in" / f"{idx:03}.wav", 4000, idx)
    load, run = batch_run.load, Answering.run

    def loaded(*args, **options):
        model = load(*args, **options)
        model.engine.codec = coded(model.engine.codec)
        return model

    def run_fed(self, tasks, done):
        given = queue.Queue()
        for task in itertools.islice(tasks, self.batch_size + self.ahead):
            given.put(task)

        def fed():
            with contextlib.suppress(queue.Empty):
                while (task := given.get(timeout=10)) is not None:
                    yield task

        run(self, fed(), lambda result: (done(result), given.put(next(tasks, None))))

    monkeypatch.setattr(batch_run, "load", loaded)
    monkeypatch.setattr(Answering, "run", run_fed)
    summary, _ = go(batch, batch_size=100, outputs=OutputOptions())
    assert summary.done == 250


@pytest.mark.parametrize("takes", [0, 1, 2])
def test_few_rows_idle_and_takes_follow_each_other(tmp_path, batch, monkeypatch, takes):
    order = []
    for idx in range(24):
        record(tmp_path / "in" / f"{idx:02}.wav", 2000 * (1 + idx * 7 % 24), idx)
    monkeypatch.setattr(Answering, "run", lambda self, tasks, done: order.extend(tasks))
    go(batch, batch_size=8, outputs=OutputOptions(takes=takes))
    lengths = [round(task.seconds * RATE) for task in order]
    assert len(order) == 24 * max(1, takes)
    assert lengths[-1] == 2000
    if takes < 2:
        assert lengths[8:] == sorted(lengths[8:], reverse=True)
        assert max(lengths) in lengths[:8]
        assert min(lengths[:8]) < max(lengths[8:])
        return
    for one, other in zip(order[::2], order[1::2], strict=True):
        assert one.request.source == other.request.source


def test_what_rows_that_end_together_need_next_is_read_before(
    tmp_path, batch, monkeypatch
):
    for idx in range(150):
        record(tmp_path / "in" / f"{idx:03}.wav", 1000 + idx, idx)
    read, most = [], 0
    inner = answering.read_request

    def noted(*args):
        read.append(args)
        return inner(*args)

    def counted(self, jobs):
        nonlocal most
        self.batch_size = 100
        for count, job in enumerate(jobs, 1):
            time.sleep(0.3 if count == 20 else 0)
            if count == 20:
                most = len(read)
            yield Failure(job.key, "not tried")

    monkeypatch.setattr(answering, "read_request", noted)
    monkeypatch.setattr(decoding.Decoder, "run", counted)
    summary, _ = go(batch)
    assert len(summary.failed) == 150
    assert 110 <= most <= 125


def test_few_answers_of_long_recordings_wait_to_be_written(
    tmp_path, batch, monkeypatch
):
    """Each holds the sound of both sides."""
    for idx in range(24):
        record(tmp_path / "in" / f"{idx:03}.wav", 3000, idx)
    monkeypatch.setattr(answering, "_BEHIND_S", 9.0)  # a short one counts as a second
    monkeypatch.setattr(answering, "_WRITTEN", 5)
    write, add, waited = Answering._write, answering.Behind.add, []

    def slow(self, begun, answered):
        time.sleep(0.2)
        return write(self, begun, answered)

    def noted(self, work, *args, **options):
        add(self, work, *args, **options)
        if work.__name__ == "slow":
            waited.append(len(self._waiting))

    monkeypatch.setattr(Answering, "_write", slow)
    monkeypatch.setattr(answering.Behind, "add", noted)
    summary, _ = go(batch, outputs=OutputOptions())
    assert (summary.done, max(waited)) == (24, 9)


def test_answers_computed_in_another_way_are_named_once(calls, batch, monkeypatch):
    _, notes = go(batch)
    assert not any("computed on" in note for note in notes.notes)
    for idx in (5, 6):
        record(calls / f"{idx}.wav", 2000, idx)
    info = decoding.model_info
    monkeypatch.setattr(
        decoding, "model_info", lambda model: replace(info(model), device="gpu (X)")
    )
    _, notes = go(batch)
    (note,) = (note for note in notes.notes if "computed on" in note)
    assert "was computed on gpu (X), float32" in note and "others here on cpu" in note


# Failures


def test_one_bad_file_spoils_nothing(calls, batch):
    (calls / "bad.wav").write_text("no sound")
    (calls / "empty.wav").touch()
    pcm = np.array([0.1, np.nan, 0.1], np.float32)
    soundfile.write(calls / "nan.wav", pcm, RATE, subtype="FLOAT")
    summary, notes = go(batch)
    assert summary.done == 5
    assert set(summary.failed) == {"bad.wav", "empty.wav", "nan.wav"}
    assert summary.failed == notes.errors
    assert "NaN" in notes.errors["nan.wav"]
    lines = last_lines(batch.outdir)
    assert lines["nan.wav"]["status"] == "failed"
    assert lines["nan.wav"]["error"] == notes.errors["nan.wav"]
    assert not (batch.outdir / "nan.wav").exists()


def test_what_failed_is_tried_again_when_asked_or_changed(calls, batch):
    (calls / "bad.wav").write_text("no sound")
    (calls / "worse.wav").write_text("no sound")
    go(batch)
    summary, notes = go(batch)
    assert (summary.skipped, summary.failed_before, notes.notes) == (5, 2, [])
    record(calls / "bad.wav", 3000)
    summary, _ = go(batch)
    assert (summary.done, summary.failed_before) == (1, 1)
    summary, notes = go(batch, retry_failed=True)
    assert (summary.done, summary.failed_before) == (0, 0)
    assert list(notes.errors) == ["worse.wav"]


def test_fail_fast_stops_at_the_first_failure(calls, batch):
    for name in ("bad.wav", "worse.wav"):
        (calls / name).write_text("no sound")
    summary, notes = go(batch, fail_fast=True)
    assert (summary.done, len(summary.failed), summary.not_run) == (0, 1, 6)
    summary, _ = go(batch)
    assert (summary.done, summary.failed_before) == (5, 1)


def test_a_role_that_does_not_fit_fails_by_itself(calls, batch, tmp_path):
    jobs = tmp_path / "jobs.jsonl"
    rows = [{"input": "in/a/0.wav", "prompt": "far too long " * 50}]
    rows.append({"input": "in/b/1.wav"})
    jobs.write_text("\n".join(map(json.dumps, rows)))
    summary, notes = go(batch, selection=Selection(jobs=jobs))
    assert summary.done == 1
    assert "tokens" in notes.errors["in/a/0.wav"]


def test_an_unknown_voice_stops_before_anything_runs(calls, batch):
    settings = replace(SETTINGS, voice="NATX9")
    with pytest.raises(PplexError, match="'NATX9'"):
        go(batch, settings=settings)
    assert not batch.outdir.exists()


def test_out_of_memory_halves_the_batch_and_does_the_rest_again(
    calls, batch, monkeypatch
):
    go(batch)
    expected = contents(batch.outdir)
    shutil.rmtree(batch.outdir)
    converse_many = decoding.converse_many
    sizes = []

    def short_of_memory(model, items, sampling, *, batch_size):
        sizes.append(batch_size)
        for idx, result in enumerate(
            converse_many(model, items, sampling, batch_size=batch_size)
        ):
            if batch_size > 1 and idx == 1:
                raise RuntimeError("[malloc] Unable to allocate 99 bytes.")
            yield result

    monkeypatch.setattr(decoding, "converse_many", short_of_memory)
    summary, notes = go(batch, batch_size=4)
    assert sizes == [4, 2, 1]
    assert (summary.done, summary.batch_size) == (5, 1)
    assert sum("out of memory" in note for note in notes.notes) == 2
    assert contents(batch.outdir) == expected


def test_one_that_never_fits_in_memory_fails_alone(calls, batch, monkeypatch):
    converse_many = decoding.converse_many

    def short_of_memory(model, items, sampling, *, batch_size):
        def checked():
            for item in items:
                if item.sound.num_samples > 12000:
                    raise MemoryError("too much")
                yield item

        yield from converse_many(model, checked(), sampling, batch_size=batch_size)

    monkeypatch.setattr(decoding, "converse_many", short_of_memory)
    summary, notes = go(batch)
    assert summary.done == 4
    assert "memory" in notes.errors["a/2.wav"]


def test_a_fault_of_our_own_is_not_taken_for_memory(calls, batch, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("[matmul] shapes do not fit")

    monkeypatch.setattr(decoding, "converse_many", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        go(batch)


# Again


def test_what_is_done_is_skipped_without_loading_a_model(calls, batch):
    go(batch)
    before = contents(batch.outdir)
    summary, notes = go(batch)
    assert (summary.done, summary.skipped, notes.notes) == (0, 5, [])
    assert contents(batch.outdir) == before


def test_a_changed_recording_and_a_new_one_are_done(calls, batch):
    go(batch)
    record(calls / "a/0.wav", 5000, seed=9)
    record(calls / "new.wav", 2000)
    summary, notes = go(batch)
    assert set(notes.done) == {"a/0.wav", "new.wav"}
    assert soundfile.info(batch.outdir / "a/0.wav").frames == 5000


def test_a_lost_output_is_made_again(calls, batch):
    go(batch)
    before = contents(batch.outdir)
    (batch.outdir / "a/0.npz").unlink()
    summary, notes = go(batch)
    assert (set(notes.done), summary.replaced) == ({"a/0.wav"}, 1)
    assert contents(batch.outdir) == before


def test_what_somebody_changed_is_kept_until_it_may_be_overwritten(calls, batch):
    """Also where its recording, or the settings, changed as well."""
    go(batch)
    before = contents(batch.outdir)
    path = batch.outdir / "b/1.transcript.json"
    path.write_text("mine")
    record(calls / "a/0.wav", 5000, seed=9)
    for changes in ({}, {"settings": replace(SETTINGS, seed=8)}):
        summary, _ = go(batch, **changes)
        assert summary.kept.changed == ["b/1.wav"]
        assert path.read_text() == "mine"
        assert (batch.outdir / "b/1.wav").read_bytes() == before["b/1.wav"]
    record(calls / "b/1.wav", 5000, seed=9)
    assert go(batch)[0].kept.changed == ["b/1.wav"]
    summary, _ = go(batch, overwrite=True)
    assert (summary.done, summary.replaced, len(summary.kept)) == (5, 5, 0)
    assert path.read_text() != "mine"


def test_a_change_that_hides_behind_size_and_time_is_not_lost(calls, batch):
    go(batch)
    path = batch.outdir / "b/1.wav"
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    record(calls / "b/1.wav", 5000, seed=9)
    summary, notes = go(batch)
    assert "was changed by somebody" in notes.errors["b/1.wav"]
    assert path.read_bytes() == content


def test_what_is_changed_while_the_batch_runs_is_kept(calls, batch, monkeypatch):
    go(batch)
    path = batch.outdir / "b/1.npz"
    record(calls / "b/1.wav", 5000, seed=9)
    converse_many = decoding.converse_many

    def meanwhile(*args, **options):
        path.write_text("mine")
        yield from converse_many(*args, **options)

    monkeypatch.setattr(decoding, "converse_many", meanwhile)
    before = contents(batch.outdir) | {"b/1.npz": b"mine"}
    summary, notes = go(batch)
    assert "was changed by somebody" in notes.errors["b/1.wav"]
    assert contents(batch.outdir) == before


def test_what_a_manifest_claims_but_no_run_wrote_is_kept(calls, batch):
    go(batch)
    path = batch.outdir / "a/0.wav"
    path.write_text("not ours")
    manifest = batch.outdir / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line in lines:
        line["outputs"] = {k: {"path": o["path"]} for k, o in line["outputs"].items()}
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary, _ = go(batch)
    assert len(summary.kept.changed) == 5
    assert path.read_text() == "not ours"


def test_what_answers_another_recording_of_that_name_is_kept(calls, batch, tmp_path):
    go(batch, selection=Selection((calls / "a",)))
    before = contents(batch.outdir)
    record(tmp_path / "other/0.wav", 3000, seed=4)
    summary, _ = go(batch, selection=Selection((tmp_path / "other",)))
    assert (summary.kept.others, contents(batch.outdir)) == (["0.wav"], before)
    (calls / "a/0.wav").unlink()  # now it can only be the same one, moved
    summary, _ = go(batch, selection=Selection((tmp_path / "other",)))
    assert (summary.done, summary.replaced) == (1, 1)


def test_the_output_of_a_recording_of_another_name_is_kept(calls, batch, tmp_path):
    """Seeds and all else may be the same, and the name of the output as well."""
    record(calls / "x.wav", 2000, seed=5)
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"input": "in/x.wav", "seed": 3}')
    go(batch, selection=Selection(jobs=jobs))
    before = contents(batch.outdir)
    (calls / "x.wav").rename(calls / "x.WAV")
    jobs.write_text('{"input": "in/x.WAV", "seed": 3}')
    summary, _ = go(batch, selection=Selection(jobs=jobs))
    assert (summary.kept.others, contents(batch.outdir)) == (["in/x.WAV"], before)


def test_an_output_that_a_killed_run_named_is_known_with_its_bytes(calls, batch):
    """The manifest does not tell of it yet; the lock does."""
    from pplex.respond.lock import LOCK_NAME
    from pplex.respond.manifest import file_print

    go(batch)
    expected = contents(batch.outdir)
    lines = read_lines(batch.outdir / "manifest.jsonl")
    killed = [line for line in lines if line["recording"] in ("a/0.wav", "b/1.wav")]
    begun = [
        {"begun": o | {"recording": x["recording"], "settings": x["settings"]}}
        for x in killed
        for o in x["outputs"].values()
    ]
    (batch.outdir / LOCK_NAME).write_text("".join(json.dumps(x) + "\n" for x in begun))
    (batch.outdir / "manifest.jsonl").unlink()
    for key in set(last_names(batch.outdir)) - {o["begun"]["path"] for o in begun}:
        (batch.outdir / key).unlink()
    path = batch.outdir / "b/1.npz"
    path.write_text("mine")
    for _ in range(2):  # the second time the lock is gone
        summary, _ = go(batch)
        assert summary.kept.changed == ["b/1.wav"]
        assert path.read_text() == "mine"
    assert contents(batch.outdir) == expected | {"b/1.npz": b"mine"}
    assert file_print(batch.outdir / "a/0.wav").size


def last_names(outdir: Path) -> list[str]:
    return [name for name in contents(outdir) if not name.startswith(".")]


@pytest.mark.parametrize(
    "change",
    [
        {"settings": replace(SETTINGS, seed=8)},
        {"settings": replace(SETTINGS, text="Pears.")},
        {"settings": replace(SETTINGS, voice="NATM0")},
        {"settings": replace(SETTINGS, tail=0.1)},
        {"settings": replace(SETTINGS, sampling=SamplingConfig(top_k=3))},
        {"outputs": OutputOptions(transcripts=("srt",), tokens=True)},
        {"settings": replace(SETTINGS, tail="auto")},
        {"outputs": OutputOptions(layout="agent", transcripts=("json",), tokens=True)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_answers_of_other_settings_are_kept_until_they_may_be_overwritten(
    calls, batch, change
):
    selection = Selection((calls / "b",))
    go(batch, selection=selection)
    before = contents(batch.outdir)
    record(calls / "b/new.wav", 2000)
    summary, _ = go(batch, selection=selection, **change)
    assert summary.kept.other_settings == ["1.wav", "3.wav"]
    assert (summary.done, summary.skipped) == (1, 0)
    assert before.items() <= contents(batch.outdir).items()
    summary, _ = go(batch, selection=selection, overwrite=True, **change)
    assert (summary.done, len(summary.kept)) == (3, 0)
    summary, _ = go(batch, selection=selection, **change)
    assert (summary.skipped, len(summary.kept)) == (3, 0)


def test_with_other_settings_what_has_no_outputs_is_done(calls, batch):
    selection = Selection((calls / "b",))
    go(batch, selection=selection)
    for path in batch.outdir.glob("1.*"):
        path.unlink()
    settings = replace(SETTINGS, seed=8)
    summary, notes = go(batch, selection=selection, settings=settings)
    assert (notes.done, summary.kept.other_settings) == (["1.wav"], ["3.wav"])


def test_another_voice_under_the_same_name_counts(calls, batch, data, tmp_path):
    voice = tmp_path / "me.wav"
    settings = replace(SETTINGS, voice=str(voice))
    selection = Selection((calls / "b",))
    for name, done in (("voice_NATF0.wav", 2), ("voice_NATM0.wav", 0)):
        shutil.copy(data / "respond" / name, voice)
        summary, _ = go(batch, selection=selection, settings=settings)
        assert (summary.done, len(summary.kept.other_settings)) == (done, 2 - done)


def test_files_of_others_are_not_replaced_unasked(calls, batch):
    (batch.outdir / "a").mkdir(parents=True)
    (batch.outdir / "a/0.wav").write_text("mine")
    with pytest.raises(PplexError, match="0.wav exists already"):
        go(batch)
    assert contents(batch.outdir) == {"a/0.wav": b"mine"}
    summary, _ = go(batch, overwrite=True)
    assert summary.done == 5


def test_a_name_in_another_form_of_unicode_is_the_same_recording(calls, batch):
    """Macs take names apart, and a folder may have been copied there."""
    (calls / "b/1.wav").rename(calls / "b/\u00e9.wav")
    record(calls / "b/u\u0308.wav", 700)
    selection = Selection((calls / "b",))
    go(batch, selection=selection)
    for folder in (calls / "b", batch.outdir):
        for path in list(folder.iterdir()):
            form = "NFC" if path.name.startswith("u") else "NFD"
            path.rename(path.with_name(unicodedata.normalize(form, path.name)))
    summary, _ = go(batch, selection=selection)
    assert (summary.done, summary.skipped, len(summary.kept)) == (0, 3, 0)


def test_shards_together_do_it_all(calls, batch, tmp_path):
    go(batch)
    other = tmp_path / "other"
    done = [go(batch, outdir=other, shard=(k, 3))[0].done for k in (1, 2, 3)]
    assert sum(done) == 5 and max(done) < 5
    summary, _ = go(batch, outdir=other)
    assert (summary.done, summary.skipped) == (0, 5)
    assert len(read_lines(other / "manifest.jsonl")) == 5
    for manifest in other.glob("manifest.*-of-*"):
        manifest.unlink()
    assert contents(other) == contents(batch.outdir)
    assert go(batch, outdir=other)[0].skipped == 5


# Killed

DRIVER = """
import sys, pickle, time
from pplex.batch import run as batch
from pplex.batch import records
import test_batch
if sys.argv[2] == "slow":
    write = records.write_outputs
    def slow(*args, **options):
        write(*args, **options)
        time.sleep(0.05)
    records.write_outputs = slow
batch.run_batch(pickle.loads(bytes.fromhex(sys.argv[1])), test_batch.Notes())
"""


def start(batch: Batch, speed: str) -> subprocess.Popen:
    import pickle

    code = [sys.executable, "-c", DRIVER, pickle.dumps(batch).hex(), speed]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    # Not from where pplex's sources may lie, which have no compiled parts.
    return subprocess.Popen(code, env=env, cwd=Path(__file__).parent)


def test_killed_at_random_and_run_again_the_bytes_are_the_same(calls, batch, tmp_path):
    for idx in range(12):
        record(calls / "more" / f"{idx}.wav", 3000 + idx, idx)
    go(batch)
    other = replace(batch, outdir=tmp_path / "other")
    moments = random.Random(5)
    for _ in range(3):
        process = start(other, "slow")
        begin = time.monotonic()
        while not list(other.outdir.glob("**/*.wav")) and process.poll() is None:
            assert time.monotonic() < begin + 60
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    (other.outdir / f".{'x' * 48}.pplex-0123abcd.tmp").touch()
    summary, _ = go(other)
    assert summary.done + summary.skipped == 17
    assert contents(other.outdir) == contents(batch.outdir)


def test_a_second_run_on_the_same_folder_is_refused(calls, batch):
    from pplex.respond.lock import FolderLock

    batch.outdir.mkdir()
    lock = FolderLock(batch.outdir, None)
    with pytest.raises(PplexError, match="another run of pplex batch"):
        go(batch)
    lock.release(ended=True)
    assert go(batch)[0].done == 5


def test_gpus_that_idle_are_named_with_what_uses_them(calls, batch, monkeypatch):
    monkeypatch.setattr("pplex.batch.run.num_gpus", lambda: 4)
    _, notes = go(batch)
    assert sum("idle (3); --ray=local" in note for note in notes.notes) == 1
