"""The library's front door gives what the commands give."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import pplex
from pplex.errors import PplexError
from pplex.model.sampling import SamplingConfig

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "pplex/help/library.md"]


@pytest.fixture(scope="module")
def model(tiny: Path) -> pplex.Model:
    return pplex.load(tiny, offline=True)


@pytest.fixture(scope="module")
def calls(data: Path) -> list[Path]:
    return sorted((data / "respond").glob("user_*.wav"))


def test_importing_it_loads_nothing():
    code = (
        "import pplex, sys; print(sorted({'mlx', 'numpy', 'click'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_its_names_and_its_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", pplex.__version__)
    assert callable(pplex.load)
    assert (ROOT / "pplex" / "py.typed").is_file()
    with pytest.raises(AttributeError, match="'nothing'"):
        pplex.nothing  # noqa: B018


def test_a_recording_is_answered_as_the_command_does(model, tiny, calls, run, tmp_path):
    answer = model.respond(calls[0], voice="NATF0", prompt="Be brief.", tail=0.5)
    answer.save(tmp_path / "library.wav")
    call = ["respond", str(calls[0]), "-m", str(tiny), "--voice", "NATF0"]
    call += ["--prompt", "Be brief.", "--tail", "0.5", "--layout", "agent"]
    call += ["-o", str(tmp_path / "command.wav")]
    call += ["--transcript", str(tmp_path / "command.json")]
    call += ["--tokens", str(tmp_path / "command.npz")]
    assert run(*call).exit_code == 0
    written = (tmp_path / "command.wav").read_bytes()
    assert (tmp_path / "library.wav").read_bytes() == written
    words = json.loads((tmp_path / "command.json").read_text())["words"]
    assert [word.text for word in answer.words] == [word["text"] for word in words]
    assert answer.text == " ".join(word["text"] for word in words)
    with np.load(tmp_path / "command.npz") as tokens:
        assert (answer.text_ids == tokens["text"]).all()
        assert (answer.codes == tokens["agent"]).all()


def test_defaults_are_those_of_the_command(model, tiny, calls, run, tmp_path):
    model.respond(calls[0]).save(tmp_path / "library.wav")
    call = ["respond", str(calls[0]), "-m", str(tiny), "--layout", "agent"]
    assert run(*call, "-o", str(tmp_path / "command.wav")).exit_code == 0
    written = (tmp_path / "command.wav").read_bytes()
    assert (tmp_path / "library.wav").read_bytes() == written


def test_samples_are_answered_like_their_file(model, calls):
    pcm, rate = soundfile.read(calls[0], dtype="float32", always_2d=True)
    assert rate == model.sample_rate
    from_file = model.respond(calls[0], tail=0.3)
    from_samples = model.respond(pcm[:, 0], tail=0.3)
    assert (from_samples.audio == from_file.audio).all()
    assert len(from_samples.audio) == len(pcm) + 0.3 * rate


def test_many_come_in_their_order_each_as_if_alone(model, calls):
    recordings = [calls[0], calls[1], np.zeros(3000, np.float32), calls[0]]
    answers = list(model.batch(recordings, voice="NATM0", batch_size=2))
    assert len(answers) == len(recordings)
    for recording, answer in zip(recordings, answers, strict=True):
        alone = model.respond(recording, voice="NATM0")
        assert (answer.audio == alone.audio).all()
        assert answer.words == alone.words
    assert list(model.batch([])) == []


def test_a_stream_is_answered_frame_by_frame(model, calls):
    pcm, _ = soundfile.read(calls[0], dtype="float32", always_2d=True)
    pcm = pcm[:, 0]
    asked = []

    def chunks():
        for start in range(0, len(pcm), 700):
            asked.append(min(start + 700, len(pcm)))
            yield pcm[start : start + 700]

    pieces = []
    for piece in model.stream(chunks(), voice="NATF0"):
        pieces.append(piece)
        # Nothing is asked for that the frame does not need.
        needed = min(len(pieces) * model.frame_size, len(pcm))
        assert needed <= asked[-1] < needed + 700
    alone = model.respond(calls[0], voice="NATF0")
    audio = np.concatenate([piece.audio for piece in pieces])
    assert (audio == alone.audio).all()
    assert {len(piece.audio) for piece in pieces[:-1]} == {model.frame_size}
    said = "".join(piece.text for piece in pieces)
    assert said.split() == alone.text.split() and said.strip()


def test_a_prompt_that_was_read_before_is_the_same_prompt(model, calls):
    first = model.respond(calls[0], voice="NATF0", prompt="A.")
    other = model.respond(calls[0], voice="NATM0", prompt="A.")
    again = model.respond(calls[0], voice="NATF0", prompt="A.")
    assert (again.audio == first.audio).all()
    assert (other.codes != first.codes).any()


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (np.zeros((2, 100), np.float32), r"float32 of shape \(2, 100\)"),
        (np.zeros(100, np.int16), r"int16 of shape \(100,\)"),
        (np.array([0.0, np.nan]), "sample 1 is NaN"),
        (np.array([1e300]), r"sample 0 is 1e\+300"),
        (np.zeros(0, np.float32), "no samples"),
    ],
)
def test_what_is_no_sound_is_refused(model, samples, said):
    with pytest.raises(PplexError, match=said):
        model.respond(samples)


def test_errors_name_what_is_wrong(model, tiny, calls, tmp_path):
    with pytest.raises(PplexError, match="no_such.wav"):
        model.respond(tmp_path / "no_such.wav")
    with pytest.raises(PplexError, match="no_such.wav"):
        list(model.batch([calls[0], tmp_path / "no_such.wav"]))
    with pytest.raises(PplexError, match="'nobody'"):
        model.respond(calls[0], voice="nobody")
    with pytest.raises(PplexError, match="'nobody'"):
        list(model.batch([calls[0]], voice="nobody"))
    with pytest.raises(PplexError, match="no model 'no model'"):
        pplex.load("no model")
    for asked, said in (
        (lambda: model.respond(calls[0], seed=-1), "seed is -1"),
        (lambda: model.respond(calls[0], seed=1 << 63), f"seed is {1 << 63}"),
        (lambda: model.takes(calls[0], 0), "count is 0"),
        (lambda: list(model.batch(calls, batch_size=0)), "batch_size is 0"),
        (lambda: SamplingConfig(text_temp=float("nan")), "text_temp is nan"),
        (lambda: SamplingConfig(top_k=2.5), "top_k is 2.5"),
        (lambda: pplex.load(tiny, kv_bits=4), "kv_bits 4"),
    ):
        with pytest.raises(PplexError, match=f"{said}.* expected"):
            asked()
    model.respond(calls[0]).save(tmp_path / "reply.wav")
    kept = (tmp_path / "reply.wav").read_bytes()
    with pytest.raises(PplexError, match="exists already"):
        model.respond(calls[1]).save(tmp_path / "reply.wav")
    assert (tmp_path / "reply.wav").read_bytes() == kept
    model.respond(calls[1]).save(tmp_path / "reply.wav", overwrite=True)
    assert (tmp_path / "reply.wav").read_bytes() != kept
    with pytest.raises(PplexError, match="end its name in .wav, .flac"):
        model.respond(calls[0]).save(tmp_path / "reply.mp4")


def test_the_pages_examples_run(data, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "call.wav").symlink_to(data / "respond" / "user_c.wav")
    for page in PAGES:
        (tmp_path / "reply.wav").unlink(missing_ok=True)
        text = (ROOT / page).read_text(encoding="utf-8")
        blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        assert blocks, page
        example = "\n".join(blocks)
        assert '"mini"' in example
        exec(compile(example.replace('"mini"', repr(str(tiny))), page, "exec"), {})
        assert " 72000\n" in capsys.readouterr().out  # a second and the tail of two
        assert soundfile.info("reply.wav").frames == 72000
