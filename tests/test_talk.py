"""Two agents that talk to each other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from reference_driver import ENGINES

from pplex.checkpoint.folder import CheckpointFolder
from pplex.checkpoint.weights import codec_tensors, lm_tensors
from pplex.conversation.prompts import make_role
from pplex.conversation.scheduler import run as run_tracks
from pplex.conversation.script import Line, lay_out
from pplex.conversation.talk import Dialogue, Side, converse_together
from pplex.conversation.tracks import Track
from pplex.engine.base import Engine
from pplex.engine.choose import KINDS
from pplex.evaluation.find import find
from pplex.model.prompt import no_prompt
from pplex.model.sampling import SamplingConfig
from pplex.respond.lock import LOCK_NAME, FolderLock

TINY = Path(__file__).parent / "data" / "tiny"
FRAME, RATE = 1920, 24_000
SAMPLING = SamplingConfig()


@pytest.fixture(scope="module")
def moshi_folder(tmp_path_factory) -> Path:
    """The tiny model's weights as a Moshi."""
    folder = tmp_path_factory.mktemp("moshi") / "tiny"
    left_out = shutil.ignore_patterns("voices*", "config.json")
    shutil.copytree(TINY, folder, ignore=left_out)
    raw = json.loads((TINY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "moshi"}))
    return folder


def engine_of(kind: str, folder: Path):
    files = CheckpointFolder(folder)
    config = files.read_config()
    tensors = lm_tensors(files, config.lm), codec_tensors(files, config.mimi)
    return KINDS[kind].make(config, *tensors)


def talks(engine, model, lengths=(40, 9, 33, 21)) -> list[Dialogue]:
    starts = [
        engine.prefill(make_role(model, None, text).prompt)
        for text in ("hello", "a rather longer role than that")
    ]
    script = lay_out([Line(0.4, "so it is", "x")], model.tokenizer, model.config)
    return [
        Dialogue(
            str(idx),
            (
                Side(starts[idx % 2], 10 + idx, script if idx else ()),
                Side(starts[1], 20 + idx),
            ),
            length,
            _nowhere,
        )
        for idx, length in enumerate(lengths)
    ]


def _nowhere(start: int, left: np.ndarray, right: np.ndarray) -> None:
    """Nobody listens."""


class Hearing(Track):
    """A conversation with a user of these codes (codebooks, frames)."""

    def __init__(self, engine: Engine, side: Side, codes: np.ndarray) -> None:
        lm, length = engine.config.lm, codes.shape[1]
        super().__init__(lm, side.start, side.seed, length, side.script)
        columns = self._user_columns(iter([codes]), lambda codes: None)
        self.columns = self._opened(columns)


def assert_heard(engines, dialogue, answers) -> None:
    """That each said what it says to a user of the other's codes."""
    for engine, side, answer, other in zip(
        engines, dialogue.sides, answers, answers[::-1], strict=True
    ):
        assert np.array_equal(answer.user, other.agent)
        track = Hearing(engine, side, other.agent)
        for _ in run_tracks(engine, [track], SAMPLING, capacity=1):
            pass
        said = np.concatenate([answer.text[None], answer.agent])
        assert np.array_equal(track._frames(), said)


def test_each_hears_what_the_other_says_whoever_talks_beside_them(
    each_engine, small_model
):
    engines = each_engine, each_engine
    those = talks(each_engine, small_model)
    found = {}
    for batch_size in (1, 3):
        sounds: dict[str, list[np.ndarray]] = {one.key: [] for one in those}

        def keep(one: Dialogue, sounds=sounds) -> Dialogue:
            def write(start: int, *sides: np.ndarray) -> None:
                assert start == sum(x.shape[1] for x in sounds[one.key])
                sounds[one.key].append(np.stack(sides))

            return replace(one, write=write)

        done = converse_together(
            engines, map(keep, those), SAMPLING, batch_size=batch_size
        )
        found[batch_size] = {one.key: answers for one, answers in done}
        assert sorted(found[batch_size]) == [one.key for one in those]
        for one in those:
            whole = np.concatenate(sounds[one.key], axis=1)
            assert whole.shape == (2, one.num_frames * FRAME)
            left, right = found[batch_size][one.key]
            assert np.array_equal(whole[:, -FRAME:], np.stack([left.pcm, right.pcm]))
            if batch_size == 1:
                assert_heard(engines, one, (left, right))
                assert not np.array_equal(left.agent, right.agent)
    if each_engine.dtype == "float32":
        for one in those:
            for alone, beside in zip(*(found[n][one.key] for n in (1, 3)), strict=True):
                assert np.array_equal(alone.agent, beside.agent)
                assert np.array_equal(alone.text, beside.text)
                assert np.array_equal(alone.pcm, beside.pcm)


