"""The page: what is in it, that it stands alone, and that it tells what went wrong."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from dialogues import write_dialogue
from test_score import batch, manifest_line, transcript

from pplex.errors import PplexError
from pplex.evaluation.find import Item, find
from pplex.evaluation.measure import Method
from pplex.evaluation.pictures import write_picture
from pplex.evaluation.report import (
    COLUMNS,
    Entry,
    check_embedded,
    heading,
    make_entries,
    peaks,
    picture_names,
    write_report,
)


class Page(HTMLParser):
    """The parts of a page that the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.feed(text)
        match = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', text)
        self.data = json.loads(match[1])

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag in ("link", "img", "iframe"):
            raise AssertionError(f"<{tag}> in a page that stands alone")

    def handle_data(self, text):
        if self.rows and text.strip():
            self.rows[-1].append(text.strip())


def page_of(folder: Path, **options) -> Page:
    found = find([folder])
    entries = make_entries(found, Method(vad="energy"))
    path = options.get("path", folder / "report.html")
    write_report(path, entries, found.notes, "energy", "<calls> & more")
    return Page(path.read_text(encoding="utf-8"))


def test_a_recording_has_its_row_and_its_picture(tmp_path):
    write_dialogue(tmp_path / "call.wav", ((1, 3),), ((3.4, 6),), 8.0)
    transcript(tmp_path / "call.json", ("Good", 3.4, 4.0), ("morning.", 4.0, 5.0))
    page = page_of(tmp_path)
    head, row = page.rows
    assert head[:6] == [
        "Recording",
        "State",
        "First words",
        "Who spoke when",
        "all 0 to 8 s",
        "Length, s",
    ]
    assert row[:6] == ["call.wav", "done", "Good morning.", "8.0", "0.40", "1 of 1"]
    (data,) = page.data
    assert data["a"] == "call.wav"
    assert data["w"] == [["Good", 3.4, 4.0], ["morning.", 4.0, 5.0]]
    assert data["ev"] == [["reply", 3.4, 6.0, "Good morning.", 0.4]]
    assert len(base64.b64decode(data["u"])) == len(base64.b64decode(data["g"])) == 300
    assert "lat" not in data


def test_nothing_comes_from_elsewhere(tmp_path):
    write_dialogue(tmp_path / "call.wav", ((1, 3),), ((3.4, 6),), 8.0)
    page = page_of(tmp_path)
    assert page.links == []
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    urls = set(re.findall(r"https?://[^\"' ]+", text))
    assert urls <= {"http://www.w3.org/2000/svg"}
    assert "<!--" not in text.replace("<!DOCTYPE", "")


