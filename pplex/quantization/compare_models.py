"""Compare two models on disk: their choices on forced conversations, size and speed."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from pplex.audio.files import read_pcm
from pplex.checkpoint.describe import describe
from pplex.checkpoint.hub import LocalModel
from pplex.conversation.prompts import make_role
from pplex.conversation.session import Model, load
from pplex.engine.device import device_name
from pplex.errors import PplexError
from pplex.model.config import ModelConfig
from pplex.model.sampling import GREEDY, SamplingConfig
from pplex.quantization.compare import (
    DEPTH_FRAMES,
    StreamFigures,
    Tally,
    compare_by_depth,
    keep_logits,
    mean_kl,
)
from pplex.quantization.forced import Script, write_script
from pplex.quantization.replies import count_right, read_questions

SILENCE_S = 10.0
_TIMED_FRAMES = 50


@dataclass(frozen=True)
class Settings:
    """What A is asked: ``seconds`` of each recording, in a voice and a role."""

    voice: str | None
    text: str | None
    seed: int
    seconds: float
    sampling: SamplingConfig


@dataclass(frozen=True)
class ModelFigures:
    """Size and speed of one model; bytes of the language model."""

    name: str
    layout: str
    bits: tuple[int, ...]
    lm_bytes: int
    bytes_per_frame: int
    ms_per_frame: float


@dataclass(frozen=True)
class DepthFigures:
    """Conversations from ``start_s`` seconds on: text, then the mean of codebooks."""

    start_s: float
    frames: int
    mean_kl: float
    text: StreamFigures
    agent: StreamFigures


@dataclass(frozen=True)
class Replies:
    """How many replies were asked for, and how many A and B gave."""

    asked: int
    right_a: int
    right_b: int


@dataclass(frozen=True)
class Comparison:
    """The figures of ``pplex models compare``; ``streams`` are B's against A's.

    ``depths`` are those of each half minute of the conversations; ``replies`` those of
    recordings whose answer is known.
    """

    a: ModelFigures
    b: ModelFigures
    recordings: list[str]
    frames: int
    seed: int
    device: str
    mean_kl: float
    streams: list[StreamFigures]
    depths: list[DepthFigures]
    replies: Replies | None


def compare_models(
    a: LocalModel,
    b: LocalModel,
    recordings: Sequence[Path],
    settings: Settings,
    kv_bits: int | None = None,
    replies: Path | None = None,
) -> Comparison:
    """Let A answer the recordings, force both through what came of it.

    Both are asked what the table ``replies`` has, whose recordings they are where no
    others are given; without any the user is silent for ten seconds. Only one model is
    in memory at a time. B keeps keys and values in ``kv_bits``.
    """
    model = load(a)
    config = model.config
    questions = read_questions(replies, config.sample_rate) if replies else None
    if questions and not recordings:
        recordings = list(dict.fromkeys(one.path for one in questions.users))
    users = read_users(recordings, config, settings.seconds)
    scripts = make_scripts(model, users, settings)
    kept = [keep_logits(model.engine, script) for script in scripts]
    figures_a = _figures(model, a, users[0], settings)
    right_a = count_right(model, questions) if questions else 0
    del model
    gc.collect()
    mx.clear_cache()
    model = load(b, kv_bits=kv_bits)
    _check_alike(config, model.config, b)
    tallies = compare_by_depth(kept, model.engine, scripts, settings.sampling)
    streams = sum(tallies, Tally(settings.sampling)).figures()
    depth_s = DEPTH_FRAMES / config.frame_rate
    right = None
    if questions:
        right_b = count_right(model, questions)
        right = Replies(len(questions.replies), right_a, right_b)
    return Comparison(
        a=figures_a,
        b=_figures(model, b, users[0], settings),
        recordings=[str(path) for path in recordings],
        frames=sum(script.num_frames for script in scripts),
        seed=settings.seed,
        device=device_name().partition(" ")[0],
        mean_kl=mean_kl(streams),
        streams=streams,
        depths=[_depth(idx * depth_s, tally) for idx, tally in enumerate(tallies)],
        replies=right,
    )


def _depth(start_s: float, tally: Tally) -> DepthFigures:
    streams = tally.figures()
    agent = [
        (s.kl, s.top1, s.differ, math.log(s.perplexity_a), math.log(s.perplexity_b))
        for s in streams[1:]
    ]
    kl, top1, differ, nll_a, nll_b = (float(mean) for mean in np.mean(agent, axis=0))
    mean = StreamFigures("agent", kl, top1, differ, math.exp(nll_a), math.exp(nll_b))
    return DepthFigures(start_s, tally.num_frames, mean_kl(streams), streams[0], mean)


def read_users(
    recordings: Sequence[Path], config: ModelConfig, seconds: float
) -> list[np.ndarray]:
    """PCM (samples,) of the users, at most ``seconds`` of each; silence without any."""
    rate = config.sample_rate
    if not recordings:
        return [np.zeros(round(min(SILENCE_S, seconds) * rate), np.float32)]
    limit = round(seconds * rate)
    return [read_pcm(path, sample_rate=rate).pcm[:limit] for path in recordings]


def make_scripts(
    model: Model, users: Sequence[np.ndarray], settings: Settings
) -> list[Script]:
    """What ``model`` makes of each user."""
    role = make_role(model, settings.voice, settings.text)
    return [
        write_script(model.engine, role.prompt, pcm, settings.sampling, settings.seed)[
            0
        ]
        for pcm in users
    ]


def _check_alike(a: ModelConfig, b: ModelConfig, where: LocalModel) -> None:
    """Refuse models that do not read the same tokens."""
    for what, of_a, of_b in (
        ("text tokens", a.lm.text_card, b.lm.text_card),
        ("audio tokens", a.lm.card, b.lm.card),
        ("audio streams", a.lm.n_q, b.lm.n_q),
        ("delays", a.lm.delays, b.lm.delays),
    ):
        if of_a != of_b:
            raise PplexError(
                f"{where.path}: {of_b} {what}, the first model has {of_a}; only models "
                "that read the same tokens can be compared"
            )


def _figures(
    model: Model, local: LocalModel, pcm: np.ndarray, settings: Settings
) -> ModelFigures:
    info = describe(local)
    prompt = make_role(model, settings.voice, "")
    short = pcm[: _TIMED_FRAMES * model.config.frame_size]
    _, seconds = write_script(model.engine, prompt.prompt, short, GREEDY, 0)
    return ModelFigures(
        name=local.name,
        layout=info.layout,
        bits=model.bits,
        lm_bytes=info.lm_bytes,
        bytes_per_frame=info.bytes_per_frame,
        ms_per_frame=1000 * float(np.median(seconds[1:] or seconds)),
    )
