"""Scores of made dialogues, of Full-Duplex-Bench's format, and of half-done batches."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tracemalloc
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from dialogues import DATA, track, write_dialogue

from pplex.cli.score_tables import score_table
from pplex.errors import PplexError
from pplex.evaluation.diarization import read_rttm
from pplex.evaluation.find import find
from pplex.evaluation.measure import Method
from pplex.evaluation.metrics import METRICS, figure_of, single
from pplex.evaluation.report import make_entries
from pplex.evaluation.score import as_csv
from pplex.evaluation.score import score as score_and_measure
from pplex.evaluation.sound_quality import SoundQuality, make_sound_quality
from pplex.evaluation.speech_activity import Segment

FRAME_S = 0.08
ENERGY = Method(vad="energy")

# A pause with a backchannel, a reply, a reply that is interrupted, an interruption.
USER = ((1.0, 2.5), (3.1, 4.5), (8.0, 10.0), (14.3, 16.0), (20.0, 23.0))
AGENT = ((3.8, 4.1), (4.9, 7.0), (10.4, 15.0), (16.25, 18.0), (21.0, 24.0))


def score(*args: Any) -> dict[str, Any]:
    """The scores alone."""
    return score_and_measure(*args)[0]


def transcript(path: Path, *words: tuple[str, float, float]) -> None:
    """A transcript as ``pplex respond`` writes it."""
    content = {
        "text": " ".join(word[0] for word in words),
        "duration_s": 10.0,
        "metadata": {},
        "words": [
            {"text": text, "start_s": start, "end_s": end, "frame": int(start * 12.5)}
            for text, start, end in words
        ],
    }
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("vad", ["energy", "silero"])
def test_known_times_come_out_within_a_frame(tmp_path, vad):
    write_dialogue(tmp_path / "call.wav", USER, AGENT, 25.0)
    result = score(find([tmp_path]), Method(vad=vad))
    (row,) = result["recordings"]
    turns = row["turns"]
    assert (turns["user_turns"], turns["judged_turns"], turns["takeovers"]) == (4, 4, 4)
    assert turns["reply_delays_s"] == pytest.approx([0.4, 0.4, 0.25], abs=FRAME_S)
    assert (turns["pauses"], turns["pauses_respected"]) == (1, 1)
    assert (turns["backchannels"], turns["agent_interruptions"]) == (1, 1)
    assert turns["user_interruptions"] == 1
    assert turns["yields_s"] == pytest.approx([0.7], abs=FRAME_S)
    assert turns["overlap_s"] == pytest.approx(0.3 + 0.7 + 2.0, abs=FRAME_S)
    assert turns["talk_over_s"] == pytest.approx(2.0, abs=FRAME_S)
    assert turns["silence_s"] == pytest.approx(25 - 18.35, abs=FRAME_S)
    found = {event["kind"]: event["start_s"] for event in turns["events"]}
    assert found["backchannel"] == pytest.approx(3.8, abs=FRAME_S)
    assert found["interruption"] == pytest.approx(21.0, abs=FRAME_S)
    assert found["user_interruption"] == pytest.approx(14.3, abs=FRAME_S)


def test_the_lag_of_a_frame_can_be_taken_off_and_is_recorded(tmp_path):
    write_dialogue(tmp_path / "call.wav", ((1, 3),), ((3.48, 6),), 8.0)
    result = score(find([tmp_path]), Method(vad="energy", agent_lag_s=0.08))
    turns = result["recordings"][0]["turns"]
    assert turns["reply_delays_s"] == pytest.approx([0.4], abs=0.02)
    assert result["method"]["agent_lag_s"] == 0.08


def test_totals_put_recordings_together(tmp_path):
    write_dialogue(tmp_path / "a.wav", ((1, 3),), ((3.4, 6),), 8.0)
    write_dialogue(tmp_path / "b.wav", ((1, 3),), (), 8.0)
    total = score(find([tmp_path]), ENERGY)["total"]
    assert (total["scored"], total["judged_turns"], total["takeovers"]) == (2, 2, 1)
    assert total["takeover_rate"] == 0.5
    assert total["reply_delay_s"]["n"] == 1
    assert total["yield_s"] is None and total["pauses_respected_rate"] is None


def test_the_models_own_words_decide_what_a_backchannel_is(tmp_path):
    write_dialogue(tmp_path / "call.wav", ((1, 3), (3.6, 5)), ((3.1, 3.5),), 8.0)
    transcript(
        tmp_path / "call.json",
        ("no", 3.1, 3.2),
        ("that", 3.2, 3.3),
        ("is", 3.3, 3.4),
        ("wrong", 3.4, 3.5),
    )
    (row,) = score(find([tmp_path]), ENERGY)["recordings"]
    assert row["words_from"] == "own" and row["turns"]["words"] == 4
    assert row["turns"]["backchannels"] == 0
    (row,) = score(find([tmp_path]), Method("energy", words="none"))["recordings"]
    assert row["words_from"] == "none" and row["turns"]["backchannels"] == 1


def bench_sample(
    root: Path, task: str, number: str, agent: tuple, chunks: list | None
) -> Path:
    """A sample's folder as the benchmark's runner and its ASR step leave it."""
    folder = root / task / number
    folder.mkdir(parents=True)
    for path in (DATA / task / "1").glob("*.json"):
        shutil.copy(path, folder)
    soundfile.write(folder / "input.wav", track("user", ((0.5, 1.5),), 8.0), 16_000)
    soundfile.write(folder / "output.wav", track("agent", agent, 8.0), 16_000)
    if chunks is not None:
        content = {
            "text": "",
            "chunks": [{"text": t, "timestamp": s} for t, s in chunks],
        }
        (folder / "output.json").write_text(json.dumps(content))
    return folder


def test_the_benchmarks_figures_are_those_worked_out_by_hand(tmp_path):
    yes = [["yes", [2.48, 3.0]], ["it", [3.0, 3.2]], ["is", [3.2, 4.0]]]
    bench_sample(tmp_path, "smooth_turn_taking", "1", ((2.5, 4),), yes)
    early = [["oh", [1.0, 1.2]], ["well", [2.0, 2.4]]]
    bench_sample(tmp_path, "smooth_turn_taking", "2", ((1, 2.4),), early)
    bench_sample(tmp_path, "smooth_turn_taking", "3", (), [])
    late = [["before", [2.0, 3.0]], ["sure", [4.4, 4.6]], ["thing", [4.6, 5.9]]]
    bench_sample(tmp_path, "user_interruption", "1", ((4.4, 5.9),), late)
    bench_sample(tmp_path, "pause_handling", "1", ((1.6, 2),), [["mhm", [1.6, 2.0]]])
    bench_sample(tmp_path, "pause_handling", "2", ((1.6, 3),), [["well", [1.6, 3.0]]])
    result = score(find([tmp_path]), ENERGY)
    bench = result["full_duplex_bench"]
    assert bench["smooth_turn_taking"] == {
        "samples": 3,
        "takeover_rate": pytest.approx(2 / 3, abs=1e-4),
        "latency_s": pytest.approx((0.48 + 0) / 2),
        "words_from": ["output.json"],
    }
    assert bench["user_interruption"]["takeover_rate"] == 1
    assert bench["user_interruption"]["latency_s"] == pytest.approx(0.4)
    assert bench["pause_handling"]["takeover_rate"] == 0.5
    assert any("d7336bd" in note for note in result["method"]["full_duplex_bench"])


def test_backchannels_are_compared_with_peoples_timing(tmp_path):
    folder = tmp_path / "icc_backchannel" / "7"
    folder.mkdir(parents=True)
    soundfile.write(folder / "input.wav", track("user", ((0.5, 9),), 10.0), 16_000)
    agent = ((2.0, 2.5), (6.0, 6.6))
    soundfile.write(folder / "output.wav", track("agent", agent, 10.0), 16_000)
    transcript(folder / "output.transcript.json", ("mhm", 2, 2.4), ("right", 6, 6.4))
    timing = folder.parent / "icc_gt_distribution.json"
    timing.write_text(json.dumps({"7": [1 / 51] * 51}))
    (row,) = score(find([tmp_path]), ENERGY)["recordings"]
    sample = row["bench"]
    assert (sample["takeover"], sample["takeover_any"]) == (0, 0)
    assert sample["frequency_hz"] == pytest.approx(0.2)
    assert 0 < sample["timing_distance"] < 1
    assert sample["words_from"] == "own"


def test_samples_answered_by_a_batch_are_known_by_their_inputs(tmp_path):
    chunks = [["yes", [2.48, 3.9]]]
    source = bench_sample(tmp_path, "smooth_turn_taking", "1", (), None)
    (source / "output.wav").unlink()
    out = tmp_path / "out" / "1"
    out.mkdir(parents=True)
    write_dialogue(out / "output.wav", ((0.5, 1.5),), ((2.5, 4),), 8.0)
    (out / "output.json").write_text(
        json.dumps({"chunks": [{"text": t, "timestamp": s} for t, s in chunks]})
    )
    line = manifest_line(
        "1/input.wav",
        "done",
        input={"path": str(source / "input.wav")},
        outputs={"audio": {"path": "1/output.wav"}},
    )
    (out.parent / "manifest.jsonl").write_text(line)
    (row,) = score(find([out.parent]), ENERGY)["recordings"]
    assert row["bench"]["latency_s"] == pytest.approx(0.48)
    assert row["turns"]["reply_delays_s"] == pytest.approx([1.0], abs=0.02)


def test_a_sample_may_have_a_stereo_answer(tmp_path):
    folder = bench_sample(tmp_path, "pause_handling", "1", (), None)
    write_dialogue(folder / "output.wav", ((0.5, 1.5),), (), 8.0)
    (row,) = score(find([tmp_path]), ENERGY)["recordings"]
    assert row["bench"]["takeover"] == 0
    (folder / "output.wav").unlink()
    (row,) = score(find([tmp_path]), ENERGY)["recordings"]
    assert row["status"] == "no answer" and not row["scored"]


def manifest_line(name: str, status: str, **more: object) -> str:
    line = {
        "recording": name,
        "status": status,
        "error": None,
        "input": {"path": f"/calls/{name}"},
        "outputs": {},
        "settings": "",
        "time": "2026-01-01T00:00:00+00:00",
    }
    return json.dumps(line | more) + "\n"


def batch(folder: Path) -> Path:
    """A batch that was cut off: done, done and lost, failed, a line cut in two."""
    write_dialogue(folder / "a.wav", ((1, 3),), ((3.4, 6),), 8.0)
    write_dialogue(folder / "late.wav", ((1, 3),), ((3.4, 6),), 8.0)
    audio = {"audio": {"path": "a.wav", "size": (folder / "a.wav").stat().st_size}}
    lost = {"audio": {"path": "lost.wav", "size": 9}}
    (folder / "manifest.jsonl").write_text(
        manifest_line("a.wav", "failed", error="no space", time="2025")
        + manifest_line("a.wav", "done", outputs=audio)
        + manifest_line("bad.wav", "failed", error="bad.wav is empty (0 bytes)")
        + manifest_line("lost.wav", "done", outputs=lost)
        + '{"recording": "late.w'
    )
    return folder


def test_a_half_finished_batch_is_scored_as_far_as_it_goes(tmp_path):
    result = score(find([batch(tmp_path)]), ENERGY)
    rows = {row["name"]: row for row in result["recordings"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "a.wav": "done",
        "bad.wav": "failed",
        "lost.wav": "missing",
    }
    assert rows["bad.wav"]["error"] == "bad.wav is empty (0 bytes)"
    assert "lost.wav is not there any more" in rows["lost.wav"]["error"]
    assert (result["total"]["scored"], result["total"]["not_scored"]) == (1, 2)
    notes = " ".join(result["notes"])
    assert "line 5 is cut off" in notes and "no line of the manifest: late.wav" in notes


def test_the_last_line_counts_whatever_its_time_says(tmp_path):
    with (batch(tmp_path) / "manifest.jsonl").open("a") as file:
        file.write("\n" + manifest_line("a.wav", "failed", error="late", time="2024"))
    items = {item.name: item for item in find([tmp_path]).items}
    assert (items["a.wav"].status, items["a.wav"].error) == ("failed", "late")


def test_an_output_that_was_changed_is_told(tmp_path):
    batch(tmp_path)
    write_dialogue(tmp_path / "a.wav", ((1, 3),), ((3.4, 6),), 9.0)
    items = {item.name: item for item in find([tmp_path]).items}
    assert "was changed after" in items["a.wav"].error


def test_separate_tracks_are_one_recording(tmp_path):
    soundfile.write(tmp_path / "x.user.wav", track("user", ((1, 3),), 8.0), 16_000)
    soundfile.write(tmp_path / "x.agent.wav", track("agent", ((3.4, 6),), 8.0), 16_000)
    (row,) = score(find([tmp_path]), ENERGY)["recordings"]
    assert row["name"] == "x.wav"
    assert row["turns"]["reply_delays_s"] == pytest.approx([0.4], abs=0.02)


def test_the_agent_alone_is_scored_with_the_recording_its_stats_name(tmp_path):
    calls = tmp_path / "calls"
    calls.mkdir()
    soundfile.write(calls / "call.wav", track("user", ((1, 3),), 8.0), 16_000)
    out = tmp_path / "out"
    out.mkdir()
    soundfile.write(out / "call.wav", track("agent", ((3.4, 6),), 8.0), 16_000)
    (row,) = score(find([out]), ENERGY)["recordings"]
    assert row["scored"] and row["turns"] is None
    stats = {
        "input": str(calls / "call.wav"),
        "outputs": {"audio": str(out / "call.wav")},
        "real_time_factor": 0.5,
        "channel": 1,
    }
    (out / "call.stats.json").write_text(json.dumps(stats))
    (row,) = score(find([out]), ENERGY)["recordings"]
    assert row["turns"]["reply_delays_s"] == pytest.approx([0.4], abs=0.02)


def test_the_command_prints_a_table_csv_and_json(tmp_path, run):
    batch(tmp_path)
    table = run("score", tmp_path, "--vad", "energy")
    assert table.exit_code == 0, table.output
    assert "Not scored: 2 of 3" in table.stdout and "Method: " in table.stdout
    notes, _, unscored = table.stdout.partition("Not scored: ")
    assert "no line of the manifest" in notes and "lost.wav" in unscored
    lines = list(
        csv.DictReader(
            io.StringIO(
                run("score", tmp_path, "--vad", "energy", "--format", "csv").stdout
            )
        )
    )
    assert [line["name"] for line in lines] == ["a.wav", "bad.wav", "lost.wav"]
    assert float(lines[0]["reply_delay_median_s"]) == pytest.approx(0.4, abs=0.02)
    result = json.loads(
        run("score", tmp_path, "--vad", "energy", "--format", "json").stdout
    )
    assert result["method"]["voice_detector"]["name"] == "energy"


def test_every_metric_is_in_json_csv_the_table_and_the_page(tmp_path, run):
    write_dialogue(tmp_path / "call.wav", USER, AGENT, 25.0)
    transcript(tmp_path / "call.json", ("yes", 5.0, 5.4))
    result = score(find([tmp_path]), ENERGY)
    (row,) = result["recordings"]
    heading, line = csv.reader(io.StringIO(as_csv(result)))
    cells = dict(zip(heading, line, strict=True))
    page = run("report", tmp_path)
    assert page.exit_code == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for metric in METRICS:
        # None of these is there.
        if metric.of in ("stats", "round_trip", "people", "mos", "verdict"):
            assert figure_of(metric, row) is None
            continue
        figure = single(figure_of(metric, row))
        assert figure is not None
        assert single(figure_of(metric, result["total"])) == figure
        assert not metric.title or float(cells[metric.column]) == figure
        assert not metric.about or escape(metric.about) in text
        assert not (metric.title and metric.table) or metric.title in score_table(
            result
        )


def test_what_makes_no_sense_is_refused(tmp_path, run):
    nothing = run("score", tmp_path)
    assert nothing.exit_code == 1 and "no recordings in" in nothing.stderr
    assert run("score", tmp_path / "none").exit_code == 1
    write_dialogue(tmp_path / "a.wav", ((1, 3),), ((3.4, 6),), 8.0)
    for options in (["--words", "asr"], ["--transcripts", tmp_path / "t"]):
        refused = run("score", tmp_path, *options)
        assert refused.exit_code == 2 and "needs --asr" in refused.stderr
    unknown = run("score", tmp_path, "--asr", "ears")
    assert unknown.exit_code == 1 and "no recogniser ears" in unknown.stderr


def test_an_overlap_sample_is_scored_with_its_clean_pair(tmp_path):
    folder = tmp_path / "user_interruption" / "1"
    folder.mkdir(parents=True)
    answers = {"": ((3.0, 6.5), (9.0, 12.0)), "clean_": ((3.4, 6.5),)}
    for name, times in answers.items():
        user = ((1.0, 2.5), (6.0, 8.0)) if not name else ((1.0, 2.5),)
        for side, spoken in (("input", user), ("output", times)):
            voice = "user" if side == "input" else "agent"
            path = folder / f"{name}{side}.wav"
            soundfile.write(path, track(voice, spoken, 13.0), 16_000)
    (folder / "metadata.json").write_text('{"timestamps": [6.0, 8.0]}')
    result = score(find([tmp_path / "user_interruption"]), ENERGY)
    (row,) = result["recordings"]
    near = {
        "stop_s": 0.5,
        "response_s": 0.75,
        "event_stop_s": 0.5,
        "event_response_s": 1.0,
        "clean_response_s": 0.9,
    }
    for key, value in near.items():
        assert row["bench"][key] == pytest.approx(value, abs=0.12), key
    total = result["full_duplex_bench"]["v1.5_user_interruption"]
    assert total["samples"] == 1
    assert total["clean_response_s"] == row["bench"]["clean_response_s"]
    assert any("v1.5" in note for note in result["method"]["full_duplex_bench"])
    assert "event stop s" in score_table(result)


def test_rewards_of_a_run_on_one_side_of_a_call(tmp_path):
    """The recording's other side is the person whom the agent stands in for."""
    user = ((1.0, 5.0), (10.0, 14.0))
    sides = [track("user", user, 20.0), track("agent", ((3.0, 3.5), (12, 12.4)), 20.0)]
    soundfile.write(tmp_path / "call.wav", np.stack(sides, axis=1), 16_000)
    folder = tmp_path / "answers"
    folder.mkdir()
    agent = ((3.6, 4.1), (5.5, 7.0), (14.3, 18.0))
    write_dialogue(folder / "reply.wav", user, agent, 20.0)
    stats = {
        "real_time_factor": 0.1,
        "input": str(tmp_path / "call.wav"),
        "channel": 1,
        "source_channels": 2,
        "outputs": {"audio": "reply.wav"},
    }
    (folder / "reply.json").write_text(json.dumps(stats))
    result = score(find([folder]), ENERGY)
    (row,) = result["recordings"]
    assert row["people"]["backchannel_f1"] == pytest.approx(2 / 3, abs=1e-4)
    assert row["turns"]["turn_reward_s"] == pytest.approx(-0.4, abs=FRAME_S)
    assert row["turns"]["pause_reward"] is None  # no pause
    assert result["total"]["people"]["backchannel_f1"] == pytest.approx(2 / 3, abs=1e-4)


