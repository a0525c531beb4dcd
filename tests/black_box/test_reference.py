"""Against NVIDIA's own code, float32, with the same weights (see data/reference)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reference_driver as driver

DATA = Path(__file__).parents[1] / "data"
REFERENCE = DATA / "reference"
FRAME = 1920
RUNS = ["a_pt_voice_text", "b_wav_voice_no_text", "c_pt_voice_tagged_text"]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the root mean square of what is expected."""
    return float(np.abs(found - expected).max() / np.sqrt((expected**2).mean()))


@pytest.fixture(scope="module")
def codec() -> dict[str, np.ndarray]:
    return dict(np.load(REFERENCE / "mimi.npz"))


@pytest.fixture(scope="module")
def forced_run() -> dict[str, np.ndarray]:
    return dict(np.load(REFERENCE / "lm.npz"))


@pytest.fixture(scope="module", params=driver.CODECS)
def engine(request, tiny_model):
    """The codec as a compiled library, and with MLX's operations."""
    return driver.make_codec(request.param, tiny_model)


def pcm_frames(samples: np.ndarray) -> np.ndarray:
    pcm = samples.astype(np.float32) / 32768
    return np.pad(pcm, (0, -len(pcm) % FRAME)).reshape(-1, FRAME)


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_codec_encodes_like_the_reference_in_chunks_of_any_size(engine, codec, chunk):
    frames = pcm_frames(codec["input"])
    state = engine.make_state()
    codes = [
        engine.encode(frames[start : start + chunk], state)
        for start in range(0, len(frames), chunk)
    ]
    np.testing.assert_array_equal(np.concatenate(codes, axis=1), codec["codes"])


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_latents_are_the_references(engine, tiny_model, codec, chunk):
    frames = pcm_frames(codec["input"])
    chunks = [frames[start : start + chunk] for start in range(0, len(frames), chunk)]
    latents = driver.latents(engine, tiny_model, chunks)
    assert relative(latents, codec["latent"]) < 1e-4


def test_codec_encodes_a_ragged_end_like_the_reference(engine, codec):
    frames = pcm_frames(codec["tail"])
    codes = engine.encode(frames, engine.make_state())
    np.testing.assert_array_equal(codes, codec["tail_codes"])


@pytest.mark.parametrize("chunk", [1, 6, 50])
@pytest.mark.parametrize("which", ["", "given_"])
def test_codec_decodes_like_the_reference(engine, codec, which, chunk):
    codes = codec[f"{which}codes"]
    state = engine.make_state()
    pcm = [
        engine.decode(codes[:, start : start + chunk], state)
        for start in range(0, codes.shape[1], chunk)
    ]
    expected = codec[f"{which}pcm"][0]
    assert np.abs(np.concatenate(pcm) - expected).max() < 1e-5


def test_rarely_used_codebook_rows_are_divided_by_the_floor(tiny_model, codec):
    for name, found in driver.codebook_rows(tiny_model, codec["codebook_rows"]):
        np.testing.assert_allclose(found, codec[f"codebook_{name}"], rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 72])
def test_temporal_transformer_gives_the_references_outputs(
    tiny_model, forced_run, chunk
):
    tokens = forced_run["tokens"]
    embedded = driver.embeddings(tiny_model, tokens)
    assert relative(embedded, forced_run["embedding"]) < 1e-6
    hidden, logits = driver.temporal_outputs(tiny_model, tokens, chunk)
    assert relative(hidden, forced_run["transformer_out"]) < 1e-4
    assert relative(logits, forced_run["text_logits"]) < 1e-4


def test_depformer_gives_the_references_logits(tiny_model, forced_run):
    hidden, forced = forced_run["transformer_out"], forced_run["forced"]
    found = driver.depformer_logits(tiny_model, hidden, forced)
    order = np.argsort(-found, axis=-1)[..., :4]
    expected = forced_run["depformer_top4_values"]
    np.testing.assert_array_equal(order, forced_run["depformer_top4_ids"])
    assert relative(np.take_along_axis(found, order, -1), expected) < 1e-4
    total = np.log(np.exp(found.astype(np.float64)).sum(axis=-1))
    assert relative(total, forced_run["depformer_logsumexp"]) < 1e-4


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    ("chunk", "decode", "ahead"), [(32, 32, True), (5, 8, True), (1, 1, False)]
)
def test_greedy_runs_are_the_references_token_for_token(
    tiny_model, each_way, name, chunk, decode, ahead
):
    run = np.load(REFERENCE / f"{name}.npz")
    voice = str(run["voice"])
    voice = str(DATA / "respond" / voice) if voice.endswith("wav") else voice[:-3]
    prompt = driver.prompt_of(tiny_model, voice, str(run["text_prompt"]))
    source = DATA / "respond" / str(run["user_wav"])
    recording = driver.read_pcm(source, sample_rate=24000)
    frames = np.pad(recording.pcm, (0, -len(recording.pcm) % FRAME)).reshape(-1, FRAME)
    chunks = (frames[i : i + chunk] for i in range(0, len(frames), chunk))
    replies = driver.greedy_run(
        tiny_model, prompt, chunks, decode=decode, ahead=ahead, way=each_way
    )

    user = np.concatenate([r.user for r in replies], axis=1)
    np.testing.assert_array_equal(user, run["user_codes"])
    tokens = [np.concatenate([r.text[None], r.agent]) for r in replies]
    np.testing.assert_array_equal(np.concatenate(tokens, axis=1), run["output"])
    pcm = np.concatenate([r.pcm for r in replies])[: len(recording.pcm)]
    assert np.abs(driver.to_pcm16(pcm).astype(int) - run["wav"]).max() <= 1


@pytest.mark.parametrize("name", RUNS)
def test_prompt_frames_hold_the_references_tokens(tiny_model, name):
    run = np.load(REFERENCE / f"{name}.npz")
    voice = str(run["voice"])
    saved = voice.endswith(".pt")
    voice = voice[:-3] if saved else str(DATA / "respond" / voice)
    prompt = driver.prompt_of(tiny_model, voice, str(run["text_prompt"]))
    skipped = len(prompt.embeddings) if saved else 0
    # The reference's last prompt column is the input of the first conversation step.
    found = prompt.columns[:, skipped:-1]
    np.testing.assert_array_equal(found, run["prompt_inputs"][:, skipped:])


def test_saved_voice_equals_the_recording_it_was_made_from(tiny_model):
    frames = pcm_frames(np.zeros(FRAME, np.int16))
    replies = []
    for voice in ("NATF0", str(DATA / "respond" / "voice_NATF0.wav")):
        prompt = driver.prompt_of(
            tiny_model, voice, "You enjoy having a good conversation."
        )
        chunks = iter([np.repeat(frames, 20, axis=0)])
        replies += driver.greedy_run(tiny_model, prompt, chunks, decode=20)
    np.testing.assert_array_equal(replies[0].agent, replies[1].agent)
    np.testing.assert_array_equal(replies[0].text, replies[1].text)


def test_without_a_voice_frame_the_first_role_frame_is_dropped(tiny_model):
    config = tiny_model.config
    none = np.zeros((8, 0), np.int32)
    prompt = driver.make_prompt(config, [], voice_codes=none)
    assert prompt.columns[0, 0] == config.lm.text_initial
    assert (prompt.columns[1:, 0] == config.lm.audio_initial).all()
    assert (prompt.columns[[2, 8, 10, 16], 1] == config.lm.audio_initial).all()
    assert prompt.columns[1, 1] == config.silence_codes[0]
