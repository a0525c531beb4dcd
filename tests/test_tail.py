"""``--tail auto``: how long the agent is waited for, and that all ways agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from piped import HEADER, pipe, samples

import pplex
from pplex.audio.files import Samples
from pplex.conversation.prompts import make_role
from pplex.conversation.quiet import Quiet, is_quiet
from pplex.conversation.scheduler import converse_many
from pplex.conversation.tracks import Conversation
from pplex.engine.base import Codec, Done, Start
from pplex.errors import PplexError
from pplex.model.sampling import GREEDY
from pplex.respond.ending import Ending, advice, is_cut_off

RATE, FRAME = 24000, 1920
SAMPLES = Path(__file__).parent.parent / "samples"
SPEECH = 0.1 * np.sin(np.arange(FRAME) / 5).astype(np.float32)
SILENCE = np.zeros(FRAME, np.float32)


@pytest.fixture(scope="module")
def mini():
    return pplex.load("mini")


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> list[Path]:
    """Questions that end as soon as they are asked: the answer comes in the tail.

    No length is that of whole frames.
    """
    folder = tmp_path_factory.mktemp("calls")
    for name, seconds in (("teacher_sky", 3.01), ("bank_hours", 4.007), ("noisy", 2.5)):
        pcm, rate = soundfile.read(SAMPLES / f"{name}.wav")
        soundfile.write(folder / f"{name}.wav", pcm[: round(seconds * rate)], rate)
    return sorted(folder.glob("*.wav"))


def quiet_of(*frames: tuple[int, np.ndarray], first: int = 0) -> int | None:
    """Where a tail that begins at frame ``first`` ends."""
    from pplex.model.config import ModelConfig

    quiet = Quiet(ModelConfig())
    quiet.begin(first)
    for text, pcm in frames:
        quiet.hear(np.array([text]), pcm)
    return quiet.end


def test_it_ends_after_a_second_and_a_half_of_the_tail():
    pad = (3, SILENCE)
    assert quiet_of(*[pad] * 18) is None
    assert quiet_of(*[pad] * 30) == 19
    assert quiet_of(*[pad] * 60, first=40) == 59


@pytest.mark.parametrize("loud", [(3, SPEECH), (77, SILENCE)], ids=["sound", "text"])
def test_sound_and_text_both_begin_the_wait_anew(loud):
    pad = (3, SILENCE)
    assert quiet_of(*[pad] * 10, loud, *[pad] * 30) == 30


def test_quiet_is_below_45_decibels_and_padding():
    tone = np.ones(FRAME, np.float32)
    assert is_quiet(tone * np.float32(10 ** (-45.1 / 20)), 0)
    assert not is_quiet(tone * np.float32(10 ** (-44.9 / 20)), 0)
    assert not is_quiet(SILENCE, 4)


def test_the_answer_is_that_of_a_tail_of_the_length_it_took(mini, calls):
    for call in calls:
        auto = mini.respond(call, tail="auto", seed=5)
        user = round(soundfile.info(call).duration * RATE)
        took = (len(auto.audio) - user) / RATE
        assert 1.52 <= took < 30 and len(auto.audio) % FRAME == 0
        same = mini.respond(call, tail=took, seed=5)
        assert np.array_equal(auto.audio, same.audio)
        assert np.array_equal(auto.text_ids, same.text_ids)
        assert np.array_equal(auto.codes, same.codes)
        # It says no more, and nothing of it is lost.
        assert mini.respond(call, tail=took + 4, seed=5).text.startswith(auto.text)
        last = auto.audio[-19 * FRAME :].reshape(19, -1)
        levels = 10 * np.log10((last**2).mean(axis=1) + 1e-12)
        assert (levels < -45).all() and (auto.text_ids[-19:] <= 3).all()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_batch_waits_as_one_recording_does(mini, calls, size):
    options = {"tail": "auto", "seed": 5}
    alone = [mini.respond(call, **options) for call in calls]
    assert len({len(answer.audio) for answer in alone}) == 3
    for one, other in zip(
        alone, mini.batch(calls, batch_size=size, **options), strict=True
    ):
        assert np.array_equal(one.audio, other.audio)
        assert np.array_equal(one.codes, other.codes)


class Script(Codec):
    """Sound of a code: a tone for 1, silence for 0. Recordings are coded in twos."""

    concurrent, launcher = False, None
    chunk_frames, group = 16, 2

    def make_state(self, saved=None):
        return None

    def encode(self, frames, state):
        return np.zeros((8, len(frames)), np.int32)

    def decode(self, codes, state):
        sounds = [SPEECH if code == 1 else SILENCE for code in codes[0]]
        return np.concatenate([SPEECH[:0], *sounds])

    def encode_next(self, parts, state):
        return lambda: [self.encode(frames, state) for frames in parts]

    def decode_next(self, parts, state):
        return lambda: [self.decode(codes, state) for codes in parts]


class Scripted:
    """An agent that sounds in the frames before its seed; steps run ahead."""

    is_async = True

    def __init__(self, config):
        self.config, self.codec = config, Script()
        self.at: dict[int, list[int]] = {}

    def rows(self, capacity, sampling, *, live=False):
        self.capacity, self.at = capacity, {}
        return self

    def join(self, start, seed, frames=None):
        place = next(p for p in range(self.capacity) if p not in self.at)
        self.at[place] = [0, seed]
        return place

    def leave(self, place):
        del self.at[place]

    def step(self, user, text=None):
        columns = np.zeros((self.capacity, self.config.lm.num_agent_streams), np.int32)
        columns[:, 0] = 3
        for place, (frame, seed) in self.at.items():
            columns[place, 1:] = frame < seed
            self.at[place][0] += 1
        return Done(columns)


def test_where_sound_is_coded_in_groups_and_steps_run_ahead_it_is_the_same(tiny_model):
    """Of those whose tail is given, and those that wait, side by side."""
    config = tiny_model.config
    start = Start(make_role(tiny_model, None, "Hello.").prompt, None)
    engine = Scripted(config)
    # A recording of ten frames and a bit; it sounds until so many.
    pcm, until = np.zeros(10 * FRAME + 7, np.float32), (0, 5, 11, 12, 40, 100, 1000)
    given = [
        Conversation(f"{seed} {auto}", Samples(pcm), start, seed, auto)
        for seed in until
        for auto in (True, False)
    ]
    for size in (1, 3, 20):
        found = {
            one.key: answer
            for one, answer in converse_many(engine, given, GREEDY, batch_size=size)
        }
        assert len(found) == len(given)
        for seed in until:
            auto, plain = found[f"{seed} True"], found[f"{seed} False"]
            assert len(plain.pcm) == len(pcm)
            loud = np.flatnonzero(auto.agent[0] == 1)
            ends = max(11, loud[-1] + 1 if len(loud) else 0) + 19
            most = len(pcm) + 30 * RATE
            assert len(auto.pcm) == (ends * FRAME if seed < 1000 else most)
            assert seed == 1000 or len(loud) == seed
            assert len(auto.text) == len(auto.timings.steps)
            assert len(auto.text) == -(-len(auto.pcm) // FRAME)
            longer = np.pad(pcm, (0, len(auto.pcm) - len(pcm)))
            one = Conversation("", Samples(longer), start, seed)
            ((_, same),) = converse_many(engine, [one], GREEDY, batch_size=1)
            assert np.array_equal(auto.pcm, same.pcm)
            assert np.array_equal(auto.agent, same.agent)
            assert np.array_equal(auto.user, same.user)


def test_an_agent_that_never_is_quiet_has_half_a_minute(tiny, tmp_path, run):
    """Random weights babble on."""
    pcm = np.random.default_rng(1).uniform(-0.3, 0.3, 3001)
    soundfile.write(tmp_path / "in.wav", pcm, RATE)
    result = run(
        *("respond", tmp_path / "in.wav", "-o", tmp_path / "out.wav", "--tail", "auto"),
        *("--model", tiny, "--stats", tmp_path / "s.json"),
    )
    assert result.exit_code == 0, result.stderr
    assert soundfile.info(tmp_path / "out.wav").frames == 3001 + 30 * RATE
    stats = json.loads((tmp_path / "s.json").read_text())
    assert (stats["tail_s"], stats["frames"]) == (30.0, 377)
    assert stats["cut_off"] and "--tail auto" in result.stderr


@pytest.mark.parametrize("output", ["o.wav", "-"])
def test_a_stream_waits_as_a_recording_does(calls, tmp_path, output):
    for call in calls[1:]:
        args = ("--model", "mini", "--tail", "auto", "--seed", "5", "--offline", "-q")
        expected, found = tmp_path / "e.wav", tmp_path / "o.wav"
        pipe(b"", "respond", call, "-o", expected, "--overwrite", *args)
        where = "-" if output == "-" else found
        line = ("respond", "-", "-o", where, "--overwrite", *args)
        code, out, err = pipe(call.read_bytes(), *line)
        assert (code, err) == (0, "")
        content = out if output == "-" else found.read_bytes()
        assert content[HEADER:] == samples(expected)


def test_respond_and_batch_write_the_same(calls, run, tmp_path):
    jobs = tmp_path / "jobs.csv"
    rows = [f"{call},auto,9" for call in calls] + [f"{calls[0]},0.5,9"]
    jobs.write_text("\n".join(["input,tail,seed", *rows]))
    common = ("--model", "mini", "--layout", "separate", "--offline")
    done = run("batch", "--jobs", jobs, "-o", tmp_path / "out", *common)
    assert done.exit_code == 0, done.stderr
    lines = (tmp_path / "out/manifest.jsonl").read_text().splitlines()
    assert len(lines) == 4
    for line in map(json.loads, lines):
        auto = line["tail_s"] != 0.5
        alone = run(
            *("respond", line["input"]["path"], "-o", tmp_path / "o.wav", "--seed", 9),
            *("--tail", "auto" if auto else 0.5, *common, "--overwrite", "-q"),
        )
        assert (alone.exit_code, alone.stderr) == (0, "")
        for side in ("user", "agent"):
            ours = tmp_path / "out" / line["outputs"][side]["path"]
            assert ours.read_bytes() == (tmp_path / f"o.{side}.wav").read_bytes()


def test_a_length_other_than_a_number_is_named(mini, calls, tmp_path, run):
    assert run("respond", "a.wav", "-o", "b.wav", "--tail", "long").exit_code == 2
    jobs = tmp_path / "jobs.csv"
    jobs.write_text("input,tail\na.wav,Auto\n")
    result = run("batch", "--jobs", jobs, "-o", tmp_path / "out", "--model", "mini")
    assert result.exit_code == 1 and "or auto" in result.stderr
    for tail in ("Auto", -1.0, float("nan"), None):
        with pytest.raises(PplexError, match="or 'auto' are expected"):
            mini.respond(calls[0], tail=tail)


# How an answer ends


def test_an_answer_is_cut_off_if_its_end_is_not_quiet():
    pcm = np.concatenate([SPEECH, SILENCE])
    assert not is_cut_off(pcm, np.array([9, 3]), FRAME)
    assert is_cut_off(pcm, np.array([3, 9]), FRAME)
    assert is_cut_off(pcm[: FRAME + 500], np.array([3, 3]), FRAME)


def test_what_is_said_of_endings():
    fine = Ending(3, cut_off=False)
    assert advice([fine, fine]) == []
    (one,) = advice([Ending(0, cut_off=False)])
    assert "said nothing:" in one and "--tail" in one
    (begun,) = advice([Ending(0, cut_off=True)])
    assert "was cut off" in begun
    nothing, cut_off = advice([Ending(0, False), Ending(0, False), Ending(4, True)])
    assert "said nothing in 2 of 3 recordings" in nothing and "--tail" in nothing
    assert "cut off at the end of 1 of 3" in cut_off and "--tail auto" in cut_off


def test_respond_and_batch_say_so(run, tmp_path):
    common = ("--model", "mini", "--offline")
    nobody, short = SAMPLES / "silence.wav", tmp_path / "short.wav"
    result = run("respond", nobody, "-o", tmp_path / "o.wav", *common)
    assert "the agent said nothing: a longer --tail" in result.stderr
    pcm, rate = soundfile.read(SAMPLES / "bank_hours.wav")
    soundfile.write(short, pcm[: round(3.3 * rate)], rate)  # it has begun to greet
    stats = tmp_path / "s.json"
    result = run("respond", short, "-o", tmp_path / "s.wav", "--stats", stats, *common)
    assert "cut off at the end: --tail auto" in result.stderr
    assert json.loads(stats.read_text())["cut_off"]
    for _ in range(2):  # also of what was done before
        result = run("batch", nobody, short, "-o", tmp_path / "out", *common)
        assert "the agent said nothing in 1 of 2 recordings" in result.stderr
        assert "cut off at the end of 1 of 2 recordings" in result.stderr