def test_the_users_speech_may_come_from_a_diarization(tmp_path, run):
    """A mono call of two people on the user's track: the second one is no user."""
    both = ((1.0, 3.0), (3.2, 6.0), (9.0, 11.0))
    (tmp_path / "calls").mkdir()
    write_dialogue(tmp_path / "calls" / "call.wav", both, ((6.5, 8.0),), 12.0)
    rttm = tmp_path / "call.rttm"
    rttm.write_text(
        ";; made by hand\n"
        "SPEAKER call 1 1.00 2.00 <NA> <NA> A <NA> <NA>\n"
        "SPEAKER call 1 3.20 2.80 <NA> <NA> B <NA> <NA>\n"
        "SPEAKER call 1 9.00 2.00 <NA> <NA> A <NA> <NA>\n"
    )

    def delays(*options: object) -> list[float]:
        args = ("score", tmp_path / "calls", "--vad", "energy", "--format", "json")
        result = run(*args, *options)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["recordings"][0]["turns"]["reply_delays_s"]

    assert delays() == pytest.approx([0.5], abs=FRAME_S)
    assert delays("--rttm", rttm) == pytest.approx([0.5], abs=FRAME_S)
    assert delays("--rttm", rttm, "--speaker", "A") == pytest.approx([3.5], abs=FRAME_S)
    missing = run(
        "score", tmp_path / "calls", "--vad", "energy", "--rttm", rttm, "--speaker", "C"
    )
    assert "have A, B only" in missing.output
    page = run("report", tmp_path / "calls", "--rttm", tmp_path, "--speaker", "A")
    assert page.exit_code == 0
    alone = run("score", tmp_path / "calls", "--speaker", "A")
    assert alone.exit_code == 2 and "--rttm" in alone.output


