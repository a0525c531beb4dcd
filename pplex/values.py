"""JSON from outside, and whether its values are of the kinds that are expected.

A form describes a value: ``str``, ``int`` (64 bits), ``bool`` or ``float`` (any finite
number); ``[form]`` for a list of them; ``{"key": form}`` for an object, whose other
keys stay as they are; ``{str: form}`` for an object of any keys; ``(form, ...)`` for
one of several; ``"text"`` for itself; None for null, which a key that is not there
becomes.
"""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any

from pplex.files import read_regular

# What JSON holds takes up to 20 times as much memory.
MAX_JSON_BYTES = 32 << 20

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


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file; OSError, ValueError or PplexError if it is none."""
    return parse_json(read_regular(path, limit))


def parse_json(content: bytes) -> Any:
    """The value that ``content``, UTF-8, stands for; ValueError where it is none."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (RecursionError, MemoryError) as e:
        raise ValueError("it is nested too deeply, or too large") from e


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