def test_names_and_words_cannot_break_the_page(tmp_path):
    name = "a</script><b>&'.wav".replace("/", "\u2215")
    write_dialogue(tmp_path / name, ((1, 3),), ((3.4, 6),), 8.0)
    said = "</script><script>alert(1)</script>"
    transcript((tmp_path / name).with_suffix(".json"), (said, 3.4, 4.0))
    page = page_of(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text and "<b>" not in text
    assert page.data[0]["n"] == name and page.data[0]["w"][0][0] == said
    assert "<title>&lt;calls&gt; &amp; more</title>" in text


def test_the_sound_is_linked_from_where_the_page_lies(tmp_path):
    folder = tmp_path / "out put"
    folder.mkdir()
    write_dialogue(folder / "a#1.wav", ((1, 3),), ((3.4, 6),), 8.0)
    page = page_of(folder, path=tmp_path / "report.html")
    assert page.data[0]["a"] == "out%20put/a%231.wav"


def test_a_half_finished_batch_says_so(tmp_path):
    page = page_of(batch(tmp_path))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "2 of 3 recordings are not done:" in text
    assert "1 failed, 1 missing" in text
    assert "line 5 is cut off; the batch was stopped or is still running" in text
    failed, missing, done = page.rows[1:]
    assert failed[:3] == ["bad.wav", "failed", "bad.wav is empty (0 bytes)"]
    assert missing[:2] == ["lost.wav", "missing"] and done[:2] == ["a.wav", "done"]
    assert page.data[0]["e"] == "bad.wav is empty (0 bytes)"


def test_a_batch_that_has_only_begun_makes_a_page(tmp_path):
    (tmp_path / "manifest.jsonl").write_text("")
    page = page_of(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.data == [] and "no recording is finished yet" in text


def test_a_file_that_cannot_be_read_is_a_row(tmp_path):
    write_dialogue(tmp_path / "a.wav", ((1, 3),), ((3.4, 6),), 8.0)
    (tmp_path / "b.wav").write_text("not sound")
    page = page_of(tmp_path)
    assert page.rows[1][:2] == ["b.wav", "unreadable"]
    assert "not an audio file" in page.data[0]["e"]


def test_a_link_that_goes_in_a_circle_is_a_row(tmp_path):
    write_dialogue(tmp_path / "a.wav", ((1, 3),), ((3.4, 6),), 8.0)
    (tmp_path / "b.wav").symlink_to("b.wav")
    (tmp_path / "b.json").symlink_to("b.json")
    page = page_of(tmp_path)
    assert [row[:2] for row in page.rows[1:]] == [
        ["b.wav", "unreadable"],
        ["a.wav", "done"],
    ]
    assert "Too many levels of symbolic links" in page.data[0]["e"]


@pytest.mark.parametrize("name", ["loop/input.wav", "nothing\0there"])
def test_a_batch_whose_recording_cannot_be_found_makes_a_page(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    write_dialogue(tmp_path / "a.wav", ((1, 3),), ((3.4, 6),), 8.0)
    outputs = {"audio": {"path": "a.wav"}}
    (tmp_path / "manifest.jsonl").write_text(
        manifest_line("a.wav", "done", outputs=outputs, input={"path": name})
    )
    assert page_of(tmp_path).rows[1][:2] == ["a.wav", "done"]


def test_the_latency_of_steps_is_there_where_stats_have_it(tmp_path):
    path = tmp_path / "a.wav"
    write_dialogue(path, ((1, 3),), ((3.4, 6),), 8.0)
    stats = {
        "input": "x",
        "outputs": {"audio": str(path)},
        "real_time_factor": 1.5,
        "audio_s": 8.0,
        "step_ms_series": [10.0, 95.5, 12.0],
    }
    (tmp_path / "a.stats.json").write_text(json.dumps(stats))
    page = page_of(tmp_path)
    assert page.data[0]["lat"] == [10.0, 95.5, 12.0]
    assert "1.50" in page.rows[1]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1.5 times slower than real time" in text


def test_answers_of_two_folders_stand_together_and_are_told_apart(tmp_path, run):
    for folder, start_s in (("old", 3.4), ("new", 4.1)):
        (tmp_path / folder).mkdir()
        for name in ("b.wav", "a.wav"):
            write_dialogue(tmp_path / folder / name, ((1, 3),), ((start_s, 6),), 8.0)
    write_dialogue(tmp_path / "new" / "c.wav", ((1, 3),), (), 8.0)
    old, new = tmp_path / "old", tmp_path / "new"
    options = ("-o", tmp_path / "two.html", "--svg", tmp_path / "svg")
    done = run("report", old, new, *options)
    assert done.exit_code == 0, done.output
    page = Page((tmp_path / "two.html").read_text(encoding="utf-8"))
    assert [(row[0], row[1], row[5]) for row in page.rows[1:5]] == [
        ("a.wav", "old", "0.40"),
        ("a.wav", "new", "1.10"),
        ("b.wav", "old", "0.40"),
        ("b.wav", "new", "1.10"),
    ]
    groups = [one.get("k") for one in page.data]
    assert groups[0] == groups[1] != groups[2] == groups[3] and groups[4] is None
    drawn = sorted(path.name for path in (tmp_path / "svg").iterdir())
    assert drawn == ["new-a.svg", "new-b.svg", "new-c.svg", "old-a.svg", "old-b.svg"]
    assert "old/a.wav, 8.0 s" in (tmp_path / "svg" / "old-a.svg").read_text()


def test_folders_of_one_name_are_told_apart(tmp_path):
    for folder in ("x/replies", "y/replies"):
        (tmp_path / folder).mkdir(parents=True)
        write_dialogue(tmp_path / folder / "a.wav", ((1, 3),), ((3.4, 6),), 8.0)
    found = find([tmp_path / "x/replies", tmp_path / "y/replies"])
    names = [Path(name).parts[-3:] for name in picture_names(found.items)]
    assert names == [("x", "replies", "a.wav"), ("y", "replies", "a.wav")]


def test_answers_made_of_one_recording_stand_together(tmp_path):
    write_dialogue(tmp_path / "call.wav", ((1, 3),), (), 8.0)
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("first", "other", "third"):
        write_dialogue(folder / f"{name}.wav", ((1, 3),), ((3.4, 6),), 8.0)
        source = "call.wav" if name != "other" else "lost.wav"
        stats = {"input": str(tmp_path / source), "real_time_factor": 0.5}
        stats |= {"outputs": {"audio": f"{name}.wav"}, "seed": 7}
        (folder / f"{name}.stats.json").write_text(json.dumps(stats))
    page = page_of(folder)
    assert [one["n"] for one in page.data] == ["first.wav", "third.wav", "other.wav"]
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "seed 7" in text and "2.0 times faster than real time" in text


def test_what_has_no_figure_is_no_column_but_a_tile(tmp_path):
    for name in ("a.wav", "b.wav"):
        write_dialogue(tmp_path / name, ((1, 3),), ((3.4, 6),), 8.0)
    page = page_of(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    missing = {"Pauses kept", "Words", "Real-time factor"}
    assert {heading(column) for column in COLUMNS} - set(page.rows[0]) == missing
    assert len(page.rows[1]) == len(page.rows[0]) - 2  # the strip and its scale
    for name in missing:
        assert f"<dt>{name}</dt><dd>\u2013</dd>" in text
    assert "model and settings are not known" in text
    assert "before the user does again, for 1 s or more" in text


def test_the_sound_can_be_in_the_page(tmp_path, run):
    path = tmp_path / "a.wav"
    write_dialogue(path, ((1, 3),), ((3.4, 6),), 8.0)
    assert run("report", tmp_path, "--embed").exit_code == 0
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    kind, sound = page.data[0]["a"].split(",")
    assert kind == "data:audio/wav;base64"
    assert base64.b64decode(sound) == path.read_bytes()


def test_too_much_sound_is_not_put_into_a_page(tmp_path):
    path = tmp_path / "a.wav"
    path.touch()
    os.truncate(path, 150_000_000)  # without taking room
    with pytest.raises(PplexError, match="is 300 MB.*at most 100 MB"):
        check_embedded([Item("a.wav", audio=path), Item("b.wav", audio=path)])
    check_embedded([Item("a.wav")])


def test_peaks_are_the_largest_of_their_columns():
    pcm = np.zeros(48_000, np.float32)
    pcm[24_000] = -0.5
    found = peaks(pcm, 4.0)  # the other side is longer
    assert len(found) == 300 and found.max() == 0.5
    assert np.flatnonzero(found).tolist() == [75]
    assert peaks(np.zeros(0, np.float32), 1.0).max() == 0


def test_the_command_writes_the_page_and_overwrites_nothing(tmp_path, run):
    write_dialogue(tmp_path / "a.wav", ((1, 3),), ((3.4, 6),), 8.0)
    done = run("report", tmp_path, "--png", tmp_path / "png")
    assert done.exit_code == 0, done.output
    assert done.stdout == "" and ": 1 recording\n" in done.stderr
    sound = run("report", tmp_path, "-o", tmp_path / "a.wav", "--overwrite")
    assert sound.exit_code == 1 and "in .html" in sound.stderr
    again = run("report", tmp_path)
    assert again.exit_code == 1 and "--overwrite" in again.stderr
    pictures = run(
        "report", tmp_path, "-o", tmp_path / "b.html", "--png", tmp_path / "png"
    )
    assert pictures.exit_code == 1 and "a.png exists already" in pictures.stderr
    assert run("report", tmp_path, "--overwrite").exit_code == 0


def test_pictures_are_png_files(tmp_path, run):
    write_dialogue(tmp_path / "a.wav", ((1, 3),), ((2.0, 6),), 8.0)
    run("report", tmp_path, "--png", tmp_path / "png")
    content = (tmp_path / "png" / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) > (1000, 200)


def test_there_is_no_page_without_all_of_its_pictures(tmp_path, run, monkeypatch):
    for name in "ab":
        write_dialogue(tmp_path / f"{name}.wav", ((1, 3),), ((2.0, 6),), 8.0)

    def write_one(path: Path, entry: Entry, **options: Any) -> None:
        if entry.name == "b.wav":
            raise PplexError(f"cannot write {path}: the disk is full")
        write_picture(path, entry, **options)

    monkeypatch.setattr("pplex.evaluation.pictures.write_picture", write_one)
    done = run("report", tmp_path, "--png", tmp_path / "png")
    assert done.exit_code == 1 and "b.png: the disk is full" in done.stderr
    assert not (tmp_path / "report.html").exists()
    assert list((tmp_path / "png").iterdir()) == []


def test_a_picture_has_levels_speech_words_and_what_went_wrong(tmp_path):
    write_dialogue(tmp_path / "a.wav", ((1, 3),), ((2.0, 6),), 8.0)
    transcript(tmp_path / "a.json", ("Good", 3.4, 4.0), ("$5$", 4.0, 5.0))
    (entry,) = make_entries(find([tmp_path / "a.wav"]), Method(vad="energy"))
    for name in ("a.svg", "b.svg", "a.pdf"):
        write_picture(tmp_path / name, entry)
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    picture = (tmp_path / "a.svg").read_text()
    assert picture == (tmp_path / "b.svg").read_text()
    said = set(re.findall(r">([^<>]+)</text>", picture))
    assert {"a.wav, 8.0 s", "time (s)", "level (dBFS)", "Good", "$5$"} <= said
    assert {"user", "agent", "words"} <= said
    assert {"user speaks", "user's level", "agent speaks", "agent's level"} <= said
    assert "interrupts the user" in said and "backchannel" not in said
    found = re.findall(r'middle" x="([\d.]+)"[^>]*>(\d)</text>', picture)
    ticks = {int(second): float(x) for x, second in found}
    mark = re.search(r'<g id="interruption">\s*<path d="M ([\d.]+)', picture)
    assert float(mark[1]) == pytest.approx(ticks[2], abs=1)


def test_silence_and_cut_ends_are_counted_and_the_tail_is_named(tmp_path, run):
    for name, agent in (("a", ((3.4, 6),)), ("b", ()), ("c", ((3.4, 8),))):
        write_dialogue(tmp_path / f"{name}.wav", ((1, 3),), agent, 8.0)
    said = (
        "the agent said nothing in 1 of 3 recordings: a longer --tail",
        "the agent was cut off at the end of 1 of 3 recordings: --tail auto",
    )
    report, score = run("report", tmp_path), run("score", tmp_path, "--vad", "energy")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in said:
        assert text in report.stderr and text in page and text in score.stdout
    rows = Page(page).rows[1:]
    assert [row[1] for row in rows] == ["done", "silent", "cut off"]
    assert "1 silent, 1 cut off" in page
    result = run("score", tmp_path, "--vad", "energy", "--format", "json")
    content = json.loads(result.stdout)
    found = {row["name"]: row["ending"] for row in content["recordings"]}
    assert [found[f"{n}.wav"]["said_nothing"] for n in "abc"] == [0, 1, 0]
    assert [found[f"{n}.wav"]["cut_off_at_end"] for n in "abc"] == [0, 0, 1]
    # What the agent said is better known by its words.
    transcript(tmp_path / "a.json")
    transcript(tmp_path / "b.json", ("yes", 5.0, 5.4))
    content = json.loads(run("score", tmp_path, "--format", "json").stdout)
    found = {row["name"]: row["ending"] for row in content["recordings"]}
    assert [found[f"{n}.wav"]["said_nothing"] for n in "abc"] == [1, 0, 0]


def test_recordings_of_every_suffix_are_found_and_others_counted(tmp_path, run):
    write_dialogue(tmp_path / "a.wav", ((1, 3),), ((3.4, 6),), 8.0)
    pcm, rate = soundfile.read(tmp_path / "a.wav")
    soundfile.write(tmp_path / "b.sph", pcm, rate, format="NIST")
    (tmp_path / "c.m4a").write_text("x")
    (tmp_path / "notes.txt").write_text("ours, perhaps")
    found = find([tmp_path])
    assert [item.name for item in found.items] == ["a.wav", "b.sph"]
    (note,) = found.notes
    assert note.startswith(f"{tmp_path}: left out: 1 file") and "(.m4a 1)" in note
    assert "(.m4a 1)" in run("report", tmp_path).stderr
    assert "(.m4a 1)" in run("score", tmp_path, "--vad", "energy").stdout


def test_what_fails_a_check_of_the_batch_is_said(tmp_path):
    write_dialogue(tmp_path / "a.wav", ((1, 3),), ((3.4, 6),), 8.0)
    outcome = {"check": "says", "passed": False, "detail": "no"}
    checks = {"asked": {"says": "yes"}, "outcomes": [outcome]}
    audio = {"audio": {"path": "a.wav"}}
    line = manifest_line("a.wav", "done", outputs=audio, checks=checks)
    (tmp_path / "manifest.jsonl").write_text(line)
    (note,) = find([tmp_path]).notes
    assert "1 of 1 recordings fail a check of pplex batch: a.wav" in note


def test_an_output_that_was_changed_is_said_to_be_though_its_size_is_the_same(tmp_path):
    write_dialogue(tmp_path / "a.wav", ((1, 3),), ((3.4, 6),), 8.0)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    known = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    outputs = {"audio": {"path": "a.wav", "mtime_ns": 1, **known}}
    line = manifest_line("a.wav", "done", outputs=outputs)
    (tmp_path / "manifest.jsonl").write_text(line)
    assert find([tmp_path]).items[0].status == "done"
    content[-1] ^= 1
    (tmp_path / "a.wav").write_bytes(content)
    (item,) = find([tmp_path]).items
    assert item.status == "missing" and "was changed after" in item.error
