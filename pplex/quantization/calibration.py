"""Conversations that a model has with recordings, kept as tokens for a conversion."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pplex.audio.files import Samples
from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.safetensors import TensorSpec, load_tensors, write_tensors
from pplex.conversation import tracks
from pplex.conversation.prompts import Role, make_role
from pplex.conversation.roles import ROLES
from pplex.conversation.scheduler import converse_many
from pplex.conversation.session import load
from pplex.engine.choose import batch_size
from pplex.errors import PplexError
from pplex.files import check_new_folder, new_folder, reading
from pplex.model.config import LmConfig
from pplex.model.sampling import SamplingConfig
from pplex.quantization.compare_models import read_users
from pplex.quantization.forced import script_of
from pplex.values import fit, read_json

TOKENS, RECORD = "tokens.safetensors", "calibration.json"
_NOTHING = np.zeros((0, 0), np.float32)


@dataclass(frozen=True)
class Settings:
    """How recordings are answered for a calibration.

    ``voices`` and ``texts`` are drawn from, those of the model and the published roles
    where there are none; ``seconds`` of each recording are used, and the recordings
    again and again until there are ``minutes``.
    """

    voices: Sequence[str]
    texts: Sequence[str]
    seed: int
    seconds: float
    minutes: float


@dataclass(frozen=True)
class Conversation:
    """The columns (streams, positions) of a prompt and what followed it.

    ``embeddings`` (positions, dim) replace the first where the voice is a saved one;
    the last ``frames`` are the conversation.
    """

    columns: np.ndarray
    embeddings: np.ndarray
    frames: int


def calibrate(
    local: LocalModel, recordings: Sequence[Path], target: Path, settings: Settings
) -> Iterator[float]:
    """Answer recordings and keep the tokens in the new folder ``target``.

    Yields how many more seconds there are. Voices, roles and seeds differ from answer
    to answer; as many are made at a time as is quick.
    """
    check_new_folder(target)
    model = load(local)
    config, engine = model.config, model.engine
    users = read_users(recordings, config, settings.seconds)
    for path, user in zip(recordings, users, strict=True):
        if len(user) <= 2 * config.frame_size:
            raise PplexError(f"{path} is under two frames long")
    voices: list[str | None] = [*settings.voices] or [*model.voices] or [None]
    texts: list[str | None] = [*settings.texts] or [*ROLES.values()]
    if config.lm.is_moshi:
        voices, texts = [None], [None]
    random = np.random.default_rng(settings.seed)
    roles: list[Role] = []

    def asked() -> Iterator[tracks.Conversation]:
        left = 60 * settings.minutes
        while left > 0:
            idx, user = len(roles), users[len(roles) % len(users)]
            voice = voices[random.integers(len(voices))]
            role = make_role(model, voice, texts[random.integers(len(texts))])
            roles.append(role)
            start, seed = engine.prefill(role.prompt), settings.seed + idx
            yield tracks.Conversation(str(idx), Samples(user), start, seed)
            left -= len(user) / config.sample_rate

    longest = -(-max(len(user) for user in users) // config.frame_size)
    rows = batch_size(config, engine.cost(), longest)
    answered: dict[int, tuple[np.ndarray, int]] = {}
    with new_folder(target) as new:
        for one, answer in converse_many(
            engine, asked(), SamplingConfig(), batch_size=rows
        ):
            prompt = roles[int(one.key)].prompt
            said = np.concatenate([answer.text[None], answer.agent])
            columns = script_of(config.lm, prompt, said, answer.user).columns
            grid = np.concatenate([prompt.columns, columns], axis=1)
            answered[int(one.key)] = grid, columns.shape[1]
            yield columns.shape[1] / config.frame_rate
        specs: list[TensorSpec] = []
        arrays: list[np.ndarray] = []
        lines: list[dict[str, object]] = []
        for idx, role in enumerate(roles):
            grid, frames = answered[idx]
            embeddings = role.prompt.embeddings
            arrays += [
                np.ascontiguousarray(grid, np.int32).view(np.uint32),
                _NOTHING if embeddings is None else embeddings.astype(np.float32),
            ]
            for part, dtype in (("columns", "U32"), ("embeddings", "F32")):
                shape = arrays[len(specs)].shape
                specs.append(TensorSpec(f"{idx}.{part}", dtype, shape))
            lines.append(
                {
                    "recording": str(recordings[idx % len(users)]),
                    "voice": role.voice,
                    "prompt": role.text,
                    "seed": settings.seed + idx,
                    "frames": frames,
                }
            )
        write_tensors(new / TOKENS, specs, arrays)
        record = {"model": local.name, "revision": local.revision, "answers": lines}
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (new / RECORD).write_text(text, encoding="utf-8")


def read_calibration(folder: Path, config: LmConfig) -> list[Conversation]:
    """The conversations in a folder of ``calibrate``, for a model of these sizes."""
    path = folder / RECORD
    with reading(f"--calibration {path}", "is not from `pplex models calibrate`"):
        found = fit(read_json(path, 1 << 26), {"answers": [{"frames": int}]})
    arrays = load_tensors(folder / TOKENS)
    conversations = []
    for idx, answer in enumerate(found["answers"]):
        parts = [arrays.get(f"{idx}.{part}") for part in ("columns", "embeddings")]
        columns, embeddings = (_NOTHING if p is None else np.array(p) for p in parts)
        columns = columns.view(np.int32) if columns.dtype == np.uint32 else columns
        largest = np.array([config.text_card] + [config.card] * config.n_q)[:, None]
        if (
            columns.ndim != 2
            or len(columns) != config.num_streams
            or not 2 < answer["frames"] + 1 < columns.shape[1]
            or (columns > largest).any()
            or (embeddings.size and embeddings.shape[1] != config.dim)
        ):
            raise PplexError(
                f"--calibration {folder}: answer {idx} does not fit this model; make "
                "it with `pplex models calibrate` on the same one"
            )
        conversations.append(Conversation(columns, embeddings, answer["frames"]))
    if not conversations:
        raise PplexError(f"--calibration {folder} has no answers")
    return conversations
