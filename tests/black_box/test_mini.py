"""The built-in model answers the recordings of samples/ as its recipe taught it."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from pplex.cli.main import cli

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples"

# What samples/mini/domain.toml has each role answer.
RIGHT = {
    "teacher_sky": ["Because air scatters blue light the most."],
    "teacher_two_turns": [
        "Hello! What would you like to learn?",
        "Jupiter is the largest planet.",
    ],
    "bank_card": ["I have blocked your card right now."],
    "bank_hours": ["My name is Clara.", "We close at five."],
    "restaurant_booking": ["Your table for two is booked.", "Today we have pasta."],
    "chat_weekend": [
        "I went to the lake with friends.",
        "I have a cat, she is very lazy.",
    ],
    "unknown": ["Sorry, I do not know that."],
    "noisy": ["The moon is a three day flight away."],
    "long_turn": ["Take a nap, you have earned it."],
}
BACKCHANNELS = {"I see.", "Oh really.", "Right.", "Good."}


def answer(folder: Path, jobs: list[dict[str, str]], model: str = "mini") -> None:
    """Answer recordings greedily, WAV and transcript of each into ``folder``."""
    table = folder / "jobs.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["input", "output", "voice", "prompt"])
        writer.writeheader()
        writer.writerows(jobs)
    command = ["batch", "--jobs", table, "-o", folder, "--model", model, "--offline"]
    options = ["--greedy", "--transcript", "json", "--quiet"]
    result = CliRunner().invoke(cli, [str(word) for word in command] + options)
    assert result.exit_code == 0, result.stderr


def samples() -> list[dict[str, str]]:
    """The rows of samples/jobs.csv, with whole paths."""
    with (SAMPLES / "jobs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {**row, "input": str(SAMPLES / row["input"]), "output": row["input"]}
        for row in rows
    ]


def transcript(folder: Path, name: str) -> dict:
    """What the agent said and when."""
    path = folder / f"{name}.transcript.json"
    return json.loads(path.read_text(encoding="utf-8"))


def said(folder: Path, name: str) -> str:
    """What the agent said."""
    return transcript(folder, name)["text"]


def sides(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """The user's and the agent's samples and their rate."""
    pcm, rate = soundfile.read(folder / f"{name}.wav", dtype="float32")
    return pcm[:, 0], pcm[:, 1], rate


def spoken(pcm: np.ndarray, rate: int) -> list[tuple[float, float]]:
    """Start and end in seconds of speech: louder than -40 dBFS, pauses under 0.6 s."""
    size = rate // 50
    blocks = np.square(pcm[: len(pcm) // size * size]).reshape(-1, size).mean(1)
    found: list[tuple[float, float]] = []
    for block in np.flatnonzero(blocks > 1e-4):
        start, end = block / 50, (block + 1) / 50
        if found and start - found[-1][1] < 0.6:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def pitch(pcm: np.ndarray, rate: int) -> float:
    """Median pitch of the voiced frames in Hz, by autocorrelation."""
    size, found = rate * 2 // 25, []
    for start in range(0, len(pcm) - size, size // 2):
        x = pcm[start : start + size]
        if np.square(x).mean() < 1e-3:
            continue
        same = np.fft.irfft(np.abs(np.fft.rfft(x - x.mean(), 2 * size)) ** 2)
        first, last = rate // 300, rate // 65
        best = first + int(same[first:last].argmax())
        if same[best] > 0.4 * same[0]:
            found.append(rate / best)
    return float(np.median(found))


@pytest.fixture(scope="module")
def replies(tmp_path_factory) -> Path:
    """A folder with mini's greedy answers to the samples."""
    folder = tmp_path_factory.mktemp("replies")
    answer(folder, samples())
    return folder


def test_mini_fits_into_20_megabytes():
    files = (p for p in (ROOT / "pplex" / "mini").rglob("*") if p.is_file())
    assert sum(p.stat().st_size for p in files) <= 20e6


def test_mini_answers_the_samples_but_for_one_at_most(replies):
    wrong = [
        (name, wanted, said(replies, name))
        for name, answers in RIGHT.items()
        for wanted in answers
        if wanted not in said(replies, name)
    ]
    assert len(wrong) <= 1, wrong


