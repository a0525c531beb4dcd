"""JSON from outside: what fits a form, and what is said of what does not."""

from __future__ import annotations

import math
import os

import pytest

from pplex.errors import PplexError
from pplex.files import open_regular, read_regular, reading
from pplex.values import fit, parse_json, read_json

FORM = {
    "name": str,
    "size": (int, None),
    "channel": ("mix", int, None),
    "times": ([float], None),
    "parts": ({str: float}, None),
}


def test_what_fits_comes_back_and_what_is_missing_is_none():
    value = {"name": "a", "channel": "mix", "times": [1, 2.5], "other": [None]}
    assert fit(value, FORM) == value | {"size": None, "parts": None}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "it is [], where an object is expected"),
        ({}, "`name` is None, where text is expected"),
        ({"name": 5}, "`name` is 5, where text is expected"),
        ({"name": "a", "size": 1.0}, "`size` is 1.0, where a whole number is expected"),
        ({"name": "a", "size": True}, "`size` is True, where a whole number"),
        ({"name": "a", "size": 1 << 63}, "`size` is 9223372036854775808, where"),
        ({"name": "a", "channel": "left"}, "`channel` is 'left', where"),
        ({"name": "a", "times": 1}, "`times` is 1, where a list is expected"),
        ({"name": "a", "times": [0, math.nan]}, "`times[1]` is nan, where a number"),
        ({"name": "a", "times": [10**400]}, "`times[0]` is 1000"),
        ({"name": "a", "parts": {"x": "1"}}, "`parts.x` is '1', where a number"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(value, said):
    with pytest.raises(ValueError) as info:
        fit(value, FORM)
    assert str(info.value).startswith(said)
    assert len(str(info.value)) < 200


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b"\xff", b"1" * 5000, b'"\xed\xa0\x80"']
)
def test_what_is_no_json_is_a_value_error(content):
    with pytest.raises(ValueError):
        parse_json(content)


def test_a_file_is_read_up_to_a_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"[1]")
    assert read_json(path, 3) == [1]
    with pytest.raises(PplexError, match="has 3 bytes, where 2 are the most"):
        read_json(path, 2)


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "/dev/null"])
def test_pipes_and_devices_are_no_files(tmp_path, kind):
    path = tmp_path / "x"
    os.mkfifo(path) if kind == "fifo" else path.symlink_to(kind)
    with pytest.raises(PplexError, match="x is a device or pipe"):
        open_regular(path)


def test_what_is_not_there_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none", 1)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path, 1)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("a"), "x is none of ours ('a')"),
        (MemoryError(), "x is none of ours (MemoryError)"),
        (RecursionError("deep"), "x is none of ours (deep)"),
        (OSError(5, "Input/output error"), "x cannot be read: Input/output error"),
        (OSError("a library's"), "x is none of ours (a library's)"),
        (PplexError("its own"), "its own"),
    ],
)
def test_whatever_reading_raises_is_one_sentence(error, said):
    with pytest.raises(PplexError) as info, reading("x", "is none of ours"):
        raise error
    assert str(info.value) == said


def test_a_message_is_one_line_whatever_it_quotes():
    said = str(PplexError("a\nb\r\x1b[2J.wav\udcff, Å\u200d日 is missing"))
    assert said == "a\\nb\\r\\x1b[2J.wav\\udcff, Å\u200d日 is missing"
