"""Full-Duplex-Bench's definitions, on values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pplex.errors import PplexError
from pplex.evaluation import full_duplex_bench as bench
from pplex.evaluation.speech_activity import Segment
from pplex.respond.transcript import Word

DATA = Path(__file__).parent / "data" / "fdb"


def said(*times: tuple[float, float]) -> list[Word]:
    return [Word("word", start, end, 0) for start, end in times]


@pytest.mark.parametrize(
    ("times", "verdict"),
    [
        ((), 0),
        (((1.0, 1.9),), 0),
        (((1.0, 1.2), (1.3, 1.5), (1.6, 1.9)), 0),
        (((1.0, 1.2), (1.2, 1.4), (1.4, 1.6), (1.6, 1.9)), 1),  # 4 words
        (((1.0, 2.0),), 1),  # not under a second
        (((1.0, 1.2), (9.0, 9.2)), 1),  # from the first word to the last
    ],
)
def test_takeover(times, verdict):
    assert bench.takeover(said(*times)) == verdict


def test_latency_is_never_below_zero():
    assert bench.latency_s(said((3.36, 3.9)), 2.01) == pytest.approx(1.35)
    assert bench.latency_s(said((1.0, 3.9)), 2.01) == 0


def test_after_an_interruption_words_under_way_count_from_its_end():
    found = bench.after(said((1, 2), (2.5, 3.5), (4, 5)), 3.0)
    assert [(w.start_s, w.end_s) for w in found] == [(3.0, 3.5), (4, 5)]


def segments(*times: tuple[float, float]) -> list[Segment]:
    return [Segment(start, end) for start, end in times]


def test_backchannels_are_short_and_of_few_words():
    row = bench.backchannel(
        segments((1, 1.4), (3, 3.5)), said((1, 1.3), (3, 3.2), (3.2, 3.5)), 10, None
    )
    assert row["takeover"] == row["takeover_any"] == 0
    assert row["backchannels"] == 2
    assert row["frequency_hz"] == pytest.approx(0.2)
    assert row["timing_distance"] is None


def test_speech_over_three_seconds_takes_over_and_ends_the_count():
    row = bench.backchannel(segments((1, 1.4), (2, 5.1), (7, 7.2)), [], 10, None)
    assert (row["takeover"], row["backchannels"]) == (1, 1)


def test_the_last_segment_decides_as_in_the_script():
    row = bench.backchannel(segments((1, 3), (5, 5.4)), [], 10, None)
    assert (row["takeover"], row["takeover_any"]) == (0, 1)
    three = said((1.0, 1.2), (1.2, 1.4), (1.4, 1.6))
    row = bench.backchannel(segments((1, 1.7)), three, 10, None)
    assert row["takeover"] == 1


def test_timing_distance_of_known_histograms():
    # 1 s makes 6 bins; speech in bins 0 and 1 against people in all bins alike.
    found = bench.timing_distance(segments((0.1, 0.3)), 1.0, [1.0] * 6)
    p, q = 0.5, 1 / 6
    m = (p + q) / 2
    divergence = 2 * p * math.log(p / m) + 2 * q * math.log(q / m)
    divergence += 4 * q * math.log(2)
    assert found == pytest.approx(math.sqrt(divergence / 2), abs=1e-6)
    assert bench.timing_distance([], 1.0, [1.0] * 6) == 1


def test_samples_are_known_by_their_annotations():
    task = bench.read_sample(DATA / "smooth_turn_taking" / "1")
    assert task == bench.Sample("smooth_turn_taking", 2.0)
    task = bench.read_sample(DATA / "user_interruption" / "1")
    assert task == bench.Sample("user_interruption", 4.0)
    task = bench.read_sample(DATA / "pause_handling" / "1")
    assert task == bench.Sample("pause_handling", None)
    assert bench.read_sample(DATA) is None


@pytest.mark.parametrize("content", ["", "{}", "[]", '[{"timestamp": [1]}]'])
def test_a_broken_annotation_is_named(tmp_path, content):
    (tmp_path / "turn_taking.json").write_text(content)
    with pytest.raises(PplexError, match="turn_taking.json is not an annotation"):
        bench.read_sample(tmp_path)


def test_chunks_without_an_end_end_where_they_start(tmp_path):
    path = tmp_path / "output.json"
    path.write_text(
        '{"text": "a b", "chunks": [{"text": " a", "timestamp": [1.0, null]},'
        ' {"text": "b", "timestamp": [null, 2.0]}]}'
    )
    assert bench.read_chunks(path) == [Word("a", 1.0, 1.0, 0)]
    path.write_text('{"text": "a"}')
    with pytest.raises(PplexError, match="--words own"):
        bench.read_chunks(path)


def test_overlaps_as_the_script_counts_them():
    user = segments((1, 3), (3.5, 5), (9, 10))  # joined: 1 to 5
    agent = segments((0.5, 2), (4, 6.2), (6.6, 8), (12, 13))  # joined: 4 to 8
    row = bench.overlap_timing(user, agent, Segment(4.5, 5))
    assert row["stops"] == [[1, 2], [4, 5]]
    assert row["stop_s"] == pytest.approx(1.0)
    assert row["responses"] == [[10, 12]]  # after 5 the next start is 12 too, later
    assert row["response_s"] == pytest.approx(2.0)
    assert row["event_stop_s"] == pytest.approx(3.5)  # it goes on until 8
    assert row["event_response_s"] is None  # it never stopped


def test_an_overlap_to_which_the_agent_yields():
    row = bench.overlap_timing(
        segments((0, 2), (5, 7)), segments((2.5, 5.7), (7.4, 9)), Segment(5, 7)
    )
    assert row["event_stop_s"] == pytest.approx(0.7)
    assert row["event_response_s"] == pytest.approx(0.4)
    assert row["stop_s"] == pytest.approx(0.7)
    assert row["response_s"] == pytest.approx((0.5 + 0.4) / 2)


def test_nothing_said_has_no_latency():
    row = bench.overlap_timing(segments((0, 2)), [], Segment(1, 2))
    assert {row[key] for key in row if key.endswith("_s")} == {None}


def test_overlap_samples_are_known_by_their_annotation(tmp_path):
    folder = tmp_path / "talking_to_other" / "7"
    folder.mkdir(parents=True)
    (folder / "input.wav").write_bytes(b"")
    (folder / "metadata.json").write_text(
        '{"context_text": "a", "current_turn_text": "b", "timestamps": [7.2, 11.4]}'
    )
    sample = bench.read_sample(folder)
    assert sample.task == "v1.5_talking_to_other"
    assert sample.overlap == Segment(7.2, 11.4)
    assert sample.text == ("a", "b")
    (folder / "metadata.json").write_text('{"other": 1}')
    assert bench.read_sample(folder) is None
    (folder / "metadata.json").write_text('{"timestamps": [1]}')
    with pytest.raises(PplexError, match="v1.5"):
        bench.read_sample(folder)
