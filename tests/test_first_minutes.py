"""What a new user meets in the first minutes: defaults, suggestions, plain answers."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pplex.audio.files import Part, read_pcm
from pplex.cli.batch_report import BatchProgress
from pplex.cli.progress import Progress
from pplex.conversation.roles import ROLES
from pplex.errors import did_you_mean


@pytest.fixture
def call(tmp_path, data) -> Path:
    return Path(shutil.copy(data / "respond" / "user_c.wav", tmp_path / "call.wav"))


def test_without_an_output_the_answer_lies_beside_the_recording(run, call, tiny):
    result = run("respond", call, "--model", tiny)
    assert result.exit_code == 0, result.stderr
    assert sorted(p.name for p in call.parent.iterdir()) == [
        "call.reply.wav",
        "call.wav",
    ]
    again = run("respond", call, "--model", tiny)
    assert again.exit_code == 1 and "call.reply.wav exists already" in again.stderr


@pytest.mark.parametrize("folder", [".", "..", "/", "calls"])
def test_a_folder_names_the_command_that_takes_it(run, tmp_path, monkeypatch, folder):
    (tmp_path / "calls").mkdir()
    monkeypatch.chdir(tmp_path)
    result = run("respond", folder, "--model", "mini")
    assert result.exit_code == 1
    assert f"{folder} is a folder" in result.stderr and "pplex batch" in result.stderr


def test_a_seed_may_be_drawn_and_is_said(run, call, tiny, tmp_path):
    seeds = []
    for name in ("a", "b"):
        stats = tmp_path / f"{name}.json"
        args = ("-o", tmp_path / f"{name}.wav", "--stats", stats, "--model", tiny)
        result = run("respond", call, *args, "--seed", "random")
        assert result.exit_code == 0, result.stderr
        seeds.append(json.loads(stats.read_text())["seed"])
        assert f"seed {seeds[-1]}" in result.stderr
    assert seeds[0] != seeds[1]  # alike once in two thousand million runs


def test_at_a_terminal_the_summary_ends_with_what_was_said(run, tmp_path, monkeypatch):
    samples = Path(__file__).parents[1] / "samples"
    args = ("-o", tmp_path / "o.wav", "--model", "mini", "--prompt")
    prompt = "You work for Green Bank and your name is Clara. The bank opens at nine "
    prompt += "and closes at five."
    line = ("respond", samples / "bank_hours.wav", *args, prompt)
    assert "five" not in run(*line).stderr
    monkeypatch.setattr("pplex.cli.progress.is_terminal", lambda: True)
    result = run(*line, "--overwrite")
    said = result.stderr.partition("the agent said:\n")[2].splitlines()
    assert len(said) == 2 and said[1].endswith("We close at five.")


def test_a_prompt_file_may_come_from_windows(run, call, tiny, tmp_path):
    path, stats = tmp_path / "role.txt", tmp_path / "s.json"
    path.write_bytes(b"\xef\xbb\xbfYou are kind.\r\nAnd brief.")
    args = ("-o", tmp_path / "o.wav", "--model", tiny, "--stats", stats)
    assert run("respond", call, *args, "--prompt-file", path).exit_code == 0
    assert json.loads(stats.read_text())["prompt"] == "You are kind.\nAnd brief."


def test_roles_are_listed_and_shown(run):
    names = run("roles", "list").stdout.splitlines()
    assert names == ["teacher (default)", "casual", "service"]
    assert run("roles", "show", "service").stdout == ROLES["service"] + "\n"
    wrong = run("roles", "show", "techer")
    assert wrong.exit_code == 1
    assert wrong.stderr.endswith("Did you mean teacher?\n")


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        (("--model", "min"), "mini"),
        (("--model", "8 bit"), "8bit"),
        (("--model", "mini", "--voice", "natf0"), "NATF0"),
        (("--model", "mini", "--check", "not_silent"), "not-silent"),
    ],
)
def test_a_name_that_is_nearly_right_is_suggested(run, call, options, meant):
    result = run("respond", call, *options)
    assert f"Did you mean {meant}?" in result.stderr
    assert not (call.parent / "call.reply.wav").exists()


def test_nothing_is_suggested_for_what_is_like_nothing():
    assert did_you_mean("xylophone", ["mini", "8bit"]) == ""


@pytest.mark.parametrize(
    "text",
    [
        "input;voice\ncall.wav; NATF0 \n",
        "Input, Voice \ncall.wav,NATF0\n",
        "\ufeff INPUT ,VOICE\r\ncall.wav,NATF0\r\n",
        "\n\ninput\tvoice\t\t\ncall.wav\tNATF0\t\t\n",
    ],
)
def test_a_spreadsheets_jobs_file_is_understood(run, call, tmp_path, text):
    jobs = tmp_path / "jobs.csv"
    jobs.write_text(text, encoding="utf-8", newline="")
    result = run("batch", "--jobs", jobs, "-o", tmp_path / "out", "-m", "mini")
    assert result.exit_code == 0, result.stderr
    (line,) = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    assert json.loads(line)["voice"] == "NATF0"


def test_columns_that_are_not_known_are_named(run, call, tmp_path):
    jobs = tmp_path / "jobs.csv"
    jobs.write_text("inputs,voice\ncall.wav,NATF0\n")
    result = run("batch", "--jobs", jobs, "-o", tmp_path / "out", "-m", "mini")
    assert result.exit_code == 1
    assert "'inputs', 'voice'. Did you mean input?" in result.stderr


def test_a_bad_voice_of_a_jobs_file_names_its_line(run, call, tmp_path):
    jobs = tmp_path / "jobs.csv"
    jobs.write_text("input,voice\ncall.wav,NATF0\ncall.wav,NATF\n")
    result = run("batch", "--jobs", jobs, "-o", tmp_path / "out", "-m", "mini")
    assert result.exit_code == 1
    assert f"{jobs} line 3: voice 'NATF'" in result.stderr


def test_the_list_of_commands_cuts_no_sentence(run):
    assert "..." not in run("--help").stdout.partition("Commands:")[2]


def test_the_options_of_respond_come_in_sections(run):
    page = run("respond", "--help").stdout
    places = [page.index(f"\n{title}:\n") for title in ("Output", "Model", "Sampling")]
    assert places == sorted(places)
    assert "\nOptions:\n" not in page


def test_a_batch_may_end_with_one_object(run, call, tmp_path, tiny):
    (tmp_path / "bad.wav").write_bytes(b"")
    args = ("batch", tmp_path, "-o", tmp_path / "out", "--model", tiny, "--json")
    result = run(*args)
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert (found["done"], found["failed"], found["skipped"]) == (1, 1, 0)
    assert "empty" in found["failures"]["bad.wav"]
    assert found["audio_s"] > 0 and found["total_s"] >= found["load_s"] > 0
    again = json.loads(run(*args).stdout)
    assert (again["done"], again["skipped"], again["failed"]) == (0, 1, 1)
    both = run(*args, "--dry-run")
    assert both.exit_code == 2 and "--dry-run" in both.stderr


def test_without_a_terminal_a_batch_says_a_line_a_minute(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr("pplex.cli.batch_report.time.perf_counter", lambda: now)
    with closing(BatchProgress(0)) as progress:
        progress.starting(500, 5000.0)
        for second in range(1, 151):
            now = 100.0 + second
            progress.finished(f"{second}.wav", 10.0)
        lines = capsys.readouterr().err.splitlines()
        assert lines == ["60/500 recordings, 10.0 s/s", "120/500 recordings, 10.0 s/s"]
        progress.stopped()
    assert "150 of 500 recordings" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        ("bench", "--random", "tiny", "--frames", 3, "--json"),
        ("bench", "--random", "tiny", "--frames", 3, "--plot"),
        ("models", "compare", "mini", "mini", "--plot"),
        ("models", "sensitivity", "mini", "-o"),
    ],
)
def test_measurements_replace_no_file_unasked(run, tmp_path, line):
    path = tmp_path / "kept.svg"
    path.write_text("mine")
    result = run(*line, path)
    assert result.exit_code == 1, result.output
    assert f"{path} exists already" in result.stderr
    assert path.read_text() == "mine"


@pytest.mark.parametrize("rate", [24_000, 16_000])
def test_a_part_is_answered_as_if_it_were_a_file(run, tmp_path, tiny, data, rate):
    whole = read_pcm(data / "respond" / "user_a.wav", sample_rate=24_000).pcm
    soundfile.write(tmp_path / "whole.wav", whole, rate)
    args = ("--model", tiny, "--layout", "separate", "--tail", "0.2")
    part = (*args, "--start", "0.5", "--duration", "1.01")
    stats = tmp_path / "s.json"
    made = run("respond", tmp_path / "whole.wav", *part, "--stats", stats)
    assert made.exit_code == 0, made.stderr
    full = read_pcm(tmp_path / "whole.wav", sample_rate=24_000).pcm
    expected = np.concatenate([full[12_000:36_240], np.zeros(4800, np.float32)])
    heard = read_pcm(tmp_path / "whole.reply.user.wav", sample_rate=24_000).pcm
    assert np.abs(heard - expected).max() <= 2 / 32768
    found = json.loads(stats.read_text())
    assert found["start_s"] == 0.5 and found["audio_s"] == pytest.approx(1.21)
    rest = run(
        "respond",
        tmp_path / "whole.wav",
        *args,
        "--start",
        "2",
        "-o",
        tmp_path / "o.wav",
    )
    seconds = len(full) / 24_000 - 2 + 0.2
    assert f"{seconds:.1f} s" in rest.stderr


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--start", "99"), 1, "call.wav is 3.20 s long"),
        (("--start", "-1"), 2, "--start"),
        (("--duration", "0"), 2, "--duration"),
        (("--start", "1", "--check", "length-of"), 2, "length-of"),
    ],
)
def test_a_part_that_is_none_is_refused(run, tmp_path, tiny, data, options, code, said):
    call = Path(shutil.copy(data / "respond" / "user_a.wav", tmp_path / "call.wav"))
    result = run("respond", call, "--model", tiny, *options)
    assert result.exit_code == code and said in result.stderr
    assert list(tmp_path.iterdir()) == [call]


def test_a_long_recordings_part_is_read_as_it_is_needed(tmp_path):
    pcm = np.linspace(-0.5, 0.5, 100_000, dtype=np.float32)
    soundfile.write(tmp_path / "a.wav", pcm, 24_000)
    kept = read_pcm(tmp_path / "a.wav", sample_rate=24_000).pcm
    part = Part(1.0, 2.0)
    found = read_pcm(
        tmp_path / "a.wav", sample_rate=24_000, part=part, tail=7, most_kept=10
    )
    assert found.num_samples == 48_007
    read = np.concatenate(list(found.blocks()))
    assert np.array_equal(read[:48_000], kept[24_000:72_000])


@pytest.mark.parametrize("suffix", [".flac", ".mp3", ".ogg", ".opus"])
@pytest.mark.parametrize("layout", ["stereo", "agent"])
def test_an_answer_may_be_written_in_another_format(run, call, tiny, suffix, layout):
    args = ("--model", tiny, "--layout", layout, "--tail", 20)
    wav, other = call.with_name("r.wav"), call.with_name(f"r{suffix}")
    for path in (wav, other):
        assert run("respond", call, "-o", path, *args).exit_code == 0
    expected, rate = soundfile.read(wav, dtype="float64", always_2d=True)
    found, other_rate = soundfile.read(other, dtype="float64", always_2d=True)
    assert (other_rate, found.shape[1]) == (rate, expected.shape[1])
    assert len(found) == pytest.approx(len(expected), abs=rate * 0.1)
    if suffix == ".flac":
        assert np.array_equal(found, expected)
        return
    length = min(len(expected), len(found))
    loudness = [np.sqrt((one[:length] ** 2).mean(axis=0)) for one in (expected, found)]
    # The tiny model says noise, of which codecs keep the lower part.
    assert loudness[1] == pytest.approx(loudness[0], rel=0.5)


def test_formats_that_cannot_be_are_refused(run, call, tiny):
    for name, options in (("r.aac", ()), ("r.flac", ("--layout", "separate"))):
        output = call.with_name(name)
        result = run("respond", call, "-o", output, "--model", tiny, *options)
        assert result.exit_code == 1 and ".wav" in result.stderr
    assert list(call.parent.iterdir()) == [call]


@pytest.mark.parametrize(
    ("columns", "values", "said"),
    [
        ("input,voise", "call.wav,NATM0", "no column 'voise'. Did you mean voice?"),
        ("input,temp", "call.wav,0.5", "temp is no column but an option"),
        ("input,Input", "call.wav,call.wav", "two columns input"),
    ],
)
def test_a_column_that_would_do_nothing_is_refused(
    run, call, tmp_path, columns, values, said
):
    jobs = tmp_path / "jobs.csv"
    jobs.write_text(f"{columns}\n{values}\n")
    result = run("batch", "--jobs", jobs, "-o", tmp_path / "out", "-m", "mini")
    assert result.exit_code == 1 and said in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--temp", "hot"), "'hot' is not a number from 0 to 100\n"),
        (("--start", "inf"), "'inf' is not a number from 0 on\n"),
        (("--duration", "0"), "'0' is not a number above 0\n"),
        (("--top-k", "1.5"), "'1.5' is not a whole number from 0 on\n"),
        (("--duration", "1e-9"), "choose another --start or --duration"),
        (("-o", "https://a.b/c.wav"), "c.wav is on the network: download it first"),
        (("-o", "."), "cannot write .: it is a folder; give a file name"),
        (("--seed", "-1"), "neither a whole number from 0 to 2**63 - 1 nor 'random'"),
        (("--tail", "soon"), "neither seconds from 0 to 3600 nor 'auto'"),
        (("--channel", 5000 * "9"), "neither a channel number from 1 nor 'mix'"),
        (("--role", "techer"), "'casual', 'service'. Did you mean teacher?"),
    ],
)
def test_a_wrong_value_is_said_in_words(run, call, arguments, said):
    result = run("respond", call, "-m", "mini", *arguments)
    assert result.exit_code in (1, 2) and said in result.stderr


def test_what_is_no_diarization_no_prompt_and_no_list_of_hashes(run, call, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("hello\n")
    for arguments, said in (
        (("score", call, "--rttm", text, "--vad", "energy"), "t.txt, line 1: no RTTM"),
        (("models", "verify", "mini", "--sums", text), "Error: --sums "),
        (("report", call, "--png", text), "t.txt is a file; give the name of a folder"),
        (("voices", "show", "natf0", "-m", "mini"), "Did you mean NATF0?"),
        (
            ("models", "calibrate", "mini", call, "-o", tmp_path / "c", "--seed", "-1"),
            "'-1' is neither a whole number from 0",
        ),
    ):
        result = run(*arguments)
        assert result.exit_code in (1, 2) and said in result.stderr, arguments
    for command in ("score", "report"):
        result = run(command, text, "--vad", "energy")
        assert result.exit_code == 1 and "is not an audio file" in result.stderr
    assert not list(Path().glob("report.html"))
    text.write_bytes(b"\0\1")
    result = run("respond", call, "-m", "mini", "--prompt-file", text)
    assert result.exit_code == 1 and "not text" in result.stderr


def test_a_terminal_sees_at_once_that_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("pplex.cli.progress.is_terminal", lambda: True)
    with closing(Progress(0, channel_chosen=True)) as progress:
        progress.waiting("8bit")
        assert capsys.readouterr().err == "loading 8bit ..."
        progress.warn("a warning")
    # Nothing is erased here, where click sees no terminal and leaves out the code.
    assert capsys.readouterr().err == "\ra warning\n"
    with closing(Progress(-1, channel_chosen=True)) as progress:
        progress.waiting("8bit")
    monkeypatch.setattr("pplex.cli.progress.is_terminal", lambda: False)
    with closing(Progress(0, channel_chosen=True)) as progress:
        progress.waiting("8bit")
    assert capsys.readouterr().err == ""
