"""``pplex respond`` from a recording to its files, on the tiny random model."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from pplex.cli.main import cli

RATE = 24000
FRAME = 1920
GREEDY = ("--greedy",)
# A 16-bit sample is read over 32768 and written times 32767, as the reference does.
ONE_STEP = 1


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("PPLEX_MODEL", raising=False)
        yield


def pplex(*args: object, model: object, **env: str) -> Result:
    """Run ``pplex respond`` and expect it to be done."""
    line = ["respond", *args]
    if model is not None:
        line += ["--model", model]
    result = CliRunner(env=env).invoke(cli, [str(arg) for arg in line])
    assert result.exit_code == 0, result.stderr
    return result


@dataclass
class Done:
    """A run with every output, and what it wrote."""

    result: Result
    folder: Path

    @property
    def stats(self) -> dict:
        return json.loads((self.folder / "stats.json").read_text(encoding="utf-8"))

    @property
    def transcript(self) -> dict:
        return json.loads((self.folder / "said.json").read_text(encoding="utf-8"))

    @property
    def tokens(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "tokens.npz", allow_pickle=False) as archive:
            return dict(archive)


@pytest.fixture(scope="module")
def call(data) -> Path:
    """A recording of 24 000 samples at 24 kHz: 12 and a half frames."""
    return data / "respond" / "user_c.wav"


@pytest.fixture(scope="module")
def done(tmp_path_factory, call, tiny) -> Done:
    folder = tmp_path_factory.mktemp("done")
    result = pplex(
        *(call, "-o", folder / "out.wav", "--tail", "0.5", "--seed", "7"),
        *("--stats", folder / "stats.json", "--transcript", folder / "said.json"),
        *("--tokens", folder / "tokens.npz", "--temp", "0.9", "--top-k", "100"),
        *("--prompt", "You like plums."),
        model=tiny,
    )
    return Done(result, folder)


@pytest.fixture
def answer(tmp_path, tiny) -> Callable[..., np.ndarray]:
    """Answer a recording; the agent's track as int16 (samples,)."""

    def run(source: Path, *args: object) -> np.ndarray:
        output = tmp_path / "agent.wav"
        pplex(
            *(source, "-o", output, "--layout", "agent", "--overwrite", *args),
            model=tiny,
        )
        return read(output)

    return run


def read(path: Path) -> np.ndarray:
    pcm, rate = soundfile.read(path, dtype="int16")
    assert rate == RATE
    return pcm


def record(path: Path, pcm: np.ndarray, rate: int = RATE, **options: str) -> Path:
    soundfile.write(path, pcm, rate, **options)
    return path


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(-0.3, 0.3, shape).astype(np.float32)


# Layouts and lengths


def test_stereo_has_the_user_left_and_the_agent_right(tmp_path, call, tiny, answer):
    agent = answer(call, *GREEDY)
    pplex(call, "-o", tmp_path / "both.wav", *GREEDY, model=tiny)
    both = read(tmp_path / "both.wav")
    assert both.shape == (24000, 2)
    difference = both[:, 0].astype(int) - read(call)
    assert np.abs(difference).max() <= ONE_STEP
    assert np.array_equal(both[:, 1], agent)
    assert agent.any()


def test_separate_writes_a_file_for_each_side(tmp_path, call, tiny, answer):
    agent = answer(call, *GREEDY)
    folder = tmp_path / "apart"
    folder.mkdir()
    pplex(call, "-o", folder / "a.b.wav", "--layout", "separate", *GREEDY, model=tiny)
    assert {p.name for p in folder.iterdir()} == {"a.b.user.wav", "a.b.agent.wav"}
    assert np.array_equal(read(folder / "a.b.agent.wav"), agent)
    user = read(folder / "a.b.user.wav")
    assert np.abs(user.astype(int) - read(call)).max() <= ONE_STEP


