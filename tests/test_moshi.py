"""Moshi: Kyutai's model, by its own loop; it takes no voice and no role."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from random_checkpoint import lm_arrays, write_checkpoint
from reference_driver import ENGINES
from small import SMALL, check_saved_conversations, converse, live_frames

from pplex.audio.files import Samples, frames_of, read_pcm
from pplex.checkpoint.folder import CheckpointFolder
from pplex.checkpoint.hub import resolve
from pplex.checkpoint.weights import codec_tensors, lm_tensors
from pplex.conversation import scheduler
from pplex.conversation.prompts import make_role
from pplex.conversation.session import Model, load
from pplex.conversation.tracks import Conversation
from pplex.engine.base import Engine
from pplex.engine.choose import KINDS
from pplex.errors import PplexError
from pplex.model.prompt import no_prompt
from pplex.model.sampling import GREEDY, SamplingConfig
from pplex.quantization.forced import script_of

DATA = Path(__file__).parent / "data"
RUN = np.load(DATA / "reference" / "moshi.npz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The weights of the recorded run, as Kyutai publishes a Moshi: without voices."""
    folder = tmp_path_factory.mktemp("moshi") / "tiny"
    shutil.copytree(
        DATA / "tiny", folder, ignore=shutil.ignore_patterns("voices*", "config.json")
    )
    raw = json.loads((DATA / "tiny" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "moshi"}))
    return folder


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return load(resolve(str(folder), offline=True))


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, folder) -> Engine:
    files = CheckpointFolder(folder)
    config = files.read_config()
    tensors = lm_tensors(files, config.lm), codec_tensors(files, config.mimi)
    return KINDS[request.param].make(config, *tensors)


@pytest.fixture(scope="module")
def user() -> np.ndarray:
    """The recorded run's sound, in frames."""
    names = (DATA / "respond" / f"user_{name}.wav" for name in "abc")
    pcm = np.concatenate([read_pcm(name, sample_rate=24000).pcm for name in names])
    return frames_of(pcm, 1920)[: RUN["output"].shape[1]]


def test_a_run_is_that_of_kyutais_code(engine, user):
    """Past both windows: of 40 positions, and of 20 latents."""
    start = engine.prefill(no_prompt(engine.config.lm))
    tokens, codes, pcm = converse(engine, start, user)
    assert tokens.shape == RUN["output"].shape
    if engine.dtype == "float32":
        np.testing.assert_array_equal(codes, RUN["user_codes"])
        np.testing.assert_array_equal(tokens, RUN["output"])
        np.testing.assert_allclose(pcm[::64], RUN["pcm"], atol=1e-4)


def test_a_frame_is_answered_before_the_next_one_is_there(engine, user):
    start, heard = engine.prefill(no_prompt(engine.config.lm)), 0
    whole, _, _ = converse(engine, start, user[:30])

    def frames():
        nonlocal heard
        for frame in live_frames(user[:30]):
            heard += 1
            yield frame

    pieces = scheduler.converse_live(engine, start, 0, frames(), GREEDY)
    for count, (_, piece) in enumerate(pieces, 1):
        assert heard == count
        np.testing.assert_array_equal(piece.text, whole[0, count - 1 : count])
        np.testing.assert_array_equal(piece.agent, whole[1:, count - 1 : count])
    assert count == 30 == len(piece.timings.steps)


def test_rows_of_a_batch_say_what_each_says_alone(engine, user):
    start, sampling = engine.prefill(no_prompt(engine.config.lm)), SamplingConfig()
    lengths = 23, 50, 31
    alone = [converse(engine, start, user[:n], sampling, seed=n)[0] for n in lengths]
    sounds = {n: Samples(user[:n].reshape(-1)) for n in lengths}
    many = [Conversation(f"{n}", sounds[n], start, n) for n in lengths]
    found = {
        one.key: np.concatenate([answer.text[None], answer.agent])
        for one, answer in scheduler.converse_many(engine, many, sampling, batch_size=2)
    }
    for n, expected in zip(lengths, alone, strict=True):
        if engine.dtype == "float32":
            np.testing.assert_array_equal(found[f"{n}"], expected)
        assert found[f"{n}"].shape == expected.shape


