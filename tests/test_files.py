"""Files that are written whole, and what errors say."""

from __future__ import annotations

import stat

import pytest

from pplex.errors import PplexError, first_line
from pplex.files import atomic_write, cache_folder, check_new, write_text


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_file_that_is_written_anew_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(mode)
    link = tmp_path / "link.txt"
    link.symlink_to(path)
    write_text(link, "new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)


def test_a_failed_write_leaves_content_and_mode(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o640)
    with pytest.raises(KeyError), atomic_write(path):
        raise KeyError
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("old", 0o640)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_missing_is_told_before_the_work(tmp_path):
    with pytest.raises(PplexError, match="the folder .*gone does not exist"):
        check_new(tmp_path / "gone" / "a.json", overwrite=True)


def test_an_error_says_its_first_line_or_its_name():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(MemoryError()) == "MemoryError"
    assert first_line(RuntimeError("  ")) == "RuntimeError"


@pytest.mark.parametrize("base", ["", "here"])
def test_a_cache_that_is_nowhere_is_at_home(base, tmp_path, monkeypatch):
    """Else there would be one in each folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    assert cache_folder() == tmp_path / ".cache/pplex"
