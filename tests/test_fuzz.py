"""A little of the fuzzing in tests/fuzz, and what longer runs of it have found."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

from mutate import mutate
from targets import TARGETS, corpus, run

CASES = [(name, path) for name in TARGETS for path in corpus(name)]
FILES = 40  # of each target; the script in tests/fuzz runs for as long as you like


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(("name", "case"), CASES, ids=lambda c: getattr(c, "name", c))
def test_what_once_broke_a_reader_breaks_it_no_more(name, case, tmp_path):
    path = tmp_path / f"case{TARGETS[name].suffix}"
    path.write_bytes(case.read_bytes())
    run(TARGETS[name], path)


@pytest.mark.parametrize("name", TARGETS)
def test_broken_files_are_read_or_refused_in_a_sentence(name, tmp_path):
    target = TARGETS[name]
    seeds = list(target.seeds())
    path = tmp_path / f"case{target.suffix}"
    for seed in seeds:
        path.write_bytes(seed)
        run(target, path)
    rng = random.Random(name)
    for _ in range(FILES // 8 if target.slow else FILES):
        path.write_bytes(mutate(rng.choice(seeds), rng, seeds))
        run(target, path)


@pytest.mark.parametrize("name", TARGETS)
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=st.binary(max_size=400))
def test_any_bytes_are_read_or_refused_in_a_sentence(name, tmp_path, content):
    path = tmp_path / f"case{TARGETS[name].suffix}"
    path.write_bytes(content)
    run(TARGETS[name], path)


@pytest.mark.parametrize("length", [(1 << 60) - 1, 1 << 62, (1 << 64) - 1])
def test_a_header_that_promises_exabytes_allocates_none_of_them(tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(100))
    assert "header does not fit" in run(TARGETS["weights"], path)
    assert "header does not fit" in run(TARGETS["voice"], path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 58], "data_offsets": [0, 1 << 60]},
        {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]},
    ],
)
def test_a_tensor_that_its_file_cannot_hold_is_refused(tmp_path, entry):
    import json

    header = json.dumps({"embeddings": entry, "cache": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(16)
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert run(TARGETS["weights"], path)
    assert run(TARGETS["voice"], path)
