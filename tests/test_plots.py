"""Pictures: formats by suffix, the same bytes twice, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pplex.errors import PplexError
from pplex.plots import check_plot, plot, shortened


def draw(path: Path) -> bytes:
    with plot(path, 4, 3) as figure:
        axes = figure.add_subplot()
        axes.set_title("costs $5$ & \u65e5\u672c")
        axes.plot([0, 1], [2, 3])
    return path.read_bytes()


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".SVG", b"<svg"), (".pdf", b"%PDF")]
)
def test_the_suffix_tells_the_format_and_nothing_the_date(tmp_path, suffix, start):
    first = draw(tmp_path / f"a{suffix}")
    assert first.startswith(start)
    assert draw(tmp_path / f"b{suffix}") == first


def test_words_of_an_svg_are_words(tmp_path):
    assert "costs $5$ &amp; \u65e5\u672c" in draw(tmp_path / "a.svg").decode()


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("mine")
    with pytest.raises(ZeroDivisionError), plot(path, 4, 3):
        _ = 1 / 0
    with pytest.raises(PplexError, match="does not exist"):
        draw(tmp_path / "none" / "a.png")
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a.gif", "a", "png"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(PplexError, match=r"end its name in \.png, \.svg or \.pdf"):
        check_plot(tmp_path / name)


def test_a_machine_without_matplotlib_is_told_what_to_install(
    tmp_path, monkeypatch, run
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PplexError, match=r"pip install 'pplex\[plots\]'"):
        check_plot(tmp_path / "a.png")
    (tmp_path / "a.wav").write_text("no sound")
    for command in (
        ("report", tmp_path, "--png", tmp_path / "png"),
        ("bench", "--random", "tiny", "--plot", tmp_path / "a.png"),
        ("models", "compare", "mini", "mini", "--plot", tmp_path / "a.png"),
    ):
        result = run(*command)
        assert result.exit_code == 1 and "pplex[plots]" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_long_names_keep_their_end():
    assert shortened("a" * 90 + ".wav", 10) == "\u2026aaaaa.wav"
    assert shortened("a.wav", 10) == "a.wav"
