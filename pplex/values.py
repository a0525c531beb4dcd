"""JSON and tables from outside, and whether their values are what is expected.

A form describes a value: ``str``, ``int`` (64 bits), ``bool`` or ``float`` (any finite
number); ``[form]`` for a list of them; ``{"key": form}`` for an object, whose other
keys stay as they are; ``{str: form}`` for an object of any keys; ``(form, ...)`` for
one of several; ``"text"`` for itself; None for null, which a key that is not there
becomes.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from pplex.errors import PplexError
from pplex.files import open_regular, read_regular, reading

# What JSON holds takes up to 20 times as much memory.
_MAX_JSON_BYTES = 32 << 20
_MAX_TABLE_BYTES = 1 << 28

_INT_LIMIT = 1 << 63
_NAMES: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    bool: "true or false",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def read_json(path: Path, limit: int = _MAX_JSON_BYTES) -> Any:
    """The content of a JSON file; OSError, ValueError or PplexError if it is none."""
    return parse_json(read_regular(path, limit))


def parse_json(
    content: bytes, make: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """The value that ``content``, UTF-8, stands for; ValueError where it is none.

    ``make`` makes an object of its keys and values.
    """
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=make)
    except (RecursionError, MemoryError) as e:
        raise ValueError("it is nested too deeply, or too large") from e


def read_rows(
    path: Path, what: str, columns: Sequence[str], *, as_is: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a ``.jsonl`` or ``.csv`` file, each with the line it ends on.

    ``what`` it is called is for messages. Of a CSV's known ``columns``, but for those
    ``as_is``, blanks around a value say nothing. What is left open is not there.
    """
    kinds = {".jsonl": _json_lines, ".csv": _csv_rows}
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise PplexError(f"{path}: a {what} ends in .jsonl or .csv")
    with reading(f"the {what} {path}", "is not such a file in UTF-8"):
        rows = list(kind(path, columns, as_is))
    return iter(rows)


def text_of(value: Any, where: str, name: str, *, may_be_empty: bool = False) -> str:
    """The text ``value`` of the column ``name``, if it is one."""
    if not isinstance(value, str) or not (value or may_be_empty):
        raise PplexError(f"{where}: {name} is {shown(value)}, where text is expected")
    if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise PplexError(f"{where}: {name} is {shown(value)}, which is not text")
    return value


def seconds_of(
    value: Any, where: str, name: str, most: float, others: str = ""
) -> float:
    """The seconds ``value`` of the column ``name``, 0 to ``most``.

    What else may stand there, ``others``, is for the message. A comma is the decimal
    sign where it can be nothing else: before three digits it is none.
    """
    if isinstance(value, str) and re.fullmatch(r"\d+,\d\d?", value):
        value = value.replace(",", ".")
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0.0 <= seconds <= most:
        raise PplexError(
            f"{where}: {name} is {shown(value)}, where 0 to {most:.0f} "
            f"seconds{others} are expected"
        )
    return seconds


def _json_lines(
    path: Path, columns: Sequence[str], _: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_regular(path, _MAX_TABLE_BYTES) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = parse_json(line, _with_each_key_once)
                # Others write it again: within more, and as JSON, which has no NaN.
                json.dumps(reduce(lambda v, _: [v], range(99), fields), allow_nan=False)
            except (ValueError, RecursionError) as e:
                raise PplexError(f"{path} line {number} is not JSON: {e}") from e
            if not isinstance(fields, dict):
                raise PplexError(
                    f'{path} line {number} is no object: write {{"{columns[0]}": ...}}'
                )
            yield number, {k: v for k, v in fields.items() if v is not None}


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return fields


def _csv_rows(
    path: Path, columns: Sequence[str], as_is: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    with (
        open_regular(path, _MAX_TABLE_BYTES) as raw,
        io.TextIOWrapper(raw, "utf-8-sig", newline="") as file,
    ):
        lines = enumerate(file, 1)
        start, first = next((one for one in lines if one[1].strip()), (1, ""))
        # Where a comma is the decimal sign, spreadsheets write semicolons.
        comma = next((mark for mark in ",;\t" if mark in first), ",")
        names = next(csv.reader([first], delimiter=comma, strict=True), [])
        # A known column is known with blanks around its name, and in capitals.
        plain = [name.strip() or f"column {i}" for i, name in enumerate(names, 1)]
        known = [name.lower() if name.lower() in columns else name for name in plain]
        if twice := {name for name in known if known.count(name) > 1}:
            raise PplexError(f"{path} has two columns {min(twice)}; leave one out")
        reader = csv.DictReader(file, known, delimiter=comma, strict=True)
        for fields in reader:
            line = reader.line_num + start  # the names were read before
            if None in fields or None in fields.values():
                raise PplexError(
                    f"{path} line {line} has not as many columns as the first line has "
                    "names"
                )
            for name in fields.keys() & (set(columns) - set(as_is)):
                fields[name] = fields[name].strip()
            yield line, {k: v for k, v in fields.items() if v != ""}


def fit(value: Any, form: Any, place: str = "") -> Any:
    """``value``, if it is as ``form`` says; else a ValueError that names the place."""
    if isinstance(form, tuple):
        for one in form[:-1]:
            try:
                return fit(value, one, place)
            except ValueError:
                continue
        if form[-1] is None and value is not None:  # the one before says more
            return fit(value, form[-2], place)
        return fit(value, form[-1], place)
    if isinstance(form, list) and isinstance(value, list):
        return [fit(item, form[0], f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(form, dict) and isinstance(value, dict):
        if str in form:
            return {k: fit(v, form[str], _at(place, k)) for k, v in value.items()}
        found = {k: fit(value.get(k), f, _at(place, k)) for k, f in form.items()}
        return value | found
    if form is float and type(value) in (int, float):
        if abs(value) < _INT_LIMIT or isinstance(value, float) and math.isfinite(value):
            return value
    elif form is int and type(value) is int:
        if abs(value) < _INT_LIMIT:
            return value
    elif isinstance(form, type) and type(value) is form:
        return value
    elif value == form and type(value) is type(form):
        return value
    kind = form if isinstance(form, type) else type(form)
    expected = repr(form) if isinstance(form, str) else _NAMES[kind]
    what = f"`{place[:80]}`" if place else "it"
    raise ValueError(f"{what} is {shown(value)}, where {expected} is expected")


def shown(value: Any) -> str:
    """A value from outside as a sentence takes it: not too long."""
    return reprlib.repr(value)


def _at(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key
