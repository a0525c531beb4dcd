"""``pplex voices``: make one from a recording, look at it, use it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pplex.checkpoint import voice_codes
from pplex.checkpoint.hub import resolve
from pplex.checkpoint.voices import read_voice_file
from pplex.conversation import prompts
from pplex.conversation.prompts import make_role
from pplex.conversation.session import load
from pplex.errors import PplexError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wav(data):
    return data / "respond" / "voice_NATM0.wav"


@pytest.fixture
def made(run, wav, tiny, tmp_path):
    path = tmp_path / "me.safetensors"
    result = run("voices", "make", wav, path, "-m", tiny)
    assert (result.exit_code, result.stdout) == (0, f"{path}\n")
    return path


def test_a_made_voice_starts_the_same_conversation(made, wav, tiny_model):
    """As fed from the recording: the same grid, and the same inputs before it."""
    saved = make_role(tiny_model, str(made), "hello there").prompt
    direct = make_role(tiny_model, str(wav), "hello there").prompt
    assert saved.num_frames == direct.num_frames
    start = len(saved.embeddings)
    np.testing.assert_array_equal(saved.columns[:, start:], direct.columns[:, start:])
    np.testing.assert_array_equal(saved.pending, direct.pending)
    caches = [tiny_model.engine.prefill(prompt).memory for prompt in (saved, direct)]
    for one, other in zip(caches[0].arrays(), caches[1].arrays(), strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-5)


def test_a_made_voice_is_like_the_references_own(made, tiny):
    """The reference saved NATM0 from the same recording with the same model."""
    from pplex.checkpoint.voices import find_voices

    theirs, ours = read_voice_file(find_voices(tiny)["NATM0"]), read_voice_file(made)
    np.testing.assert_array_equal(ours.cache, theirs.cache)
    np.testing.assert_allclose(ours.embeddings, theirs.embeddings, atol=1e-5)


def test_a_made_voice_is_shown_and_fits(run, made, tiny):
    shown = run("voices", "show", made, "-m", tiny)
    assert shown.exit_code == 0
    assert f"fits the model {tiny}" in shown.stdout
    found = json.loads(run("voices", "show", made, "-m", tiny, "--json").stdout)
    assert found["doubts"] == []
    assert found["notes"]["pplex_source"] == "voice_NATM0.wav"
    assert found["duration_s"] == pytest.approx(found["frames"] * 0.08)


def test_a_made_voice_says_when_it_does_not_fit(run, made, tmp_path, tiny_model):
    from random_checkpoint import write_checkpoint
    from small import SMALL

    # Another model of the same width and tables of the same sizes.
    config = tiny_model.config
    assert SMALL.lm.dim == config.lm.dim
    write_checkpoint(tmp_path / "other", config)
    other = load(resolve(str(tmp_path / "other"), offline=True))
    with pytest.raises(PplexError, match="was made for the model"):
        make_role(other, str(made), "")
    shown = run("voices", "show", made, "-m", tmp_path / "other")
    assert "may not fit" in shown.stdout and "first vector" in shown.stdout


def test_a_voice_made_for_sixteen_bits_serves_four(made, tiny, tmp_path):
    from test_convert import to

    from pplex.checkpoint.layouts import Quantization

    to(tiny, tmp_path / "four", Quantization(4, 32))
    model = load(resolve(str(tmp_path / "four"), offline=True))
    assert make_role(model, str(made), "").prompt.embeddings is not None


def test_trimming_shortens_what_has_silence_around_it(run, wav, tiny, tmp_path):
    import soundfile

    pcm, rate = soundfile.read(wav)
    quiet = np.zeros(2 * rate)
    soundfile.write(tmp_path / "q.wav", np.concatenate([quiet, pcm, quiet]), rate)
    frames = []
    for options in ((), ("--trim",)):
        path = tmp_path / f"{len(options)}.safetensors"
        run("voices", "make", tmp_path / "q.wav", path, "-m", tiny, *options)
        frames.append(len(read_voice_file(path).embeddings) + 1)
    assert frames[0] - frames[1] == pytest.approx(4 * 12.5, abs=6)


@pytest.mark.parametrize(
    ("samples", "length", "serves"),
    [
        (69_120, "2.9 s", "too little to go by"),
        (71_040, "3.0 s", None),  # 2.96 s
        (360_000, "15.0 s", None),  # 15 s, in frames of 80 ms 15.04
        (364_000, "15.2 s", "long to read"),
    ],
)
def test_a_length_is_judged_as_it_is_shown(
    run, tiny, tmp_path, samples, length, serves
):
    import soundfile

    pcm = np.random.default_rng(0).uniform(-0.1, 0.1, samples)
    soundfile.write(tmp_path / "in.wav", pcm, 24_000)
    result = run(
        "voices", "make", tmp_path / "in.wav", tmp_path / "o.safetensors", "-m", tiny
    )
    first, *others = result.stderr.splitlines()
    assert first.startswith(f"{length}, ")
    assert others == [] if serves is None else serves in others[0]


def test_a_voice_that_the_model_would_forget_is_not_used(run, wav, tiny, tmp_path):
    import soundfile

    soundfile.write(tmp_path / "in.wav", np.full(100_000, 0.1), 24_000)
    made = tmp_path / "o.safetensors"
    run("voices", "make", tmp_path / "in.wav", made, "-m", tiny)
    for voice in (made, tmp_path / "in.wav"):
        result = run(
            "respond", wav, "-o", tmp_path / "a.wav", "--voice", voice, "-m", tiny
        )
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1] == (
            f"Error: voice {voice}: it has 53 frames, more than the 40 the model "
            "remembers; shorten it"
        )
        assert not (tmp_path / "a.wav").exists()


@pytest.mark.parametrize(
    ("output", "says"),
    [("me.pt", "end its name in .safetensors"), ("there.safetensors", "--overwrite")],
)
def test_outputs_that_will_not_do_are_refused(run, wav, tiny, tmp_path, output, says):
    (tmp_path / "there.safetensors").write_text("x")
    result = run("voices", "make", wav, tmp_path / output, "-m", tiny)
    assert (result.exit_code, result.stdout) == (1, "")
    assert says in result.stderr
    assert (tmp_path / "there.safetensors").read_text() == "x"


def test_the_codes_of_a_recording_are_kept(wav, tiny_model, cache, monkeypatch):
    first = prompts.encode_voice(tiny_model, wav)
    kept = list((cache / "pplex" / "voice-codes").iterdir())
    assert len(kept) == 1

    def again(*arguments):
        raise AssertionError("encoded again")

    monkeypatch.setattr(prompts, "_encode", again)
    np.testing.assert_array_equal(prompts.encode_voice(tiny_model, wav), first)
    kept[0].write_bytes(b"damaged")
    with pytest.raises(AssertionError, match="encoded again"):
        prompts.encode_voice(tiny_model, wav)


def test_a_cache_that_cannot_be_written_is_done_without(cache):
    cache.write_text("a file where the folder should be")
    voice_codes.write("name", np.zeros((8, 2), np.int32))
    assert voice_codes.read("name") is None
