"""Recognisers, word errors, and transcripts of both sides."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pplex.audio.files import read_pcm
from pplex.errors import PplexError
from pplex.evaluation.asr import Recogniser, compare, plain, utterances
from pplex.evaluation.recognisers import make_recogniser
from pplex.files import plan_files
from pplex.respond.transcript import Word, write_dialogue

DATA = Path(__file__).parent / "data" / "fdb"
SENTENCES = (
    "I would like to know when the bakery opens.",
    "The bank opens at nine and closes at five.",
    "Good morning, how can I help you?",
)


def words(*texts: str) -> list[Word]:
    return [Word(text, i / 2, i / 2 + 0.4, i) for i, text in enumerate(texts)]


def test_case_and_punctuation_are_no_errors():
    found = compare(
        words("Good", "morning,", "it\u2019s", "me."),
        words("good", "morning", "it's", "me"),
    )
    assert found.word_error_rate == 0 and found.disagreements == []
    assert [w.text for w in plain(words("well-known", "--", "'yes'"))] == [
        "well",
        "known",
        "yes",
    ]


def test_errors_are_counted_and_timed():
    said = words("a", "b", "c", "d")
    heard = [*words("a", "x", "c"), Word("y", 9.0, 9.5, 0), Word("z", 9.5, 9.9, 0)]
    found = compare(said, heard)
    total = found.substitutions + found.deletions + found.insertions
    assert (found.words, found.heard, total) == (4, 5, 3)
    assert found.word_error_rate == pytest.approx(0.75)
    first = found.disagreements[0]
    assert (first.said, first.heard, first.start_s) == ("b", "x", 0.5)


def test_silence_where_words_were_meant_is_all_deleted():
    found = compare(words("a", "b"), [])
    assert (found.deletions, found.word_error_rate) == (2, 1.0)
    nothing = compare([], words("a"))
    assert nothing.word_error_rate is None and nothing.insertions == 1
    assert compare([], []).disagreements == []


def test_a_track_is_cut_at_silences_and_at_its_length():
    random = np.random.default_rng(0)
    pcm = np.zeros(16_000 * 80, np.float32)
    pcm[16_000:32_000] = random.normal(0, 0.1, 16_000)
    pcm[64_000 : 64_000 + 70 * 16_000] = random.normal(0, 0.1, 70 * 16_000)
    found = utterances(pcm)
    assert len(found) == 4
    assert found[0].start_s == pytest.approx(0.85, abs=0.02)
    assert all(u.duration_s <= 30.01 for u in found)


def test_times_are_the_tracks():
    pcm = np.zeros(64_000, np.float32)
    pcm[32_000:48_000] = np.random.default_rng(0).normal(0, 0.1, 16_000)
    recogniser = Recogniser("stub", "1", lambda pcm: [("word", 0.2, 5.0)])
    (word,) = recogniser(pcm)
    assert word.start_s == pytest.approx(2.05, abs=0.02)
    assert word.end_s == pytest.approx(3.15, abs=0.02)


@pytest.fixture(scope="module")
def pocketsphinx(tmp_path_factory) -> Recogniser:
    """The recogniser that expects the sentence of the test's speech, and others."""
    pytest.importorskip("pocketsphinx")
    path = tmp_path_factory.mktemp("asr") / "sentences.txt"
    path.write_text("\n".join([*SENTENCES, SPOKEN]) + "\n")
    return make_recogniser("pocketsphinx", path)


SPOKEN = "well you know i was thinking that we are going away for a while"


def test_pocketsphinx_hears_speech_and_its_times(pocketsphinx):
    pcm = read_pcm(DATA / "speech_agent.flac", sample_rate=16_000).pcm
    track = np.concatenate([np.zeros(16_000, np.float32), pcm])
    heard = pocketsphinx(track)
    said = [Word(text, 0, 0, 0) for text in SPOKEN.split()]
    assert compare(said, heard).word_error_rate < 0.2
    assert 0.9 < heard[0].start_s < 1.3
    assert all(a.start_s <= b.start_s for a, b in zip(heard, heard[1:], strict=False))
    described = pocketsphinx.describe()
    assert described["language_model"] == "trigram over 4 sentences"


def test_a_file_without_sentences_is_refused(tmp_path):
    pytest.importorskip("pocketsphinx")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(PplexError, match="holds no sentences"):
        make_recogniser("pocketsphinx", tmp_path / "empty.txt")