def test_a_saved_conversation_goes_on_as_if_it_had_not_stopped(engine):
    start = engine.prefill(no_prompt(engine.config.lm))
    check_saved_conversations(engine, start, 16, 4)


def test_logits_of_given_tokens_choose_the_same(engine, user):
    """The grid that is made of an answer is the one that the answer was read in."""
    lm = engine.config.lm
    prompt = no_prompt(lm)
    said, codes, _ = converse(engine, engine.prefill(prompt), user)
    script = script_of(lm, prompt, said, codes)
    logits = list(engine.forced(engine.prefill(prompt), script.columns))
    text = np.concatenate([part.text for part in logits]).argmax(axis=-1)
    if engine.dtype == "float32":
        np.testing.assert_array_equal(text, said[0])


def test_a_voice_or_a_role_is_refused_and_neither_is_needed(model):
    role = make_role(model, None, None)
    assert (role.voice, role.text, role.prompt.num_frames) == ("", "", 1)
    with pytest.raises(PplexError, match="tiny is a Moshi, .* leave out --voice"):
        make_role(model, "NATF2", None)
    with pytest.raises(PplexError, match="takes no role: leave out --prompt"):
        make_role(model, None, "You are kind.")


@pytest.mark.parametrize("told", [None, "moshi", "personaplex"])
@pytest.mark.parametrize("steps", [8, 16])
@pytest.mark.parametrize("has_voices", [False, True])
def test_which_model_is_a_moshi(tmp_path, told, steps, has_voices):
    """Kyutai's has 8 steps and no voices; its PersonaPlex may call itself a Moshi."""
    write_checkpoint(tmp_path / "m", SMALL, "mlx")
    arrays = lm_arrays(SMALL.lm, "mlx", steps=steps)["model"]
    mx.save_safetensors(str(tmp_path / "m" / "model.safetensors"), arrays)
    path = tmp_path / "m" / "config.json"
    raw = json.loads(path.read_text())
    del raw["lm"]["is_moshi"]
    path.write_text(json.dumps(raw | ({"model_type": told} if told else {})))
    for voices in (tmp_path / "m").glob("voices*"):
        shutil.rmtree(voices) if voices.is_dir() else voices.unlink()
    if has_voices:
        (tmp_path / "m" / "voices.tgz").write_bytes(b"")
    config = CheckpointFolder(tmp_path / "m").read_config()
    expected = told != "personaplex" and steps == 8 and not has_voices
    assert config.lm.is_moshi == config.mimi.transformer.is_moshi == expected
    assert config.lm.window == SMALL.lm.context - (not expected)


def test_a_converted_moshi_stays_one(folder, run, tmp_path):
    converted = run("models", "convert", folder, tmp_path / "8bit", "--bits", "8")
    assert converted.exit_code == 0
    found = CheckpointFolder(tmp_path / "8bit").read_config()
    assert found == CheckpointFolder(folder).read_config()
    raw = json.loads((tmp_path / "8bit" / "config.json").read_text())
    assert raw["model_type"] == "moshi"


def test_a_batch_of_a_moshi_needs_no_voice_and_refuses_one(folder, run, tmp_path):
    (tmp_path / "calls").mkdir()
    for name in "ac":
        shutil.copy(DATA / "respond" / f"user_{name}.wav", tmp_path / "calls")
    args = ("batch", tmp_path / "calls", "--model", folder, "-o")
    assert run(*args, tmp_path / "out").exit_code == 0
    again = run(*args, tmp_path / "out")
    assert "0 done, 2 skipped, 0 failed" in again.stdout + again.stderr
    for option in (("--voice", "NATF2"), ("--prompt", "Be kind.")):
        refused = run(*args, tmp_path / "other", *option)
        assert (refused.exit_code, "is a Moshi" in refused.stderr) == (1, True)
        assert not (tmp_path / "other").exists()
