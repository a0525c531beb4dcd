"""How many kernels a frame of the 7B launches where MLX's own operations make it.

On a Mac launching takes a good part of a frame. What is counted is the graph of a frame
with as many layers, steps and ids as the 7B, in narrower matrices. Operations that a
GPU has a kernel for and a CPU has not, norms, rotations, attention, are stood in for.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from pplex.bench.random_model import TINY, random_lm
from pplex.engine.mlx.engine import MlxEngine
from pplex.model.config import LmConfig
from pplex.model.mimi import Mimi
from pplex.model.prompt import make_prompt
from pplex.model.sampling import SamplingConfig

CONFIG = replace(
    TINY,
    lm=LmConfig(
        dim=128,
        num_heads=2,
        hidden_dim=128,
        depformer_dim=128,
        depformer_num_heads=2,
        depformer_hidden_dim=128,
    ),
)
# They make another view of what is there.
VIEWS = ("Broadcast", "Contiguous", "Depends", "ExpandDims", "Reshape", "Slice")
VIEWS += ("Split", "Squeeze", "Transpose")


def one_kernel(kernel, first: mx.array, *others: mx.array) -> mx.array:
    """One operation of all these, and a cast where they are not of one type."""
    arrays = [first, *others]
    if len({a.dtype for a in arrays}) > 1:
        arrays = [a.astype(mx.float32) for a in arrays]
    return mx.depends([kernel(arrays[0], axis=-1)], arrays[1:])[0]


def launches(*arrays: mx.array) -> Counter[str]:
    """Kernels that make ``arrays``, by their names."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    inputs = Counter(re.findall(r"-> (\d+)$", text.getvalue(), re.MULTILINE))
    counts: Counter[str] = Counter()
    for number, name in re.findall(r'(\d+) \[label ="(\w+)"', text.getvalue()):
        if name not in VIEWS:  # each part that is put beside others is copied
            counts[name] += inputs[number] if name == "Concatenate" else 1
    return counts


@pytest.fixture
def gpu_operations(monkeypatch):
    """As many operations as on a GPU."""
    monkeypatch.setattr(
        mx.fast, "rms_norm", lambda x, w, eps: one_kernel(mx.sort, x, w)
    )
    monkeypatch.setattr(mx.fast, "rope", lambda x, *_, **__: one_kernel(mx.cummax, x))
    monkeypatch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda q, k, v, **_: one_kernel(mx.cummin, q, k, v),
    )


def test_a_frame_of_the_7b_launches_few_kernels(gpu_operations, monkeypatch):
    lm, codec = random_lm(CONFIG.lm, 4), Mimi(CONFIG.mimi).parameters()
    codec = dict(tree_flatten(codec))
    engine = MlxEngine(CONFIG, lm, codec, on_gpu=True, alone=True)
    prompt = make_prompt(CONFIG, [], voice_codes=np.zeros((8, 4), np.int32))
    rows = engine.rows(1, SamplingConfig())
    rows.join(engine.prefill(prompt), seed=1)
    user, made = np.zeros((1, 8), np.int32), list[Counter[str]]()
    mx.disable_compile()  # a CPU would have a C compiler called
    rows.step(user).tokens()  # the first has what follows a prompt, and makes room
    mx.enable_compile()
    monkeypatch.setattr(mx, "async_eval", lambda *all_: made.append(launches(*all_)))

    step = rows.step(user)

    (frame,) = made
    assert frame["QuantizedMatmul"] == 4 * (32 + 8 * 6) + 1  # all but heads
    assert frame["CumMin"] == 32 + 7 * 6  # no attention in a frame's first step
    assert frame["AsType"] + frame["Concatenate"] <= 1
    assert sum(frame.values()) <= 1033, frame
    # The host reads no memory that the next step reads.
    assert not np.shares_memory(np.asarray(step.agent), np.asarray(rows._column))
