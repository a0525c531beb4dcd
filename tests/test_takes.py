"""Several answers to one recording are what single runs answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from small import speech

import pplex
from pplex.audio.files import Samples
from pplex.conversation.answer import Answer
from pplex.conversation.prompts import open_role
from pplex.conversation.scheduler import converse_many
from pplex.conversation.tracks import Alike, Conversation, Decoder
from pplex.evaluation.find import find
from pplex.evaluation.report import Entry, together
from pplex.model.sampling import SamplingConfig

RATE = 24000


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> Path:
    """Two recordings."""
    folder = tmp_path_factory.mktemp("calls")
    for name, frames in (("a", 40), ("b", 12)):
        pcm = speech(frames).reshape(-1)[:-300]
        soundfile.write(folder / f"{name}.wav", pcm, RATE, subtype="PCM_16")
    return folder


def test_each_take_is_the_run_with_its_seed(run, tiny, calls, tmp_path):
    source, reply = calls / "a.wav", tmp_path / "reply.wav"
    line = ("respond", source, "-m", tiny, "--transcript", "json", "--tail", 0.5)
    state = ("--save-state", tmp_path / "reply.safetensors")
    tokens = ("--tokens", tmp_path / "tokens.npz")
    done = run(*line, "-o", reply, *tokens, *state, "--takes", 3, "--seed", 7)
    assert done.exit_code == 0, done.stderr
    names = {f"reply.{n}.{end}" for n in "123" for end in ("wav", "safetensors")}
    names |= {f"reply.{n}.transcript.json" for n in "123"}
    assert {p.name for p in tmp_path.iterdir()} == names | {
        f"tokens.{n}.npz" for n in "123"
    }
    alone = tmp_path / "alone"
    alone.mkdir()
    for number, seed in ((1, 7), (2, 8), (3, 9)):
        state = ("--save-state", alone / f"{seed}.safetensors")
        tokens = ("--tokens", alone / f"{seed}.npz")
        single = alone / f"{seed}.wav"
        assert run(*line, "-o", single, "--seed", seed, *tokens, *state).exit_code == 0
        for found, expected in (
            (f"reply.{number}.wav", f"{seed}.wav"),
            (f"reply.{number}.safetensors", f"{seed}.safetensors"),
            (f"tokens.{number}.npz", f"{seed}.npz"),
            (f"reply.{number}.transcript.json", f"{seed}.transcript.json"),
        ):
            content = (tmp_path / found).read_bytes()
            assert content == (alone / expected).read_bytes(), found


def test_tries_from_one_point_are_checked_together(run, tiny, calls, tmp_path):
    state, model = tmp_path / "a.safetensors", ("-m", tiny)
    first = ("-o", tmp_path / "a.wav", "--save-state", state, *model)
    assert run("respond", calls / "a.wav", *first).exit_code == 0
    line = ("respond", calls / "b.wav", "--resume", state, *model)
    takes = run(*line, "-o", tmp_path / "b.wav", "--takes", 2)
    assert takes.exit_code == 0, takes.stderr
    assert run(*line, "-o", tmp_path / "one.wav").exit_code == 0
    paths = [tmp_path / f"b.{number}.wav" for number in (1, 2)]
    contents = [path.read_bytes() for path in paths]
    assert contents[0] == (tmp_path / "one.wav").read_bytes() != contents[1]
    checked = run("check", *paths, "--length-of", calls / "b.wav", "--json")
    assert checked.exit_code == 0
    assert [one["file"] for one in json.loads(checked.stdout)] == list(map(str, paths))


def test_a_batch_has_takes_of_every_recording(run, tiny, calls, tmp_path):
    line = ("batch", calls, "-o", tmp_path / "replies", "-m", tiny, "--takes", 2)
    done = run(*line, "--json", "--stats")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["done"] == 4
    found = find([tmp_path / "replies"])
    assert [item.name for item in found.items] == [
        "a.1.wav",
        "a.2.wav",
        "b.1.wav",
        "b.2.wav",
    ]
    groups = together([Entry(item, item.status, None) for item in found.items])
    assert [[entry.name for entry in group] for group in groups] == [
        ["a.1.wav", "a.2.wav"],
        ["b.1.wav", "b.2.wav"],
    ]
    seeds = [item.settings["seed"] for item in found.items[:2]]
    assert seeds[1] == seeds[0] + 1
    for item, seed in zip(found.items, seeds, strict=False):
        single = tmp_path / f"{seed}.wav"
        options = ("-m", tiny, "-o", single, "--seed", seed)
        assert run("respond", calls / "a.wav", *options).exit_code == 0
        answer = tmp_path / "replies" / item.name
        assert answer.read_bytes() == single.read_bytes()
    again = run(*line, "--json", "--stats")
    assert json.loads(again.stdout)["skipped"] == 4
    beside = run("batch", calls, "-o", calls, "-m", tiny, "--takes", 2)
    assert beside.exit_code == 1 and "would be taken for recordings" in beside.stderr


def test_what_takes_say_alike_is_decoded_once(tiny_model, monkeypatch):
    """Also after they said something else, when that is forgotten."""
    codec, rng = tiny_model.engine.codec, np.random.default_rng(0)
    takes = rng.integers(0, 16, (3, 20, 8, 4), np.int32)  # stretches of 4 frames
    takes[:, :3] = takes[0, :3]
    takes[:2, 5:] = takes[0, 5:]
    alone = [codec.make_state() for _ in takes]
    expected = [
        [codec.decode(codes, state) for codes in take]
        for take, state in zip(takes, alone, strict=True)
    ]
    decoded, decode = [], codec.decode
    monkeypatch.setattr(
        codec, "decode", lambda c, state: decoded.append(len(c)) or decode(c, state)
    )
    alike, counts = Alike(codec), []
    decoders = [Decoder(codec.make_state()) for _ in takes]
    for idx in range(20):
        for k, take in enumerate(takes):
            pcm, decoders[k] = alike.decode(take[idx], decoders[k], None).result()
            np.testing.assert_array_equal(pcm, expected[k][idx])
        counts.append(len(decoded))
        decoded.clear()
    # A state has 32 latents of each layer, which see 20 and the convolutions' few:
    # what was said in the first 20 frames is forgotten 32 frames later, at most.
    assert counts[:5] == [1, 1, 1, 3, 3] and counts[13:] == [2] * 7


@pytest.mark.parametrize("batch_size", [2, 4])
def test_a_recording_is_heard_once_for_all_its_takes(
    tiny_model, monkeypatch, batch_size
):
    """Though not all fit at a time; and each is what it is alone."""
    engine, sampling = tiny_model.engine, SamplingConfig()
    start = open_role(tiny_model, "NATF0", "").start
    sound = Samples(speech(40).reshape(-1))

    def answer(seeds: range) -> list[Answer]:
        takes = [
            Conversation(str(s), sound, start, s, more_takes=s != seeds[-1])
            for s in seeds
        ]
        said = converse_many(engine, takes, sampling, batch_size=batch_size)
        return [answer for _, answer in sorted(said, key=lambda pair: pair[0].key)]

    alone = [answer(range(seed, seed + 1))[0] for seed in range(4)]
    heard, encode = [], engine.codec.encode
    monkeypatch.setattr(
        engine.codec,
        "encode",
        lambda f, state: heard.append(len(f)) or encode(f, state),
    )
    for found, expected in zip(answer(range(4)), alone, strict=True):
        np.testing.assert_array_equal(found.pcm, expected.pcm)
        np.testing.assert_array_equal(found.user, expected.user)
    assert sum(heard) == 40


def test_takes_that_say_the_same_are_decoded_once(tiny_model, monkeypatch):
    """In a batch, and in those after it."""
    engine, sampling = tiny_model.engine, SamplingConfig(temp=0, text_temp=0)
    start = open_role(tiny_model, "NATF0", "").start
    sound, decoded, decode = Samples(speech(40).reshape(-1)), [], engine.codec.decode
    monkeypatch.setattr(
        engine.codec,
        "decode",
        lambda codes, state: decoded.append(codes.shape[1]) or decode(codes, state),
    )
    takes = [Conversation(str(s), sound, start, s, more_takes=s < 3) for s in range(4)]
    said = list(converse_many(engine, takes, sampling, batch_size=2))
    assert len(said) == 4 and sum(decoded) == 40


def test_takes_from_python(tiny, calls):
    model = pplex.load(tiny, offline=True)
    takes = model.takes(calls / "b.wav", 3, seed=7, saves=True)
    for take, seed in zip(takes, (7, 8, 9), strict=True):
        alone = model.respond(calls / "b.wav", seed=seed, saves=True)
        np.testing.assert_array_equal(take.audio, alone.audio)
        assert take.state is not None and alone.state is not None
        assert take.state.notes.seed == seed
        for name, array in alone.state.arrays.items():
            np.testing.assert_array_equal(take.state.arrays[name], array)


@pytest.mark.parametrize("option", [("-o", "-"), ("--transcript", "-")])
def test_takes_do_not_fit_on_stdout(run, tiny, calls, tmp_path, option):
    out = () if option[0] == "-o" else ("-o", tmp_path / "o.wav")
    line = ("respond", calls / "b.wav", "-m", tiny, "--takes", 2)
    done = run(*line, *out, *option)
    assert done.exit_code == 1 and "--takes writes many files" in done.stderr
    done = run("respond", "-", "-o", tmp_path / "o.wav", "-m", tiny, "--takes", 2)
    assert done.exit_code == 2
