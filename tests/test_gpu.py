"""MLX's own operations on a GPU of any maker, in bfloat16, by the command line.

Where there is none they run on the CPU as if it were one. How near their numbers are to
the specification's is for the conformance tests.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from pplex.engine.choose import KINDS

pytestmark = pytest.mark.usefixtures("on_gpu")
SAMPLES = Path(__file__).parents[1] / "samples"


@pytest.fixture(autouse=True)
def by_mlx(monkeypatch):
    """Let MLX's own operations be what is best for a GPU here."""
    for name, kind in KINDS.items():
        found = replace(kind, is_available=lambda is_it=name == "gpu": is_it)
        monkeypatch.setitem(KINDS, name, found)


def test_the_built_in_model_answers_as_it_was_taught(run, tmp_path):
    args = ("--model", "mini", "--greedy", "--transcript", tmp_path / "said.json")
    sky = SAMPLES / "teacher_sky.wav"
    done = run("respond", sky, "-o", tmp_path / "reply.wav", *args)
    assert done.exit_code == 0, done.stderr
    said = json.loads((tmp_path / "said.json").read_text())["text"]
    assert said == "Because air scatters blue light the most."


@pytest.mark.skipif(
    not mx.is_available(mx.gpu), reason="a CPU takes minutes for chunks of a GPU's size"
)
def test_an_answer_does_not_depend_on_what_is_answered_beside_it(run, tmp_path, data):
    calls = sorted((data / "respond").glob("user_*.wav"))
    assert len(calls) > 1
    for size in (1, len(calls)):
        args = ("--batch-size", size, "--model", data / "tiny", "--tokens")
        done = run("batch", *calls, "-o", tmp_path / str(size), *args)
        assert done.exit_code == 0, done.stderr
    for alone in (tmp_path / "1").glob("*.wav"):
        beside = tmp_path / str(len(calls)) / alone.name
        assert beside.read_bytes() == alone.read_bytes()
        tokens = [np.load(path.with_suffix(".npz")) for path in (alone, beside)]
        for name in tokens[0].files:
            np.testing.assert_array_equal(tokens[0][name], tokens[1][name])
