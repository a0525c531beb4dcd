"""Right replies: recordings whose answer is known, asked of a model.

A table has a row for each reply: the recording, the agent's voice and role, and what it
is to say, among other words; where that is left open it is to say nothing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pplex.audio.files import Samples, read_pcm
from pplex.conversation import tracks
from pplex.conversation.prompts import KEPT_ROLES, make_role
from pplex.conversation.roles import role_words
from pplex.conversation.scheduler import converse_many
from pplex.conversation.session import Model
from pplex.engine.base import Start
from pplex.engine.choose import batch_size
from pplex.errors import PplexError
from pplex.model.config import NUM_SPECIAL
from pplex.model.sampling import GREEDY
from pplex.values import read_rows, text_of

_COLUMNS = ("input", "voice", "prompt", "role", "reply")


@dataclass(frozen=True)
class Asked:
    """A recording, and the voice and the role that answer it."""

    path: Path
    voice: str | None
    text: str | None


@dataclass(frozen=True)
class Questions:
    """The ``users`` (samples,) of what is asked, and each reply that is right."""

    users: dict[Asked, np.ndarray]
    replies: list[tuple[Asked, str]]


def read_questions(path: Path, sample_rate: int) -> Questions:
    """The rows of a ``.jsonl`` or ``.csv`` file, and the recordings beside it."""
    found = Questions({}, [])
    for number, fields in read_rows(path, "table", _COLUMNS, as_is=("prompt",)):
        where = f"{path} line {number}"
        known = {
            name: text_of(fields[name], where, name, may_be_empty=name == "prompt")
            for name in _COLUMNS
            if name in fields
        }
        if "input" not in known:
            raise PplexError(f"{where} has no input, the name of a recording")
        text = role_words(known.get("prompt"), known.get("role"), where)
        asked = Asked(path.parent / known["input"], known.get("voice"), text)
        if asked not in found.users:
            found.users[asked] = read_pcm(asked.path, sample_rate=sample_rate).pcm
        found.replies.append((asked, known.get("reply", "")))
    if not any(reply for _, reply in found.replies):
        raise PplexError(
            f"{path} has no replies: write input,reply in its first line, and below a "
            "recording and what is to be said to it"
        )
    return found


def count_right(model: Model, questions: Questions) -> int:
    """How many of the replies ``model`` gives, greedily."""
    engine, users = model.engine, questions.users
    asked = list(users)

    @functools.lru_cache(KEPT_ROLES)
    def start_of(voice: str | None, text: str | None) -> Start:
        return engine.prefill(make_role(model, voice, text).prompt)

    def conversations() -> Iterator[tracks.Conversation]:
        for idx, one in enumerate(asked):
            start, sound = start_of(one.voice, one.text), Samples(users[one])
            yield tracks.Conversation(str(idx), sound, start, 0, until_quiet=True)

    longest = max(len(user) for user in users.values())
    frames = -(-longest // model.config.frame_size)
    rows = batch_size(model.config, engine.cost(), frames)
    said = {}
    for one, answer in converse_many(engine, conversations(), GREEDY, batch_size=rows):
        ids = [int(idx) for idx in answer.text if idx >= NUM_SPECIAL]
        pieces = map(model.tokenizer.piece, ids)
        said[asked[int(one.key)]] = _plain("".join(pieces))
    return sum(_is_right(said[one], reply) for one, reply in questions.replies)


def _plain(text: str) -> str:
    """Its words in lower case, a blank around each."""
    return " ".join(["", *re.findall(r"\w+", text.casefold()), ""])


def _is_right(said: str, reply: str) -> bool:
    wanted = _plain(reply)
    return wanted in said if wanted.strip() else not said.strip()