@pytest.mark.parametrize("moshi_side", [0, 1])
@pytest.mark.parametrize("kind", ENGINES)
def test_models_may_differ(kind, moshi_side, moshi_folder, tiny_model):
    moshi, other = engine_of(kind, moshi_folder), engine_of(kind, TINY)
    start = other.prefill(make_role(tiny_model, None, "hello").prompt)
    pair = [
        (moshi, Side(moshi.prefill(no_prompt(moshi.config.lm)), 1)),
        (other, Side(start, 2)),
    ]
    if moshi_side:
        pair.reverse()
    engines, sides = zip(*pair, strict=True)
    those = [Dialogue(str(n), sides, n, _nowhere) for n in (8, 13, 5)]
    done = list(converse_together(engines, those, SAMPLING, batch_size=2))
    assert sorted(one.num_frames for one, _ in done) == [5, 8, 13]
    for one, answers in done:
        assert len(answers[0].text) == len(answers[1].text) == one.num_frames
        assert_heard(engines, one, answers)


def test_a_talk_is_a_stereo_file_with_what_both_said(run, tmp_path):
    out = tmp_path / "talk.wav"
    command = (
        *("talk", "--left", "voice=NATF0,role=teacher", "--right", "voice=NATM0"),
        *("--first-words", "Hello! What would you like to learn?", "--seconds", 9),
        *("-o", out, "--model", "mini", "--transcript", "json,txt", "--tokens"),
    )
    assert run(*command).exit_code == 0
    pcm, rate = soundfile.read(out)
    assert (pcm.shape, rate) == ((113 * FRAME, 2), RATE)
    assert (np.abs(pcm).max(axis=0) > 0.05).all()
    text = out.with_suffix(".txt").read_text()
    assert text.startswith("[00:00:00.160] Left: Hello!") and "Right: " in text
    content = json.loads((tmp_path / "talk.transcript.json").read_text())
    assert (
        content["metadata"]["left"]["seed"] + 1 == content["metadata"]["right"]["seed"]
    )
    assert content["words"][0] == {
        **{"speaker": "left", "text": "Hello!", "start_s": 0.16, "end_s": 0.32},
        "scripted": True,
    }
    with np.load(out.with_suffix(".npz")) as arrays:
        assert {name: array.shape for name, array in arrays.items()} == {
            **{"left": (8, 113), "right": (8, 113)},
            **{"left_text": (113,), "right_text": (113,)},
        }
    # Again, and as one of several: the same bytes.
    bytes_ = out.read_bytes()
    again = run(*command)
    assert again.exit_code == 1 and "exists" in again.stderr
    (tmp_path / "jobs.csv").write_text(
        "output,left,seconds,seed\n"
        "a/x.wav,,9,42424242\n"
        'b.wav,"prompt=You are Ann, a teacher.,first-words=Hi.",4,\n'
        "c.wav,,4,\n"
    )
    jobs = ("--jobs", tmp_path / "jobs.csv", "-o", tmp_path / "many")
    names = [*command[: command.index("-o")], *jobs, "--model", "mini"]
    done = run(*names, "--transcript", "json", "--batch-size", 2)
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "many/a/x.wav").read_bytes() == bytes_
    content = json.loads((tmp_path / "many/b.transcript.json").read_text())
    left = content["metadata"]["left"]
    assert (left["prompt"], left["voice"]) == ("You are Ann, a teacher.", "NATF0")
    other = json.loads((tmp_path / "many/c.transcript.json").read_text())
    assert other["metadata"]["left"]["seed"] != left["seed"]
    # What is done is not done again; what is gone, or asked for otherwise, is.
    for path in (tmp_path / "many").glob("c.*"):
        path.unlink()
    sound = (tmp_path / "many/b.wav").stat()
    again = run(*names, "--transcript", "json")
    assert again.exit_code == 0 and "2 done before\n" in again.stderr
    assert (tmp_path / "many/c.wav").is_file()
    assert (tmp_path / "many/b.wav").stat() == sound
    # Also what a run that was killed had no time to note: its lock tells of c's files.
    manifest, lock = tmp_path / "many/manifest.jsonl", tmp_path / "many" / LOCK_NAME
    whole = manifest.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    told = {key: lines[-1][key] for key in ("recording", "settings")}
    begun = [{"begun": output | told} for output in lines[-1]["outputs"].values()]
    others = [line for line in lines if line["recording"] != "c.wav"]
    half = tmp_path / "many/a/.x.wav.pplex-0123abcd.tmp"

    def killed() -> None:
        manifest.write_text("".join(json.dumps(line) + "\n" for line in others))
        lock.write_text("".join(json.dumps(line) + "\n" for line in begun))
        half.touch()

    killed()
    words = (tmp_path / "many/c.transcript.json").read_bytes()
    again = run(*names, "--transcript", "json")
    assert again.exit_code == 0 and "2 done before\n" in again.stderr
    assert (tmp_path / "many/c.transcript.json").read_bytes() == words
    assert not half.exists() and not lock.exists()
    # But not what somebody has changed since, nor beside a run that is at work.
    killed()
    (tmp_path / "many/c.transcript.json").write_text("Mine.")
    again = run(*names, "--transcript", "json")
    assert again.exit_code == 1 and "exists" in again.stderr
    assert (tmp_path / "many/c.transcript.json").read_text() == "Mine."
    held = FolderLock(tmp_path / "many")
    again = run(*names, "--transcript", "json")
    assert again.exit_code == 1 and "another run of pplex" in again.stderr
    held.release(ended=True)
    (tmp_path / "many/c.transcript.json").write_bytes(words)
    manifest.write_text(whole)
    other = run(*names, "--transcript", "json", "--top-k", 9)
    assert other.exit_code == 1 and "exists" in other.stderr
    # The right one is the agent of a report.
    found = find([tmp_path / "many"])
    assert [item.name for item in found.items] == ["a/x.wav", "b.wav", "c.wav"]
    for item in found.items:
        said = json.loads((item.audio.with_suffix(".transcript.json")).read_text())
        words = [w["text"] for w in said["words"] if w["speaker"] == "right"]
        assert [word.text for word in item.words] == words
        assert item.settings["seed"] == said["metadata"]["right"]["seed"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--left", "voice"), "--left: 'voice' is not KEY=VALUE with a KEY of voice"),
        (("--left", "voice=a,voice=b"), "--left: voice is given twice"),
        (("--right", "role=teech"), "--right: there is no role 'teech'"),
        (("--right", "role=teacher,prompt="), "--right: prompt and role exclude"),
        (("--right", "voice=NATF9"), "voice 'NATF9': neither a voice of this model"),
        (("--right", "first-words= "), "--right:  : there are no words to say"),
        (("--first-words", "Goodbye and study well."), "give more --seconds"),
        (("--right", f"model={TINY}"), "have different codecs"),
    ],
)
def test_what_cannot_talk_is_refused(options, said, run, tmp_path):
    out = tmp_path / "o.wav"
    done = run("talk", *options, "--seconds", 1, "-o", out, "--model", "mini")
    assert done.exit_code == 1 and said in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("beside", [["--tokens"], ["--transcript", "srt"]])
def test_a_stream_has_no_files_beside_it(beside, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("talk", *beside, "-o", "-", "--model", "mini")
    assert done.exit_code == 2 and "a stream has no name" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a.wav,x", "line 2 left: 'x' is not KEY=VALUE"),
        ("../a.wav,", "line 2: output '../a.wav' leaves the output folder"),
        (",voice=NATF0", "line 2: output is '', where text is expected"),
        ("a.wav,model=mini", "line 2: the models are those of --left and --right"),
        ("a.wav,\nA.wav,", "lines 2 and 3 have the output A.wav"),
        ("b/a.mp4,", "a.mp4: the output is a WAV file"),
        ("b/a.wav,voice=NATF9", "voice 'NATF9': neither a voice of this model"),
    ],
)
def test_what_a_jobs_file_says_wrong_is_named_by_its_line(row, said, run, tmp_path):
    jobs = tmp_path / "jobs.csv"
    jobs.write_text(f"output,left\n{row}\n")
    done = run("talk", "--jobs", jobs, "-o", tmp_path / "out", "--model", "mini")
    assert done.exit_code == 1 and said in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == [jobs]
