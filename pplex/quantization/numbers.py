"""The 7B's values that another project published, beside those of a model at hand.

From `Tests/PersonaPlexTests` of ivan-digital/qwen3-asr-swift, for its 4-bit files: one
frame from an empty cache with text 3, agent silent, user the sine tone. They were
never confirmed, so a difference is reported and is no fault.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.verify import Finding
from pplex.checkpoint.weights import lm_tensors, make_lm
from pplex.engine.device import compute_dtype
from pplex.model.config import TEXT_PAD, LmConfig
from pplex.model.lm import Lm

FIRST_INPUTS = (0.042, -0.012, 0.018, -0.011, -0.048)
# After the sum of the tables, layers 1, 2 and all, and the last norm: mean, deviation.
MOMENTS = {
    "input": (-0.000383, 0.031235),
    "layer 0": (-0.000494, 0.018814),
    "layer 1": (-0.000756, 0.024948),
    "layer 31": (-0.000849, 0.574707),
    "out_norm": (-0.002991, 1.497070),
}
TEXT_ID, TEXT_LOGIT = 21855, 3.7305
# Greedy codes of steps 0 to 7: with a depformer in 16 bits, and in 4.
CODES = (
    (1676, 1515, 1626, 1562, 306, 478, 326, 101),
    (653, 1515, 1626, 1562, 306, 478, 326, 101),
)
TOLERANCE = 0.02  # of the deviation; the published figures are of one quantization


def check_numbers(local: LocalModel) -> Iterator[Finding]:
    """Say of each published value whether the model agrees."""
    config = local.folder.read_config()
    if config.lm != LmConfig():
        text = "the published values are for the 7B's sizes and do not apply"
        yield Finding("note", "numbers", text)
        return
    lm = make_lm(config.lm, lm_tensors(local.folder, config.lm), compute_dtype())
    codes = [*config.silence_codes, *config.sine_codes]
    states = dict(_states(lm, mx.array([[[code] for code in (TEXT_PAD, *codes)]])))
    values = np.array(states["input"].astype(mx.float32)).ravel()[:5]
    yield _finding("input, first five", values, FIRST_INPUTS, 0.001)
    for where, (mean, deviation) in MOMENTS.items():
        x = states[where].astype(mx.float32)
        found = (float(x.mean()), float(mx.sqrt(mx.var(x))))
        yield _finding(where, found, (mean, deviation), TOLERANCE * deviation)
    hidden, logits = states["out_norm"], states["logits"]
    best = int(mx.argmax(logits))
    found = (best, float(logits.reshape(-1)[best]))
    yield _finding("text logits", found, (TEXT_ID, TEXT_LOGIT), 0.1)
    drawn = lm.depformer(
        hidden, mx.array([TEXT_ID]), lambda x, _: mx.argmax(x, axis=-1)
    )
    chain = np.array(drawn)[0]
    agrees = any((chain == expected).all() for expected in CODES)
    yield _said("depformer", agrees, list(chain), [list(codes) for codes in CODES])


def _states(lm: Lm, tokens: mx.array) -> Iterator[tuple[str, mx.array]]:
    """What the first frame of ``tokens`` (1, streams, 1) becomes on its way."""
    x = lm.embed(tokens)
    yield "input", x
    layers = lm.layers
    try:
        for count in (1, 2, len(layers)):
            lm.layers = layers[:count]
            yield f"layer {count - 1}", lm.temporal(x, lm.make_cache())
    finally:
        lm.layers = layers
    hidden, logits = lm.head(lm.temporal(x, lm.make_cache())[:, 0])
    yield "out_norm", hidden
    yield "logits", logits


def _finding(
    what: str, found: object, expected: tuple[float, ...], tolerance: float
) -> Finding:
    values = np.array(found, np.float64)
    agrees = bool(np.allclose(values, expected, rtol=0, atol=tolerance))
    return _said(what, agrees, [float(f"{v:.6g}") for v in values], list(expected))


def _said(what: str, agrees: bool, found: list, expected: list) -> Finding:
    word = "agrees with" if agrees else "differs from"
    text = f"{found} {word} the published, unconfirmed {expected}"
    return Finding("note", f"numbers, {what}", text)