def test_mini_says_nothing_to_silence(replies):
    _, agent, rate = sides(replies, "silence")
    assert said(replies, "silence") == ""
    assert spoken(agent, rate) == []


def test_mini_only_makes_backchannels_while_a_story_is_told(replies):
    *before, last = re.findall(r"[^.]+[.]", said(replies, "long_turn"))
    assert last.strip() == RIGHT["long_turn"][0]
    assert before and {sentence.strip() for sentence in before} <= BACKCHANNELS


def test_mini_stops_within_0_8_seconds_when_interrupted(replies):
    user, agent, rate = sides(replies, "interruption")
    (_, asked), (interrupted, _) = spoken(user, rate)
    starts = [start for start, _ in spoken(agent, rate)]
    assert asked < starts[0] < interrupted
    late = agent[int((interrupted + 0.8) * rate) : int((interrupted + 1.0) * rate)]
    assert np.abs(late).max() < 0.02
    assert said(replies, "interruption").endswith("Okay.")


@pytest.mark.parametrize("name", ["teacher_sky", "bank_card", "noisy", "unknown"])
def test_mini_waits_for_the_end_of_a_question_and_not_for_long(replies, name):
    words = transcript(replies, name)["words"]
    user, _, rate = sides(replies, name)
    loud = np.flatnonzero(np.abs(user) > 0.1)
    assert 0.2 < words[0]["start_s"] - loud[-1] / rate < 1.0


def test_mini_answers_one_question_as_its_role_does(tmp_path):
    prompts = {
        "teacher": "You are a teacher.",
        "bank": "You work at the service desk of a bank.",
        "restaurant": "You work for a restaurant.",
        "chat": "You enjoy having a good conversation.",
    }
    user = str(SAMPLES / "teacher_two_turns.wav")
    jobs = [
        {"input": user, "output": f"{role}.wav", "voice": "NATM0", "prompt": prompt}
        for role, prompt in prompts.items()
    ]
    answer(tmp_path, jobs)
    planet, unknown = "Jupiter is the largest planet.", "Sorry, I do not know that."
    assert {role: said(tmp_path, role) for role in prompts} == {
        "teacher": f"Hello! What would you like to learn? {planet}",
        "bank": f"Welcome to the bank. How can I help? {unknown}",
        "restaurant": f"Welcome! Would you like a table? {unknown}",
        "chat": f"Hey, nice to hear from you! {unknown}",
    }


def test_mini_reads_facts_from_its_prompt(tmp_path):
    prompt = (
        "You are {}, a waiter in a restaurant. Information: Open from eight to six. "
        "The special is {}."
    )
    dishes = ["salmon", "noodles", "turkey", "pizza"]
    user = str(SAMPLES / "restaurant_booking.wav")
    jobs = [
        {
            "input": user,
            "output": f"{dish}.wav",
            "voice": "NATF0",
            "prompt": prompt.format(name, dish),
        }
        for name, dish in zip(["Emma", "Paul", "Rosa", "Jack"], dishes, strict=True)
    ]
    answer(tmp_path, jobs)
    for dish in dishes:
        assert said(tmp_path, dish).endswith(f"Today we have {dish}.")


def test_the_voice_prompt_decides_which_voice_speaks(tmp_path):
    row = next(row for row in samples() if row["output"] == "teacher_sky.wav")
    voices = ["NATF0", "NATM0"]
    answer(tmp_path, [row | {"voice": v, "output": f"{v}.wav"} for v in voices])
    woman, man = (pitch(*sides(tmp_path, voice)[1:]) for voice in voices)
    assert 150 < woman < 200  # flite's slt speaks at 165 Hz, rms at 95
    assert 80 < man < 120


def test_mini_in_4_bits_still_answers(tmp_path):
    command = ["models", "convert", "mini", str(tmp_path / "mini4"), "--bits", "4"]
    assert CliRunner().invoke(cli, [*command, "--group-size", "32"]).exit_code == 0
    answer(tmp_path, samples(), model=str(tmp_path / "mini4"))
    pairs = [(name, wanted) for name, answers in RIGHT.items() for wanted in answers]
    right = sum(wanted in said(tmp_path, name) for name, wanted in pairs)
    assert right >= len(pairs) - 2