@pytest.mark.parametrize(
    "line",
    [
        "SPEAKER call 1 x 2.00 <NA> <NA> A <NA> <NA>",
        "SPEAKER call 1 1.00 -2.00 <NA> <NA> A <NA> <NA>",
        "SPEAKER call 1 nan 2.00 <NA> <NA> A <NA> <NA>",
        "SPEAKER call 1 1.00 inf <NA> <NA> A <NA> <NA>",
        "SPEAKER call",
    ],
)
def test_a_broken_diarization_names_its_line(tmp_path, line):
    path = tmp_path / "call.rttm"
    path.write_text(f"\n{line}\n")
    with pytest.raises(PplexError, match=r"call.rttm, line 2: no speaker's turn"):
        read_rttm([path])
    with pytest.raises(PplexError, match="holds no .rttm file"):
        (tmp_path / "empty").mkdir()
        read_rttm([tmp_path / "empty"])


def test_only_speech_is_rated():
    rated = []

    def rate(pcm: np.ndarray, sr: int) -> dict[str, float]:
        rated.append((pcm, sr))
        return {"ovrl_mos": 3.0, "sig_mos": 3.5, "bak_mos": 4.0, "p808_mos": 3.2}

    quality = SoundQuality("0", rate)
    pcm = np.arange(4 * 16_000, dtype=np.float32) / 64_000
    speech = [Segment(0.5, 1.0), Segment(2.0, 3.0)]
    found = quality(pcm, speech)
    assert found == {"overall": 3.0, "signal": 3.5, "background": 4.0, "p808": 3.2}
    ((given, rate_hz),) = rated
    assert rate_hz == 16_000
    assert np.array_equal(given, np.concatenate([pcm[8000:16000], pcm[32000:48000]]))
    assert quality(pcm, [Segment(0.0, 0.9)]) is None  # too little to tell


def test_dnsmos_prefers_clean_speech_to_noisy():
    pytest.importorskip("speechmos")
    quality = make_sound_quality()
    clean = track("agent", ((0.0, 10.0),), 10.0)
    noisy = clean + np.random.default_rng(0).normal(0, 0.05, len(clean))
    speech = [Segment(0.0, 10.0)]
    good, bad = quality(clean, speech), quality(noisy.astype(np.float32), speech)
    assert good and bad and good["overall"] > bad["overall"] + 0.3
    assert all(0.5 < value < 5.0 for value in (*good.values(), *bad.values()))


@pytest.mark.parametrize("judge", [score, make_entries])
def test_recordings_take_little_more_memory_than_one_of_them(tmp_path, judge):
    pcm = track("agent", ((0.0, 160.0),), 160.0).clip(-1, 1)  # 24 kHz is said of it
    for name in "abc":
        soundfile.write(tmp_path / f"{name}.wav", pcm, 24_000)
    judge(find([tmp_path]), ENERGY)  # what is loaded once is no recording's
    tracemalloc.start()
    try:
        judge(find([tmp_path]), ENERGY)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * pcm.nbytes