@pytest.mark.parametrize(
    ("samples", "rate", "channels", "suffix", "expected"),
    [
        (1, 24000, 1, "wav", 1),
        (1919, 24000, 1, "wav", 1919),
        (1920, 24000, 1, "wav", 1920),
        (1921, 24000, 1, "wav", 1921),
        (1601, 8000, 1, "wav", 4803),
        (5000, 44100, 2, "wav", 2721),  # 2721.09
        (7000, 48000, 1, "flac", 3500),
    ],
)
def test_the_agents_track_is_as_long_as_the_recording(
    tmp_path, tiny, samples, rate, channels, suffix, expected
):
    source = record(tmp_path / f"call.{suffix}", noise(samples, channels), rate)
    stats = tmp_path / "stats.json"
    pplex(source, "-o", tmp_path / "out.wav", "--stats", stats, model=tiny)
    assert read(tmp_path / "out.wav").shape == (expected, 2)
    assert json.loads(stats.read_text())["frames"] == -(-expected // FRAME)


def test_a_tail_lengthens_both_tracks_with_silence_for_the_user(done):
    both = read(done.folder / "out.wav")
    assert len(both) == 24000 + 12000
    assert not both[24000:, 0].any()
    assert both[24000:, 1].any()


def test_a_tail_changes_nothing_before_it(call, answer):
    whole = 12 * FRAME  # the recording ends in the 13th frame
    short, long = (
        answer(call, *GREEDY, "--tail", tail)[:whole].astype(int) for tail in (0, 1)
    )
    assert np.abs(long - short).max() <= ONE_STEP


# Channels


@pytest.fixture
def two_channels(tmp_path, call) -> Path:
    """Noise on channel 1, the recording on channel 2."""
    user = read(call)
    other = (noise(len(user)) * 32767).astype(np.int16)
    return record(tmp_path / "two.wav", np.stack([other, user], axis=1))


def test_channel_2_is_the_second_channel(call, two_channels, answer):
    expected = answer(call, *GREEDY)
    assert np.array_equal(answer(two_channels, *GREEDY, "--channel", 2), expected)
    assert not np.array_equal(answer(two_channels, *GREEDY), expected)


def test_the_average_of_two_equal_channels_is_either(tmp_path, call, answer):
    user = read(call)
    source = record(tmp_path / "same.wav", np.stack([user, user], axis=1))
    expected = answer(call, *GREEDY)
    assert np.array_equal(answer(source, *GREEDY, "--channel", "mix"), expected)


def test_a_choice_of_channels_is_said(tmp_path, tiny, two_channels):
    out = tmp_path / "out.wav"
    said = pplex(two_channels, "-o", out, model=tiny).stderr
    assert "channel 1" in said and "--channel" in said
    chosen = pplex(two_channels, "-o", out, "--channel", 1, "--overwrite", model=tiny)
    assert "--channel" not in chosen.stderr


# Tokens, transcript, stats


def test_tokens_have_a_column_a_frame(done):
    tokens = done.tokens
    frames = -(-36000 // FRAME)
    assert {name: (a.shape, a.dtype.name) for name, a in tokens.items()} == {
        "user": ((8, frames), "int32"),
        "agent": ((8, frames), "int32"),
        "text": ((frames,), "int32"),
    }
    assert 0 <= tokens["agent"].min() and tokens["agent"].max() < 2048
    assert 0 <= tokens["user"].min() and tokens["user"].max() < 2048
    assert 0 <= tokens["text"].min() and tokens["text"].max() < 512


def test_the_users_codes_do_not_depend_on_the_agent(tmp_path, call, tiny, done):
    path = tmp_path / "tokens.npz"
    pplex(
        *(call, "-o", tmp_path / "out.wav", "--tail", "0.5", "--tokens", path),
        *GREEDY,
        model=tiny,
    )
    with np.load(path) as other:
        assert np.array_equal(other["user"], done.tokens["user"])
        assert not np.array_equal(other["agent"], done.tokens["agent"])


def test_the_transcript_has_words_with_their_frames(done):
    transcript, text = done.transcript, done.tokens["text"]
    assert transcript["duration_s"] == 1.5
    assert transcript["text"] == " ".join(w["text"] for w in transcript["words"])
    assert transcript["words"]
    for word in transcript["words"]:
        assert text[word["frame"]] >= 4  # not padding
        assert word["start_s"] == pytest.approx(word["frame"] * 0.08)
        assert word["end_s"] > word["start_s"]
    assert transcript["metadata"]["seed"] == 7
    assert transcript["metadata"]["prompt"] == "You like plums."


@pytest.mark.parametrize(
    ("suffix", "start"),
    [("srt", "1\n00:00:0"), ("vtt", "WEBVTT\n\n00:00:0"), ("txt", "")],
)
def test_the_transcripts_suffix_decides_its_form(
    tmp_path, call, tiny, done, suffix, start
):
    path = tmp_path / f"said.{suffix}"
    pplex(
        *(call, "-o", tmp_path / "out.wav", "--transcript", path, "--tail", "0.5"),
        *("--seed", "7", "--temp", "0.9", "--top-k", "100"),
        *("--prompt", "You like plums."),
        model=tiny,
    )
    content = path.read_text(encoding="utf-8")
    assert content.startswith(start)
    for word in done.transcript["words"]:
        plain = word["text"] if suffix != "vtt" else escaped(word["text"])
        assert plain in content


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


PARTS = {
    "load_s",
    "read_s",
    "prefill_s",
    "warm_up_s",
    "encode_s",
    "steps_s",
    "decode_s",
    "write_s",
    "other_s",
}


def test_the_parts_of_the_time_add_up_to_the_total(done):
    stats = done.stats
    assert sum(stats[part] for part in PARTS) == pytest.approx(stats["total_s"])
    assert all(stats[part] >= 0 for part in PARTS)


def test_the_real_time_factors_follow_from_the_times(done):
    stats = done.stats
    with_load = stats["total_s"] / stats["audio_s"]
    without = stats["total_s"] - stats["load_s"] - stats["warm_up_s"]
    assert stats["real_time_factor_with_load"] == pytest.approx(with_load)
    assert stats["real_time_factor"] == pytest.approx(without / stats["audio_s"])


def test_latencies_are_of_every_step_in_order(done):
    step, frames = done.stats["step_ms"], done.stats["frames"]
    assert 0 < step["p50"] <= step["p95"] <= step["p99"] <= step["max"]
    assert step["mean"] * frames == pytest.approx(done.stats["steps_s"] * 1000)
    assert 0 <= step["late_frames"] <= frames


def test_the_series_has_every_step_in_thousandths(done):
    series, step = done.stats["step_ms_series"], done.stats["step_ms"]
    assert len(series) == done.stats["frames"]
    assert max(series) == pytest.approx(step["max"], abs=0.001)
    assert sum(series) == pytest.approx(step["mean"] * len(series), abs=0.01)
    assert all(round(ms, 3) == ms for ms in series)


def test_the_stats_say_what_was_run(done, call, tiny):
    stats = done.stats
    expected = {
        "input": str(call),
        "outputs": {
            "audio": str(done.folder / "out.wav"),
            "transcript": str(done.folder / "said.json"),
            "stats": str(done.folder / "stats.json"),
            "tokens": str(done.folder / "tokens.npz"),
        },
        "audio_s": 1.5,
        "tail_s": 0.5,
        "frames": 19,
        "dtype": "float32",
        "bits": [16],  # as the file has them
        "compute": "dense",
        "model": str(tiny),
        "repo": None,
        "revision": None,
        "voice": "NATF0",  # the model has no NATF2: its first voice
        "prompt": "You like plums.",
        "seed": 7,
        "temp": 0.9,
        "top_k": 100,
        "text_temp": 0.7,
        "text_top_k": 25,
        "channel": 1,
        "source_rate": 24000,
        "source_channels": 1,
    }
    assert {key: stats[key] for key in expected} == expected
    assert stats["peak_memory_gb"] > 0


def test_greedy_is_recorded_as_temperature_0(tmp_path, call, tiny):
    path = tmp_path / "stats.json"
    pplex(call, "-o", tmp_path / "out.wav", "--stats", path, *GREEDY, model=tiny)
    stats = json.loads(path.read_text())
    assert (stats["temp"], stats["text_temp"]) == (0.0, 0.0)


# Seeds and sampling


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    tmp_path, call, tiny
):
    written = []
    for idx, seed in enumerate((1, 1, 2)):
        output = tmp_path / f"{idx}.wav"
        pplex(call, "-o", output, "--seed", seed, model=tiny)
        written.append(output.read_bytes())
    assert written[0] == written[1]
    assert written[0] != written[2]


@pytest.mark.parametrize(
    "options",
    [
        ("--temp", 0, "--text-temp", 0),
        ("--top-k", 1, "--text-top-k", 1, "--seed", 5),
    ],
    ids=["temperature 0", "one candidate"],
)
def test_greedy_has_other_names(call, answer, options):
    assert np.array_equal(answer(call, *options), answer(call, *GREEDY))


# Roles and voices


def test_the_default_role_is_the_teacher(call, answer):
    plain = answer(call, *GREEDY)
    assert np.array_equal(answer(call, *GREEDY, "--role", "teacher"), plain)
    assert not np.array_equal(answer(call, *GREEDY, "--role", "casual"), plain)


def test_a_prompt_file_is_the_prompt(tmp_path, call, answer):
    path = tmp_path / "role.txt"
    path.write_text("You like plums.\n")
    from_file = answer(call, *GREEDY, "--prompt-file", path)
    assert np.array_equal(
        from_file, answer(call, *GREEDY, "--prompt", path.read_text())
    )


def test_an_empty_prompt_is_no_role(call, answer):
    none = answer(call, *GREEDY, "--prompt", "")
    assert not np.array_equal(none, answer(call, *GREEDY))


def test_a_voice_may_be_a_name_or_its_file(tmp_path, call, tiny, answer):
    with tarfile.open(tiny / "voices.tgz") as archive:
        member = archive.extractfile("voices/NATM0.pt")
        assert member is not None
        path = tmp_path / "friend.pt"
        path.write_bytes(member.read())
    named = answer(call, *GREEDY, "--voice", "NATM0")
    assert np.array_equal(answer(call, *GREEDY, "--voice", path), named)
    assert not np.array_equal(answer(call, *GREEDY), named)


def test_a_recording_makes_the_voice_that_was_made_of_it(data, call, answer):
    recording = data / "respond" / "voice_NATF0.wav"
    from_wav = answer(call, *GREEDY, "--voice", recording)
    assert np.array_equal(from_wav, answer(call, *GREEDY, "--voice", "NATF0"))


# Around the run


def test_the_model_may_come_from_the_environment(tmp_path, call, tiny):
    output = tmp_path / "out.wav"
    pplex(call, "-o", output, "--offline", model=None, PPLEX_MODEL=str(tiny))
    assert output.exists()


def test_stdout_stays_empty_and_stderr_says_what_was_done(done):
    assert done.result.stdout == ""
    for said in ("out.wav", "stats.json", "NATF0", "seed 7", "real-time factor"):
        assert said in done.result.stderr


def test_quiet_says_nothing_and_verbose_more(tmp_path, call, tiny):
    output = tmp_path / "out.wav"
    assert pplex(call, "-o", output, "-q", model=tiny).stderr == ""
    said = pplex(call, "-o", output, "--overwrite", "-v", model=tiny).stderr
    assert "24000 Hz" in said and str(tiny) in said


def test_overwrite_replaces_what_is_there(tmp_path, call, tiny):
    output = tmp_path / "out.wav"
    output.write_text("old")
    pplex(call, "-o", output, "--overwrite", model=tiny)
    assert len(read(output)) == 24000


def test_nothing_but_the_outputs_is_left(done):
    names = {path.name for path in done.folder.iterdir()}
    assert names == {"out.wav", "stats.json", "said.json", "tokens.npz"}


def test_a_flac_is_answered_like_its_wav(tmp_path, call, answer):
    path = record(tmp_path / "call.flac", read(call))
    assert np.array_equal(answer(path, *GREEDY), answer(call, *GREEDY))