def test_a_corrupted_track_is_caught(pocketsphinx):
    pcm = read_pcm(DATA / "speech_agent.flac", sample_rate=16_000).pcm
    broken = pcm.reshape(-1, 160)[np.random.default_rng(0).permutation(300)]
    said = [Word(text, 0, 0, 0) for text in SPOKEN.split()]
    assert compare(said, pocketsphinx(broken.reshape(-1))).word_error_rate > 0.6


def test_the_score_compares_sound_and_text(tmp_path, run):
    pytest.importorskip("pocketsphinx")
    pcm = read_pcm(DATA / "speech_agent.flac", sample_rate=16_000).pcm
    sides = np.stack([np.zeros_like(pcm), pcm], axis=1)
    soundfile.write(tmp_path / "call.wav", sides, 16_000)
    said = [
        {"text": text, "start_s": i * 0.2, "end_s": i * 0.2 + 0.2, "frame": i}
        for i, text in enumerate(SPOKEN.replace("while", "year").split())
    ]
    content = {"text": SPOKEN, "duration_s": 3.0, "words": said}
    (tmp_path / "call.json").write_text(json.dumps(content))
    (tmp_path / "sentences.txt").write_text("\n".join([*SENTENCES, SPOKEN]))
    arguments = ["--vad", "energy", "--asr", "pocketsphinx", "--asr-sentences"]
    arguments += [tmp_path / "sentences.txt", "--transcripts", tmp_path / "said"]
    done = run("score", tmp_path / "call.wav", *arguments, "--format", "json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    trip = result["total"]["round_trip"]
    assert 0 < trip["word_error_rate"] < 0.3
    (row,) = result["recordings"]
    assert any("year" in d["said"] for d in row["round_trip"]["disagreements"])
    assert result["method"]["recogniser"]["name"] == "pocketsphinx"
    assert "<v Agent>well you" in (tmp_path / "said" / "call.dialogue.vtt").read_text()
    assert "no JSON transcript" not in done.stderr
    (tmp_path / "call.json").unlink()
    bare = run("score", tmp_path / "call.wav", *arguments, "--overwrite")
    assert bare.exit_code == 0
    assert bare.stderr.startswith("1 of 1 recordings have no JSON transcript")


def parakeet(folder: Path) -> Path:
    """A Parakeet of random weights with CTC, in the form of NeMo's config."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_audio.stt.models.parakeet import Model

    vocabulary = ["\u2581he", "llo", "\u2581you", "r", "\u2581bank"]
    config = {
        "target": "nemo.collections.asr.models.ctc_bpe_models.EncDecCTCModelBPE",
        "model_type": "parakeet",
        "preprocessor": {
            "sample_rate": 16000,
            "normalize": "per_feature",
            "window_size": 0.025,
            "window_stride": 0.01,
            "window": "hann",
            "features": 16,
            "n_fft": 512,
            "dither": 0.0,
        },
        "encoder": {
            "feat_in": 16,
            "n_layers": 1,
            "d_model": 16,
            "n_heads": 2,
            "ff_expansion_factor": 2,
            "subsampling_factor": 8,
            "self_attention_model": "rel_pos",
            "subsampling": "dw_striding",
            "conv_kernel_size": 9,
            "subsampling_conv_channels": 8,
            "pos_emb_max_len": 500,
        },
        "decoder": {"feat_in": 16, "num_classes": 5, "vocabulary": vocabulary},
        "decoding": {"greedy": None},
    }
    mx.random.seed(3)
    (folder / "config.json").write_text(json.dumps(config))
    model = Model.from_config(json.loads(json.dumps(config)))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def test_mlx_audio_hears_words_of_its_vocabulary_in_order(tmp_path):
    pytest.importorskip("mlx_audio")
    recogniser = make_recogniser(f"mlx={parakeet(tmp_path)}")
    pcm = np.zeros(3 * 16_000, np.float32)
    pcm[16_000:40_000] = noise(100, 4000, 1.5)
    heard = recogniser(pcm)
    assert heard
    for word in heard:
        assert set(re.findall("he|llo|you|r|bank", word.text)) and word.text
        assert 0.8 <= word.start_s <= word.end_s <= 2.7
    starts = [word.start_s for word in heard]
    assert starts == sorted(starts)
    assert recogniser(np.zeros(16_000, np.float32)) == []
    with pytest.raises(PplexError, match="nothing has no config.json"):
        make_recogniser(f"mlx={tmp_path},{tmp_path / 'nothing'}")


def test_what_cannot_be_had_is_named(tmp_path, monkeypatch):
    known = "known are pocketsphinx, onnx=FOLDER, mlx=FOLDER"
    with pytest.raises(PplexError, match=known):
        make_recogniser("whisper")
    monkeypatch.setitem(sys.modules, "mlx_audio.stt", None)
    with pytest.raises(PplexError, match=r"pplex\[asr-mlx\]"):
        make_recogniser(f"mlx={tmp_path}")
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(PplexError, match=r"pplex\[asr-pocketsphinx\]"):
        make_recogniser("pocketsphinx")
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(PplexError, match=r"pplex\[score\]"):
        compare([], [])


def test_transcripts_replace_nothing_unasked(tmp_path):
    (path,) = plan_files(tmp_path / "t", ["a.wav"], ".srt", False).values()
    path.write_text("mine")
    with pytest.raises(PplexError, match="exists already"):
        plan_files(tmp_path / "t", ["a.wav"], ".srt", False)
    assert plan_files(tmp_path / "t", ["a.wav"], ".srt", True) == {"a.wav": path}
    with pytest.raises(PplexError, match="two recordings would have one"):
        plan_files(tmp_path, ["a.wav", "a.wav"], ".srt", True)


USER = [Word("Hello?", 0.0, 0.5, 0)]
AGENT = [Word("Hi", 0.4, 0.6, 5), Word("<there>.", 0.6, 1.0, 7)]


def test_both_sides_stand_in_the_order_of_their_times(tmp_path):
    texts = {}
    for form in ("vtt", "srt", "tsv", "txt", "json"):
        ending = f".dialogue.{form}"
        (path,) = plan_files(tmp_path, ["calls/a.wav"], ending, False).values()
        assert path.name == f"calls-a.dialogue.{form}"
        write_dialogue(path, {"user": USER, "agent": AGENT})
        texts[form] = path.read_text()
    assert texts["vtt"] == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:00.500\n<v User>Hello?</v>\n\n"
        "00:00:00.400 --> 00:00:01.000\n<v Agent>Hi &lt;there&gt;.</v>\n\n"
    )
    assert texts["srt"].startswith("1\n00:00:00,000 --> 00:00:00,500\nUser: Hello?\n")
    assert texts["txt"].splitlines()[1] == "[00:00:00.400] Agent: Hi <there>."
    assert texts["tsv"].splitlines() == [
        "start\tend\tspeaker\ttext",
        "0\t500\tuser\tHello?",
        "400\t1000\tagent\tHi <there>.",
    ]
    content = json.loads(texts["json"])
    assert [word["speaker"] for word in content["words"]] == ["user", "agent", "agent"]
    assert content["cues"][1]["end_s"] == 1.0


def noise(low_hz: float, high_hz: float, seconds: float) -> np.ndarray:
    """Noise of one band."""
    white = np.random.default_rng(1).normal(0, 0.2, round(16_000 * seconds))
    spectrum, at = np.fft.rfft(white), np.fft.rfftfreq(len(white), 1 / 16_000)
    spectrum[(at < low_hz) | (at > high_hz)] = 0
    return np.fft.irfft(spectrum, len(white))


@pytest.mark.parametrize("order", [("low", "high"), ("high", "low")])
def test_onnx_asr_hears_words_at_their_times(order):
    bands = {"low": (50, 1200), "high": (2500, 7500)}
    pcm = np.random.default_rng(0).normal(0, 1e-4, 4 * 16_000)
    for word, start in zip(order, (16_000, 25_600), strict=True):
        sound = noise(*bands[word], 0.6)
        pcm[start : start + len(sound)] += sound
    recogniser = make_recogniser(f"onnx={DATA.parent / 'asr'}")
    heard = recogniser(pcm.astype(np.float32))
    assert [word.text for word in heard] == list(order)
    assert [word.start_s for word in heard] == pytest.approx([1.0, 1.6], abs=0.1)
    assert all(word.start_s < word.end_s <= 2.4 for word in heard)
    described = recogniser.describe()
    assert described["model"] == "nemo-conformer-ctc" and described["version"]


@pytest.mark.parametrize(
    "config", [None, "{", "[]", '{"model_type": "unknown"}', '{"model_type": "vosk"}']
)
def test_a_folder_without_a_model_for_onnx_asr_is_refused(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(PplexError, match=f"onnx={tmp_path}"):
        make_recogniser(f"onnx={tmp_path}")


def test_words_without_times_are_spread_over_their_utterance():
    from pplex.evaluation.recognisers import _spread

    heard = _spread(["a", "long", "word"], 6.0)
    assert [word for word, _, _ in heard] == ["a", "long", "word"]
    assert [start for _, start, _ in heard] == pytest.approx([0.0, 1.0, 3.5])
    assert _spread([], 1.0) == []
