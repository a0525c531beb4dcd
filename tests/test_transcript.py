"""Words with times, and the five formats."""

import json

import pytest

from pplex.errors import PplexError
from pplex.respond.transcript import CueShape, Word, cues, words, write_transcript

EPAD, PAD = 0, 3
PIECES = {
    0: "EPAD",
    1: "<s>",
    2: "</s>",
    3: "PAD",
    10: " Hello",
    11: "\u2581wor",
    12: "ld",
    13: ".",
    14: " ",
    15: "PAD",  # a real piece that looks like the padding
    16: "<0xC3>",
    17: "<0xA9>",
    18: "<0x20>",
    19: "<0xFF>",
    20: "<0x03>",
    21: " caf",
}
FRAME_RATE = 12.5


def said(*ids: int) -> list[tuple[str, int, float]]:
    found = words(ids, PIECES.__getitem__, FRAME_RATE)
    for word in found:
        assert word.start_s == pytest.approx(word.frame * 0.08)
    return [(word.text, word.frame, word.end_s) for word in found]


def test_pieces_join_into_words_with_the_time_of_their_frames():
    assert said(PAD, 10, PAD, EPAD, 11, 12, PAD, 13, PAD) == [
        ("Hello", 1, pytest.approx(0.16)),
        ("world.", 4, pytest.approx(0.64)),
    ]


def test_silence_has_no_words():
    assert said() == []
    assert said(PAD, EPAD, PAD, 1, 2) == []


def test_a_lone_word_mark_begins_the_word_after_it():
    assert said(10, 14, PAD, 12) == [("Hello", 0, 0.08), ("ld", 1, 0.32)]


def test_a_word_may_begin_without_a_mark():
    assert said(PAD, 12) == [("ld", 1, 0.16)]


def test_ids_decide_what_is_padding_and_not_their_pieces():
    assert said(15) == [("PAD", 0, 0.08)]


def test_byte_pieces_are_joined_as_utf8():
    assert said(21, 16, PAD, 17) == [("café", 0, 0.32)]


def test_a_byte_space_parts_words_and_control_bytes_are_dropped():
    assert [w[0] for w in said(21, 18, 12)] == ["caf", "ld"]
    assert said(20) == []


def test_bytes_that_are_not_utf8_become_the_replacement_character():
    assert said(10, 19) == [("Hello\ufffd", 0, 0.16)]


def word(text: str, start_s: float, end_s: float | None = None) -> Word:
    end_s = start_s + 0.08 if end_s is None else end_s
    return Word(text, start_s, end_s, round(start_s * FRAME_RATE))


def test_cues_part_at_sentence_ends_and_gaps():
    spoken = [word("So.", 0), word("Well", 0.16), word("then", 1.2), word("no", 3)]
    assert [c.text for c in cues(spoken)] == ["So.", "Well then", "no"]
    assert (cues(spoken)[1].start_s, cues(spoken)[1].end_s) == (0.16, 1.28)


def test_cues_end_before_42_characters_and_7_seconds_are_passed():
    many = [word("abcdefghi", 0.08 * i) for i in range(30)]
    assert all(len(c.text) <= 42 for c in cues(many))
    assert " ".join(c.text for c in cues(many)) == " ".join(w.text for w in many)
    slow = [word("a", 0.9 * i) for i in range(20)]
    assert all(c.end_s - c.start_s <= 7 for c in cues(slow))
    assert len(cues(slow)) == 3
    assert [c.text for c in cues([word("x" * 60, 0)])] == ["x" * 60]


def test_a_cue_has_the_lines_and_the_width_that_are_asked_for(tmp_path):
    many = [word("abcdefghi", 0.08 * i) for i in range(8)]
    shape = CueShape(lines=2, width=20)
    assert [c.text.count("abcdefghi") for c in cues(many, shape)] == [4, 4]
    write_transcript(tmp_path / "t.srt", many, 1.0, {}, shape)
    text = (tmp_path / "t.srt").read_text("utf-8").splitlines()
    assert text[2:4] == ["abcdefghi abcdefghi"] * 2 and text[4] == ""
    long = [word("x" * 30, 0), word("y", 0.1), word("z", 0.2)]
    assert [c.text for c in cues(long, CueShape(1, 5))] == ["x" * 30, "y z"]


SPOKEN = [word("A<b", 0.08), word("&", 0.16), word("é.", 3661.5, 3661.58)]


def test_json_holds_words_times_and_metadata(tmp_path):
    write_transcript(tmp_path / "t.json", SPOKEN, 4000.0, {"voice": "NATF2"})
    content = json.loads((tmp_path / "t.json").read_text("utf-8"))
    assert content["text"] == "A<b & é."
    assert content["duration_s"] == 4000.0
    assert content["metadata"] == {"voice": "NATF2"}
    assert content["words"][0] == {
        "text": "A<b",
        "start_s": 0.08,
        "end_s": 0.16,
        "frame": 1,
    }


def test_srt_is_numbered_with_commas(tmp_path):
    write_transcript(tmp_path / "t.srt", SPOKEN, 4000.0, {})
    assert (tmp_path / "t.srt").read_text("utf-8") == (
        "1\n00:00:00,080 --> 00:00:00,240\nA<b &\n\n"
        "2\n01:01:01,500 --> 01:01:01,580\né.\n\n"
    )


def test_vtt_has_its_header_and_escapes(tmp_path):
    write_transcript(tmp_path / "t.VTT", SPOKEN, 4000.0, {})
    assert (tmp_path / "t.VTT").read_text("utf-8") == (
        "WEBVTT\n\n00:00:00.080 --> 00:00:00.240\nA&lt;b &amp;\n\n"
        "01:01:01.500 --> 01:01:01.580\né.\n\n"
    )


def test_tsv_has_a_row_a_cue_in_milliseconds(tmp_path):
    write_transcript(tmp_path / "t.tsv", SPOKEN, 4000.0, {})
    assert (tmp_path / "t.tsv").read_text("utf-8") == (
        "start\tend\ttext\n80\t240\tA<b &\n3661500\t3661580\té.\n"
    )


def test_txt_is_the_plain_text(tmp_path):
    write_transcript(tmp_path / "t.txt", SPOKEN, 4000.0, {})
    assert (tmp_path / "t.txt").read_text("utf-8") == "A<b & é.\n"


@pytest.mark.parametrize("suffix", [".json", ".srt", ".vtt", ".tsv", ".txt"])
def test_a_silent_agent_still_gets_a_file(tmp_path, suffix):
    write_transcript(tmp_path / f"t{suffix}", [], 1.0, {})
    assert (tmp_path / f"t{suffix}").is_file()


@pytest.mark.parametrize("name", ["t", "t.doc", "json"])
def test_other_suffixes_are_refused_with_the_four_named(tmp_path, name):
    with pytest.raises(PplexError, match=".json, .srt, .vtt or .txt"):
        write_transcript(tmp_path / name, [], 1.0, {})
    assert list(tmp_path.iterdir()) == []
