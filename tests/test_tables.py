"""Figures have units and scales that suit them; tables have 80 columns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pplex.cli.models_compare import _verdict
from pplex.cli.tables import table
from pplex.quantization.compare import StreamFigures
from pplex.quantization.compare_models import Comparison, ModelFigures
from pplex.quantization.plot import plot_divergence
from pplex.units import Scale, count, counted, duration, percent, significant, size


@pytest.mark.parametrize(
    ("num_bytes", "said"),
    [
        (0, "0 B"),
        (640, "640 B"),
        (3072, "3.1 kB"),
        (999_600, "1.0 MB"),
        (9_960_000, "10 MB"),
        (11e6, "11 MB"),
        (999.6e6, "1.0 GB"),
        (17.2e9, "17.2 GB"),
    ],
)
def test_a_size_is_never_0_mb(num_bytes, said):
    assert size(num_bytes) == said


def test_numbers_keep_their_digits():
    assert [count(n) for n in (512, 41_024, 5_488_384, 7_690_000_000)] == [
        *("512", "41.0 k", "5.49 M", "7.69 G")
    ]
    assert [significant(x) for x in (1.3, 0.0415, 115.2, 2817, 0)] == [
        *("1.30", "0.0415", "115", "2 817", "0")
    ]
    assert percent(0.9993) == "99.9 %"
    assert [duration(s) for s in (0.2, 75, 166, 7300)] == [
        *("1 s", "75 s", "3 minutes", "2 hours")
    ]


def test_of_one_thing_there_is_no_plural():
    assert [counted(n, "byte") for n in (0, 1, 2)] == ["0 bytes", "1 byte", "2 bytes"]


def test_a_column_of_small_numbers_has_one_scale():
    kl = Scale([6.85e-4, 2.4e-7, 1e-9, 0.0])
    assert kl.heading("KL", "nats") == "KL, 1e-6 nats"
    assert [kl.text(v) for v in (6.85e-4, 2.4e-7, 1e-9, 0.0)] == [
        *("685.00", "0.24", "<0.01", "0")
    ]
    assert Scale([0.0]).heading("KL", "nats") == Scale([4.0]).heading("KL", "nats")


def test_a_name_says_nothing_to_the_terminal():
    assert table([["name", "n"], ["a\nb\x1b[31m.wav", "1"]]).splitlines() == [
        *(f"name{'':14}n", r"a\nb\x1b[31m.wav  1")
    ]


def test_a_wide_table_goes_on_below_and_empty_columns_go():
    rows = [["name", "a" * 40, "empty", "b" * 40], ["x.wav", "1", "-", "2"]]
    first, second = table(rows, right=(1, 2, 3)).split("\n\n")
    assert first == f"name   {'a' * 40}\nx.wav  {'1':>40}"
    assert second == f"name   {'b' * 40}\nx.wav  {'2':>40}\n"


def comparison(*streams: StreamFigures) -> Comparison:
    model = ModelFigures("m", "mlx", (16,), 11_000_000, 8_000_000, 0.2)
    return Comparison(model, model, [], 96, 0, "cpu", 1e-7, list(streams), [], None)


def test_a_comparison_begins_with_a_verdict():
    text = StreamFigures("text", 1e-6, 0.999, 0.002, 1.0, 1.0)
    agent = replace(text, stream="agent 1", top1=1.0)
    said = _verdict(comparison(text, agent))
    assert said.startswith("no difference you would notice\n")
    assert "text 99.9 %, sound 100.0 % at least; drawn apart 0.2 %" in said
    worse = _verdict(comparison(text, replace(agent, top1=0.97)))
    assert worse.startswith("a small difference")
    assert "would hear" in _verdict(comparison(replace(text, differ=0.3), agent))
    same = [replace(stream, top1=1.0, differ=0.0) for stream in (text, agent)]
    assert _verdict(comparison(*same)).startswith("no difference: ")


def test_the_plots_floor_hides_no_bar_that_is_not_0(tmp_path):
    """Bars in an SVG are paths; one of 0 ends at the axis."""
    streams = [StreamFigures("text", 5e-7, 1.0, 0.0, 1.0, 1.0)]
    for idx, kl in enumerate((2e-8, 0.0), 1):
        streams.append(replace(streams[0], stream=f"agent {idx}", kl=kl))
    path = tmp_path / "kl.svg"
    plot_divergence(path, comparison(*streams))
    tops = []  # in points from the picture's top
    for stream in streams:
        bar = path.read_text().split(f'<g id="{stream.stream}">')[1]
        ys = [float(step.split()[1]) for step in _steps(bar.split('d="')[1])]
        tops.append(min(ys))
    text, first, floor = tops
    assert text < first < floor - 5
    plot_divergence(tmp_path / "none.svg", comparison(replace(streams[0], kl=0.0)))


def _steps(drawn: str) -> list[str]:
    """The points of an SVG path, as ``x y``."""
    commands = drawn.split('"')[0].replace("z", "").split("\n")
    return [step[2:] for step in commands if step.strip()]
