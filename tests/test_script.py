"""Words that the agent is made to say."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import soundfile
from piped import pipe
from small import SharedSteps, speech

from pplex.audio.files import Samples
from pplex.checkpoint.hub import resolve
from pplex.checkpoint.tokenizer import TextTokenizer
from pplex.checkpoint.weights import codec_tensors, lm_tensors
from pplex.conversation.prompts import make_role
from pplex.conversation.scheduler import converse_many
from pplex.conversation.script import (
    Line,
    Speaker,
    first_words,
    lay_out,
    read_script,
    scripted,
    too_late,
    unsaid,
)
from pplex.conversation.tracks import Conversation
from pplex.engine.mlx.engine import take_given
from pplex.errors import PplexError
from pplex.model.config import ModelConfig
from pplex.model.sampling import SamplingConfig
from pplex.model.streams import NOT_FORCED, instead
from pplex.respond.transcript import Word, write_transcript

EPAD, PAD = 0, 3
CONFIG = ModelConfig()
SAMPLES = Path(__file__).parents[1] / "samples"


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    """That of mini."""
    return TextTokenizer.load(resolve("mini", offline=True).folder.tokenizer)


def lines(folder: Path, content: str, name: str = "s.csv") -> tuple[Line, ...]:
    (folder / name).write_text(content, encoding="utf-8")
    return read_script(folder / name)


def test_a_script_is_csv_or_jsonl_in_any_order(tmp_path):
    expected = [(0.5, "Hello there."), (3.0, "Yes, of course")]
    found = [
        lines(tmp_path, 'at,say\n3,"Yes, of course"\n0.5,Hello  there.\n'),
        lines(tmp_path, "Say ; At\nHello there.;0,5\nYes, of course;3\n"),
        lines(
            tmp_path,
            '{"at": 3, "say": "Yes, of course"}\n\n{"at": 0.5, "say": "Hello there."}',
            "s.jsonl",
        ),
    ]
    for one in found:
        assert [(line.at_s, line.say) for line in one] == expected


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("x,Hello", "line 2: at is 'x', where 0 to 1000000 seconds are expected"),
        ('"1,000",Hello', "line 2: at is '1,000', where 0 to 1000000 seconds are"),
        ("nan,Hello", "line 2: at is 'nan'"),
        ("-1,Hello", "line 2: at is '-1'"),
        (",Hello", "line 2 has no at: at, in seconds, and say"),
        ("1,", "line 2 has no say"),
        ('1,"  "', "line 2 has no say"),
        ("1,2,3", "line 2 has not as many columns"),
        ("1,Привет", "line 2: 'Привет' has 'П', which the model's text has no"),
        ("1,One two three.\n1.5,Hello", "line 3 begins at 1.5 s, and .*s.csv line 2"),
        ("1,One\n1,Two", "line 3 begins at 1 s, and .*line 2 takes until"),
    ],
)
def test_what_cannot_be_said_is_named_by_its_line(row, said, tmp_path, tokenizer):
    with pytest.raises(PplexError, match=said):
        lay_out(lines(tmp_path, f"at,say\n{row}\n"), tokenizer, CONFIG)


def test_no_words_and_no_lines_are_refused(tmp_path):
    with pytest.raises(PplexError, match="--first-words: there are no words"):
        first_words(" ")
    with pytest.raises(PplexError, match="the script .*s.csv has no lines"):
        lines(tmp_path, "at,say\n")


def test_the_model_says_when_the_next_word_comes(tokenizer):
    """Frame by frame: what is given, then what a model may have chosen."""
    script = lay_out([Line(2.0, "I know.", "x")], tokenizer, CONFIG)
    i, know, dot = tokenizer.encode("I know.")
    steps = [
        (NOT_FORCED, 77),  # frame 23: 2.0 s is 25
        (EPAD, EPAD),
        (i, i),
        (instead(know), PAD),
        (instead(know), EPAD),
        (know, know),
        (dot, dot),
        (NOT_FORCED, 99),
    ]
    speaker = Speaker(script)
    for frame, (given, chosen) in enumerate(steps, 23):
        assert speaker.text(frame) == given
        assert speaker.said(frame, chosen) == (given != NOT_FORCED)
    said = [PAD] * 23 + [idx for _, idx in steps]
    assert scripted(script, said) == set(range(24, 30))
    assert unsaid(script, said) == ""
    assert unsaid(script, said[:29]) == "x: 'I know.' was not said to its end"
    # One that never goes on is told to, in less than a second.
    speaker = Speaker(script)
    found = []
    for frame in range(60):
        given = speaker.text(frame)
        found.append(given if given > NOT_FORCED else PAD)
        speaker.said(frame, found[-1])
    assert [idx for idx in found if idx > PAD] == [i, know, dot]
    assert found[found.index(know) - 1] == EPAD and found.index(know) < 25 + 12
    assert not speaker.left


def test_padding_is_the_models_own():
    chosen = mx.array([EPAD, PAD, 9, 9, 9])
    given = mx.array([instead(5), instead(5), instead(5), NOT_FORCED, 4])
    assert take_given(chosen, given).tolist() == [EPAD, PAD, 5, 9, 4]


def test_a_line_needs_room_and_the_first_words_a_frame_before_them(tokenizer):
    (cue,) = lay_out([first_words("Hello!")], tokenizer, CONFIG)
    # Frame 0 is the prompt's, frame 1 has the end of its padding.
    assert cue.first == 2
    assert too_late((cue,), cue.end, 12.5) == ""
    assert "'Hello!' takes until about" in too_late((cue,), cue.end - 1, 12.5)


def npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


def test_what_was_said_before_does_not_change_and_the_words_are_heard_of(run, tmp_path):
    call, common = SAMPLES / "teacher_two_turns.wav", ("--model", "mini", "-q")
    (tmp_path / "s.csv").write_text("at,say\n4.4,I am your teacher.\n")

    def respond(name: str, *more: object) -> dict[str, np.ndarray]:
        tokens = tmp_path / f"{name}.npz"
        out = tmp_path / f"{name}.wav"
        done = run("respond", call, "-o", out, "--tokens", tokens, *common, *more)
        assert (done.exit_code, done.stderr) == (0, "")
        return npz(tokens)

    plain = respond("plain")
    transcript = tmp_path / "t.json"
    options = ("--script", tmp_path / "s.csv", "--transcript", transcript)
    found = respond("found", *options)
    # 4.4 s is frame 55; the end of padding before it may change the sound of frame 53.
    for name in ("text", "agent", "user"):
        assert np.array_equal(plain[name][..., :53], found[name][..., :53])
    assert not np.array_equal(plain["agent"], found["agent"])
    tokenizer = TextTokenizer.load(resolve("mini", offline=True).folder.tokenizer)
    said = [idx for idx in found["text"][55:].tolist() if idx > PAD]
    wanted = tokenizer.encode("I am your teacher.")
    assert said[: len(wanted)] == wanted and found["text"][54] == EPAD
    content = json.loads(transcript.read_text())
    marked = [word for word in content["words"] if word.get("scripted")]
    assert [word["text"] for word in marked] == ["I", "am", "your", "teacher."]
    assert marked[0]["start_s"] == pytest.approx(4.4)
    assert content["metadata"]["script"] == [{"at": 4.4, "say": "I am your teacher."}]
    assert len(content["words"]) > 4

    # A stream, and a batch's row beside others, are answered alike.
    args = ("respond", "-", "-o", tmp_path / "live.wav", *common, *options[:2])
    code, _, err = pipe(call.read_bytes(), *args)
    assert (code, err) == (0, "")
    jobs = tmp_path / "jobs.csv"
    rows = [f"{call},a.wav,42424242,s.csv,", f"{call},b.wav,42424242,,Hello there."]
    jobs.write_text("\n".join(["input,output,seed,script,first_words", *rows]))
    done = run(
        "batch", "--jobs", jobs, "-o", tmp_path / "out", "--model", "mini", "--tokens"
    )
    assert done.exit_code == 0, done.stderr
    expected = (tmp_path / "found.wav").read_bytes()
    assert (tmp_path / "out" / "a.wav").read_bytes() == expected
    assert (tmp_path / "live.wav").read_bytes()[-1000:] == expected[-1000:]
    first = [idx for idx in npz(tmp_path / "out" / "b.npz")["text"] if idx > PAD]
    wanted = tokenizer.encode("Hello there.")
    assert first[: len(wanted)] == wanted


def test_a_line_past_the_end_is_refused_where_the_end_is_known(run, tmp_path):
    soundfile.write(tmp_path / "in.wav", np.zeros(48_000, np.float32), 24_000)
    (tmp_path / "s.csv").write_text("at,say\n1.5,I am your teacher.\n")
    common = ("--model", "mini", "--script", tmp_path / "s.csv")
    respond = ("respond", tmp_path / "in.wav", "-o", tmp_path / "o.wav", *common)
    done = run(*respond)
    assert done.exit_code == 1 and "s.csv line 2: 'I am your" in done.stderr
    assert "the answer ends at 2.0 s" in done.stderr
    assert not (tmp_path / "o.wav").exists()
    assert run(*respond, "--tail", 2).exit_code == 0
    for dry in (("--dry-run",), ()):
        done = run("batch", tmp_path / "in.wav", "-o", tmp_path / "out", *common, *dry)
        found = done.stdout + done.stderr
        assert done.exit_code == 1 and "the answer ends at 2.0 s" in found
    # Of a stream that is known when it is over.
    line = ("respond", "-", "-o", tmp_path / "l.wav", *common)
    code, _, err = pipe((tmp_path / "in.wav").read_bytes(), *line)
    assert code == 0 and "'I am your teacher.' was not said to its end" in err
    # A tail of its own accord waits for it.
    (tmp_path / "s.csv").write_text("at,say\n9,I am your teacher.\n")
    text = tmp_path / "t.txt"
    done = run(*respond, "--tail", "auto", "--overwrite", "--transcript", text)
    assert done.exit_code == 0 and text.read_text().startswith("I am your teacher.")


class InStep(SharedSteps):
    """Whose steps are waited for."""

    is_async = False


def test_steps_that_run_ahead_wait_for_the_words(small_model):
    folder, config = small_model.local.folder, small_model.config
    script = lay_out(
        [Line(0.6, "so it is", "a"), Line(3.0, "and so on", "b")],
        small_model.tokenizer,
        config,
    )
    wanted = small_model.tokenizer.encode("so it is and so on")
    answers = []
    for kind, batch_size in ((InStep, 1), (SharedSteps, 3)):
        tensors = lm_tensors(folder, config.lm), codec_tensors(folder, config.mimi)
        engine = kind(config, *tensors)
        start = engine.prefill(make_role(small_model, None, "Hello.").prompt)
        pcm = Samples(speech(60).reshape(-1))
        those = [
            Conversation(f"{idx}", pcm, start, idx, script=script if idx != 1 else ())
            for idx in range(4)
        ]
        found = converse_many(engine, those, SamplingConfig(), batch_size=batch_size)
        answers.append({one.key: answer.text for one, answer in found})
    for key, text in answers[0].items():
        assert np.array_equal(text, answers[1][key])
        marked = [int(text[i]) for i in sorted(scripted(script, text))]
        assert ([i for i in marked if i > PAD] == wanted) == (key != "1")


def test_a_transcript_marks_what_was_scripted(tmp_path):
    said = [
        Word("Well", 0.0, 0.2, 0),
        Word("yes.", 0.3, 0.5, 4, scripted=True),
        Word("No.", 0.6, 0.8, 8),
    ]
    for form, expected in (
        ("srt", "\n<i>yes.</i>\n"),
        ("vtt", "\n<i>yes.</i>\n"),
        ("tsv", "start\tend\tscripted\ttext\n0\t200\t0\tWell\n300\t500\t1\tyes.\n"),
        ("txt", "Well yes. No.\n"),
    ):
        path = tmp_path / f"t.{form}"
        write_transcript(path, said, 1.0, {})
        assert expected in path.read_text()
