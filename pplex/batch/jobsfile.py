"""Jobs files: a line of JSON or a row of CSV for each recording of a batch."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pplex.conversation.quiet import Tail
from pplex.conversation.roles import ROLES
from pplex.errors import PplexError, did_you_mean
from pplex.files import open_regular, reading
from pplex.values import parse_json, shown

COLUMNS = ("input", "output", "voice", "prompt", "role", "seed", "tail")
# Settings that all recordings of a batch share: a column would do nothing.
_SHARED = ("temp", "top_k", "text_temp", "text_top_k", "greedy", "channel", "layout")
_SLIP = 0.8  # how like a column's name another must be to be taken for a slip
MAX_SEED = 2**63 - 1
MAX_TAIL_S = 3600.0
_BLANKS_AROUND = {"input", "output", "voice", "role", "seed", "tail"}  # say nothing
_MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class Row:
    """One recording as a jobs file has it; None for what the row leaves open.

    ``number`` is the line it ends on, ``text`` the role in words, ``extra`` the other
    columns.
    """

    number: int
    input: str
    output: str | None
    voice: str | None
    text: str | None
    seed: int | None
    tail: Tail | None
    extra: dict[str, Any]


def read_jobs(path: Path) -> list[Row]:
    """The rows of a ``.jsonl`` or ``.csv`` file, each checked."""
    kinds = {".jsonl": _json_lines, ".csv": _csv_rows}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise PplexError(f"{path}: a jobs file ends in .jsonl or .csv")
    with reading(f"the jobs file {path}", "is not such a file in UTF-8"):
        rows = [_row(path, number, fields) for number, fields in kind(path)]
    if not rows:
        raise PplexError(f"the jobs file {path} names no recordings")
    return rows


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_regular(path, _MAX_BYTES) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = parse_json(line)
            except ValueError as e:
                raise PplexError(f"{path} line {number} is not JSON: {e}") from e
            if not isinstance(fields, dict):
                raise PplexError(
                    f'{path} line {number} is no object: write {{"input": "a.wav"}}'
                )
            yield number, {k: v for k, v in fields.items() if v is not None}


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with (
        open_regular(path, _MAX_BYTES) as raw,
        io.TextIOWrapper(raw, "utf-8-sig", newline="") as file,
    ):
        first = file.readline()
        # Where a comma is the decimal sign, spreadsheets write semicolons.
        comma = ";" if ";" in first and "," not in first else ","
        names = next(csv.reader([first], delimiter=comma, strict=True), [])
        columns = [_column(name) for name in names]
        twice = {name for name in columns if columns.count(name) > 1}
        if twice:
            raise PplexError(f"{path} has two columns {min(twice)}; leave one out")
        reader = csv.DictReader(file, columns, delimiter=comma, strict=True)
        for fields in reader:
            line = reader.line_num + 1  # the names were read before
            if None in fields or None in fields.values():
                raise PplexError(
                    f"{path} line {line} has not as many columns as the first line has "
                    "names"
                )
            for name in _BLANKS_AROUND & fields.keys():
                fields[name] = fields[name].strip()
            yield line, {k: v for k, v in fields.items() if v != ""}


def _column(name: str) -> str:
    """A column's name as it is known: without blanks around it, in small letters."""
    plain = name.strip()
    return plain.lower() if plain.lower() in COLUMNS else plain


def _row(path: Path, number: int, fields: dict[str, Any]) -> Row:
    where = f"{path} line {number}"
    known = {name: fields[name] for name in COLUMNS if name in fields}
    for name in ("input", "output", "voice", "prompt", "role"):
        value = known.get(name, "text")
        said = f"{where}: {name} is {shown(value)}"
        # An empty prompt is one; any other empty text is a slip.
        if not isinstance(value, str) or (not value and name != "prompt"):
            raise PplexError(
                f"{where}: {name} is {shown(value)}, where text is expected"
            )
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise PplexError(f"{said}, which is not text")
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
    if "prompt" in known and "role" in known:
        raise PplexError(f"{where}: prompt and role exclude each other")
    text = known.get("prompt")
    if "role" in known:
        if known["role"] not in ROLES:
            raise PplexError(
                f"{where}: there is no role {shown(known['role'])}; give one of "
                f"{', '.join(ROLES)}, or the words as prompt"
            )
        text = ROLES[known["role"]]
    return Row(
        number=number,
        input=known["input"],
        output=known.get("output"),
        voice=known.get("voice"),
        text=text,
        seed=_seed(where, known.get("seed")),
        tail=_tail(where, known.get("tail")),
        extra={k: v for k, v in fields.items() if k not in COLUMNS},
    )


def _seed(where: str, value: Any) -> int | None:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise PplexError(
            f"{where}: seed is {shown(value)}, where a whole number is expected"
        )
    if not 0 <= value <= MAX_SEED:
        raise PplexError(
            f"{where}: seed is {shown(value)}, where 0 to 2**63 - 1 is expected"
        )
    return value


def _tail(where: str, value: Any) -> Tail | None:
    if value is None:
        return None
    if value == "auto":
        return "auto"
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0.0 <= seconds <= MAX_TAIL_S:
        raise PplexError(
            f"{where}: tail is {shown(value)}, where 0 to {MAX_TAIL_S:.0f} seconds or "
            "auto are expected"
        )
    return seconds
