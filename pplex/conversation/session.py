"""Load a model and talk to it: PCM frames in, PCM frames and text ids out."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pplex.checkpoint import voices
from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.tokenizer import TextTokenizer
from pplex.checkpoint.weights import codec_tensors, lm_tensors
from pplex.conversation.scheduler import converse
from pplex.engine.base import Engine, Start
from pplex.engine.choose import (
    Compute,
    Form,
    choose_form,
    make_engine,
)
from pplex.errors import PplexError, first_line
from pplex.model.config import ModelConfig
from pplex.model.sampling import SamplingConfig

_WARM_UP_FRAMES = 4


@dataclass
class Model:
    """A loaded model: its engine, tokenizer and voices, and where they came from.

    ``bits`` are those of its weights in the files, ``form`` how they compute, and why.
    """

    local: LocalModel
    config: ModelConfig
    engine: Engine
    tokenizer: TextTokenizer
    voices: dict[str, Path]
    layout: str
    bits: tuple[int, ...]
    form: Form
    load_s: float


def load(
    local: LocalModel,
    *,
    compute: Compute = "auto",
    kv_bits: int | None = None,
    many: bool = False,
    live: bool = False,
) -> Model:
    """Load the model at ``local`` on the best engine here.

    ``compute`` is the form that it computes in: quantized weights as they are, or
    written out, or what is best for one conversation alone; ``kv_bits`` are those of
    keys and values, 8 or as computed; ``many`` tells whether several recordings will be
    answered at a time, ``live`` whether a stream.
    """
    start = time.perf_counter()
    folder = local.folder
    config = folder.read_config().with_kv_bits(kv_bits)
    tokenizer = TextTokenizer.load(folder.tokenizer)
    if tokenizer.num_pieces != config.lm.text_card:
        raise PplexError(
            f"{folder.path}: the tokenizer has {tokenizer.num_pieces} pieces, the "
            f"model {config.lm.text_card}; they belong to different models"
        )
    codec = codec_tensors(folder, config.mimi)
    lm = lm_tensors(folder, config.lm)
    layout, bits = lm.layout, lm.bits
    form = choose_form(compute, config, lm, many=many, live=live)
    if form.dense:
        lm = lm.write_out()
    try:
        engine = make_engine(config, lm, codec, alone=form.alone)
    except RuntimeError as e:  # a file that ends before its tensors do, or no memory
        reason = first_line(e)
        raise PplexError(f"{local.path}: cannot be read whole ({reason})") from e
    return Model(
        local=local,
        config=config,
        engine=engine,
        tokenizer=tokenizer,
        voices=voices.find_voices(local.path),
        layout=layout,
        bits=bits,
        form=form,
        load_s=time.perf_counter() - start,
    )


def warm_up(engine: Engine, start: Start, sampling: SamplingConfig) -> float | None:
    """Run frames that leave no trace, so that the first real ones are not slower.

    Of the first one some tokens are given and of others none, which may be compiled
    for apart. Seconds of one; None where frames are compiled for.
    """
    start = replace(start, encoder=None, decoder=None, rest=start.rest[:0])
    silence = np.zeros((1, engine.config.frame_size), np.float32)
    chunks = [silence] * (2 if engine.is_async else _WARM_UP_FRAMES)
    times = []
    for _ in converse(engine, start, 0, chunks, sampling, decode_frames=1):
        times.append(time.perf_counter())
    return None if engine.is_async else float(np.diff(times).min())
