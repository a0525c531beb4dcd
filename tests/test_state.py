"""A conversation that is saved goes on as if it had not stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
from small import speech

import pplex
from pplex.audio.files import Samples
from pplex.audio.streams import LiveFrame
from pplex.checkpoint.hub import resolve
from pplex.checkpoint.safetensors import TensorSpec, write_tensors
from pplex.conversation.answer import Answer
from pplex.conversation.prompts import open_role
from pplex.conversation.scheduler import converse_live, converse_many
from pplex.conversation.session import Model, load
from pplex.conversation.state import Saving, read_notes, read_state, start_from
from pplex.conversation.tracks import Conversation
from pplex.engine.base import Start
from pplex.errors import PplexError
from pplex.model.sampling import SamplingConfig

RATE, FRAME = 24000, 1920
CUT = 21 * FRAME + 700  # within a frame


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> Path:
    """A recording, ``ab.wav``, and its parts."""
    folder = tmp_path_factory.mktemp("calls")
    pcm = (speech(60).reshape(-1)[:-300] * 32767).astype(np.int16)
    for name, part in (("ab", pcm), ("a", pcm[:CUT]), ("b", pcm[CUT:])):
        soundfile.write(folder / f"{name}.wav", part, RATE, subtype="PCM_16")
    return folder


@pytest.fixture
def answer(run, tiny, calls, tmp_path):
    """Answer one of ``calls``: samples, tokens and words."""

    def respond(name: str, *options: object):
        reply = tmp_path / f"{name}.reply.wav"
        files = ("--tokens", tmp_path / f"{name}.npz", "--overwrite")
        line = ("respond", calls / f"{name}.wav", "-o", reply, "-m", tiny, *files)
        done = run(*line, *options)
        assert done.exit_code == 0, done.stderr
        with np.load(tmp_path / f"{name}.npz") as archive:
            tokens = dict(archive)
        return soundfile.read(reply, dtype="int16")[0], tokens, done.stderr

    return respond


def assert_joined(parts, whole) -> None:
    """That two answers are one: samples, and tokens but for the frame heard twice."""
    np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), whole[0])
    for name in ("text", "agent"):
        tokens = np.concatenate([p[1][name] for p in parts], axis=-1)
        np.testing.assert_array_equal(tokens, whole[1][name])


def test_answering_a_and_then_b_is_answering_both(answer, tmp_path):
    state = tmp_path / "a.safetensors"
    a = answer("a", "--seed", 7, "--voice", "NATM0", "--save-state", state)
    size = round(state.stat().st_size / 1e3)
    assert f"a.safetensors: 1.7 s of conversation, {size} kB" in a[2]
    whole = answer("ab", "--seed", 7, "--voice", "NATM0")
    content = state.read_bytes()
    b = answer("b", "--resume", state, "--stats", tmp_path / "b.json")
    assert_joined([a, b], whole)
    stats = json.loads((tmp_path / "b.json").read_text())
    assert stats["voice"] == "NATM0" and stats["seed"] == 7
    assert stats["resume"] == str(state)
    # Another try, and the same bytes of the same run.
    other, *_ = answer("b", "--resume", state, "--seed", 8)
    assert len(other) == len(b[0]) and (other != b[0]).any()
    answer("a", "--seed", 7, "--voice", "NATM0", "--save-state", state)
    assert state.read_bytes() == content


def test_the_model_is_the_conversations_own(answer, run, calls, tmp_path, monkeypatch):
    monkeypatch.delenv("PPLEX_MODEL", raising=False)
    state, reply = tmp_path / "a.safetensors", tmp_path / "again.wav"
    answer("a", "--save-state", state)
    b, *_ = answer("b", "--resume", state)
    done = run("respond", calls / "b.wav", "-o", reply, "--resume", state)
    assert done.exit_code == 0, done.stderr
    np.testing.assert_array_equal(soundfile.read(reply, dtype="int16")[0], b)


def test_keys_and_values_at_8_bits_stay_so(answer, run, calls, tmp_path):
    state, at_8 = tmp_path / "a.safetensors", ("-m", "mini", "--kv-bits", 8)
    a = answer("a", *at_8, "--save-state", state)
    size = state.stat().st_size
    assert_joined(
        [a, answer("b", "-m", "mini", "--resume", state)], answer("ab", *at_8)
    )
    answer("a", "-m", "mini", "--save-state", state)
    assert size < 0.5 * state.stat().st_size
    line = ("respond", calls / "b.wav", "-o", tmp_path / "no.wav", "--resume", state)
    done = run(*line, *at_8)
    assert done.exit_code == 1 and "--kv-bits as there" in done.stderr


def test_streams_are_saved_and_go_on(answer, calls, tiny, tmp_path):
    def stream(name: str, *options: object) -> np.ndarray:
        line = ["respond", "-", "-o", tmp_path / f"{name}.wav", "-m", tiny, *options]
        program = [sys.executable, "-m", "pplex", *map(str, line)]
        with (calls / f"{name}.wav").open("rb") as file:
            subprocess.run(program, stdin=file, check=True, capture_output=True)
        return soundfile.read(tmp_path / f"{name}.wav", dtype="int16")[0]

    state = tmp_path / "a.safetensors"
    parts = stream("a", "--save-state", state), stream("b", "--resume", state)
    np.testing.assert_array_equal(np.concatenate(parts), answer("ab")[0])


def live(
    model: Model, pcm: np.ndarray, start: Start, saving: Saving | None = None
) -> np.ndarray:
    """The sound of the replies to a stream."""
    whole = np.concatenate([start.rest, pcm])
    frames = [whole[i : i + FRAME] for i in range(0, len(whole), FRAME)]
    coming = (
        LiveFrame(np.pad(frame, (0, FRAME - len(frame))), len(frame), 0.0)
        for frame in frames
    )
    replies = converse_live(
        model.engine, start, 5, coming, SamplingConfig(), saving=saving
    )
    return np.concatenate([said.pcm[: frame.num_samples] for frame, said in replies])


@pytest.mark.parametrize("cut", [300, FRAME, 5 * FRAME - 1, 40 * FRAME, 47 * FRAME + 9])
def test_streams_and_recordings_go_on_from_each_other(tiny, cut):
    """What was made ahead of a frame that did not come is made again."""
    model = load(resolve(str(tiny), offline=True))
    start = open_role(model, "NATF0", "").start
    pcm = speech(50).reshape(-1)[:-100]

    def recorded(part: np.ndarray, start: Start) -> Answer:
        one = Conversation("", Samples(part), start, 5, saves=True)
        drawn = SamplingConfig()
        ((_, said),) = converse_many(model.engine, [one], drawn, batch_size=1)
        return said

    whole, saving = recorded(pcm, start).pcm, Saving()
    first, streamed = recorded(pcm[:cut], start), live(model, pcm[:cut], start, saving)
    np.testing.assert_array_equal(streamed, first.pcm)
    for arrays in (saving.arrays, first.saved or {}):
        then = start_from(model.engine, arrays)
        np.testing.assert_array_equal(recorded(pcm[cut:], then).pcm, whole[cut:])
        np.testing.assert_array_equal(live(model, pcm[cut:], then), whole[cut:])


@pytest.mark.parametrize("tail", [0.5, "auto"])
def test_what_follows_a_tail_goes_on_after_it(calls, tail):
    model = pplex.load("mini", offline=True)
    pcm = 0.05 * speech(30).reshape(-1)
    a = model.respond(pcm[:CUT], tail=tail, saves=True, seed=3)
    silence = np.zeros(len(a.audio) - CUT, np.float32)
    b = model.respond(pcm[CUT:], resume=a.state)
    joined = np.concatenate([pcm[:CUT], silence, pcm[CUT:]])
    whole = model.respond(joined, seed=3)
    np.testing.assert_array_equal(np.concatenate([a.audio, b.audio]), whole.audio)


def test_jobs_save_and_go_on(run, answer, calls, tiny, tmp_path):
    saved = tmp_path / "replies" / "a.safetensors"
    rows = [
        {"input": str(calls / "a.wav"), "seed": 7, "save_state": "a.safetensors"},
        {"input": str(calls / "b.wav"), "resume": str(saved)},
    ]
    line = ["batch", "-o", tmp_path / "replies", "-m", tiny, "--jobs"]
    for number, row in enumerate(rows):
        jobs = tmp_path / f"{number}.jsonl"
        jobs.write_text(json.dumps(row))
        for times in (1, 2):  # the second time it is done already
            done = run(*line, jobs, "--json")
            assert done.exit_code == 0, done.stderr
            counts = json.loads(done.stdout)
            assert (counts["done"], counts["skipped"]) == (2 - times, times - 1)
    parts = [tmp_path / "replies" / f"{name}.wav" for name in "ab"]
    pcm = [soundfile.read(part, dtype="int16")[0] for part in parts]
    whole, *_ = answer("ab", "--seed", 7)
    np.testing.assert_array_equal(np.concatenate(pcm), whole)
    manifest = (tmp_path / "replies" / "manifest.jsonl").read_text().splitlines()
    assert json.loads(manifest[-1])["resume"] == str(saved)


def test_a_conversation_shorter_than_a_frame_goes_on(tiny):
    model = pplex.load(tiny, offline=True)
    pcm = speech(3).reshape(-1)
    first = model.respond(pcm[:500], saves=True)
    second = model.respond(pcm[500:900], resume=first.state, saves=True)
    third = model.respond(pcm[900:], resume=second.state)
    parts = [first.audio, second.audio, third.audio]
    whole = model.respond(pcm).audio
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.fixture(scope="module")
def state(calls, tiny, tmp_path_factory) -> Path:
    """A saved conversation."""
    path = tmp_path_factory.mktemp("state") / "a.safetensors"
    model = pplex.load(tiny, offline=True)
    answer = model.respond(calls / "a.wav", saves=True)
    assert answer.state is not None
    answer.state.write(path)
    return path


def refusal(run, calls: Path, tmp_path: Path, *options: object) -> str:
    line = ("respond", calls / "b.wav", "-o", tmp_path / "b.reply.wav", *options)
    done = run(*line)
    assert done.exit_code in (1, 2) and len(done.stderr.splitlines()) <= 4
    assert not list(tmp_path.glob("*.wav"))
    return done.stderr


def test_what_is_no_saved_conversation_of_the_model_is_refused(
    run, calls, tiny, small_folder, state, tmp_path
):
    torn = tmp_path / "torn.safetensors"
    content = state.read_bytes()
    for length in (5, 300, len(content) // 2, len(content) - 1):
        torn.write_bytes(content[:length])
        assert "torn.safetensors is not a whole saved conversation" in refusal(
            run, calls, tmp_path, "-m", tiny, "--resume", torn
        )
    others = {
        tiny / "model.safetensors": "is no saved conversation",
        tmp_path / "nothing": "No such file",
    }
    for path, why in others.items():
        found = refusal(run, calls, tmp_path, "-m", tiny, "--resume", path)
        assert why in found and str(path) in found
    found = refusal(run, calls, tmp_path, "-m", small_folder, "--resume", state)
    assert "is of the model" in found and "this is another" in found
    found = refusal(
        run, calls, tmp_path, "-m", tiny, "--resume", state, "--voice", "NATF0"
    )
    assert "--voice and --resume exclude each other" in found


def test_damaged_arrays_are_refused(tiny, state, tmp_path):
    model = load(resolve(str(tiny), offline=True))
    notes = json.dumps(asdict(read_notes(state)))
    arrays = read_state(state).arrays
    others = [
        {name: array.reshape(-1)[:-1]}
        for name, array in arrays.items()
        if name != "user.rest"  # which has any length
    ]
    others += [  # ids that are no row of a table
        {name: np.full_like(arrays[name], token)}
        for name in ("row.column", "row.given", "user.tokens")
        for token in (1 << 20, -(1 << 20))
    ]
    for number, damaged in enumerate(others):
        kinds = {"float32": "F32", "int32": "I32", "int64": "I64"}
        odd = arrays | damaged
        specs = [
            TensorSpec(k, kinds[str(a.dtype)], tuple(a.shape)) for k, a in odd.items()
        ]
        path = tmp_path / f"{number}.safetensors"
        write_tensors(path, specs, odd.values(), {"pplex_conversation": notes})
        with pytest.raises(PplexError, match="is a damaged saved conversation"):
            read_state(path).open(model)


def test_a_saved_conversation_is_not_replaced_unasked(run, calls, tiny, tmp_path):
    state = tmp_path / "a.safetensors"
    shutil.copy(calls / "a.wav", state)
    found = refusal(run, calls, tmp_path, "-m", tiny, "--save-state", state)
    assert "exists already" in found
    assert state.read_bytes() == (calls / "a.wav").read_bytes()
    for name in ("state.bin", "-", "/dev/null"):
        found = refusal(run, calls, tmp_path, "-m", tiny, "--save-state", name)
        assert "end its name in .safetensors" in found
