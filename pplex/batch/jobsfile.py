"""Jobs files: a line of JSON or a row of CSV for each recording of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pplex.conversation.quiet import Tail
from pplex.conversation.roles import role_words
from pplex.errors import PplexError, did_you_mean
from pplex.respond.request import MOST_TAIL_S, seed_of
from pplex.values import read_rows, seconds_of, shown, text_of

COLUMNS = (
    *("input", "output", "voice", "prompt", "role", "seed", "tail"),
    *("script", "first_words", "resume", "save_state"),
)
# Settings that all recordings of a batch share: a column would do nothing.
_SHARED = ("temp", "top_k", "text_temp", "text_top_k", "greedy", "channel", "layout")
_SLIP = 0.8  # how like a column's name another must be to be taken for a slip


@dataclass(frozen=True)
class Row:
    """One recording as a jobs file has it; None for what the row leaves open.

    ``number`` is the line it ends on, ``text`` the role in words, ``resume`` the file
    of a saved conversation and ``save_state`` of the one to save, ``extra`` the other
    columns.
    """

    number: int
    input: str
    output: str | None
    voice: str | None
    text: str | None
    seed: int | None
    tail: Tail | None
    script: str | None
    first_words: str | None
    resume: str | None
    save_state: str | None
    extra: dict[str, Any]


def read_jobs(path: Path) -> list[Row]:
    """The rows of a ``.jsonl`` or ``.csv`` file, each checked."""
    rows = [
        _row(path, number, fields)
        for number, fields in read_rows(path, "jobs file", COLUMNS, as_is=("prompt",))
    ]
    if not rows:
        raise PplexError(f"the jobs file {path} names no recordings")
    return rows


def _row(path: Path, number: int, fields: dict[str, Any]) -> Row:
    where = f"{path} line {number}"
    known = {name: fields[name] for name in COLUMNS if name in fields}
    for name in set(COLUMNS) - {"seed", "tail"}:
        # An empty prompt is one; any other empty text is a slip.
        text_of(known.get(name, "text"), where, name, may_be_empty=name == "prompt")
    if "input" not in known:
        found = ", ".join(map(shown, fields)) or "nothing"
        near = [did_you_mean(str(name), ["input"]) for name in fields]
        raise PplexError(
            f"{where} has no input, the name of a recording; it has {found}"
            + next((said for said in near if said), "")
        )
    for name in fields.keys() - known.keys():
        if name in _SHARED:
            raise PplexError(
                f"{where}: {name} is no column but an option, the same for all "
                f"recordings: --{name.replace('_', '-')}"
            )
        near = get_close_matches(name, COLUMNS, 1, _SLIP)
        if near and near[0] not in known:
            raise PplexError(
                f"{where}: there is no column {shown(name)}. Did you mean {near[0]}?"
            )
    text = role_words(known.get("prompt"), known.get("role"), where)
    for name in ("voice", "prompt", "role"):
        if name in known and "resume" in known:
            raise PplexError(
                f"{where}: {name} and resume exclude each other: the conversation has "
                "its voice and role"
            )
    return Row(
        number=number,
        input=known["input"],
        output=known.get("output"),
        voice=known.get("voice"),
        text=text,
        seed=seed_of(known.get("seed"), where),
        tail=_tail(where, known.get("tail")),
        script=known.get("script"),
        first_words=known.get("first_words"),
        resume=known.get("resume"),
        save_state=known.get("save_state"),
        extra={k: v for k, v in fields.items() if k not in COLUMNS},
    )


def _tail(where: str, value: Any) -> Tail | None:
    if value is None:
        return None
    if value == "auto":
        return "auto"
    return seconds_of(value, where, "tail", MOST_TAIL_S, " or auto")
