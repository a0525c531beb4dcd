"""Small changes to bytes, of the kind that break parsers."""

from __future__ import annotations

import copy
import json
import random

SIZES = (0, 1, 2, 7, 8, 127, 128, 255, 256, 65535, 1 << 31, (1 << 32) - 1, 1 << 60)
WORDS = (
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"[" * 2000,
    b"{}",
    b"../..",
    b"\0",
    b"99999",
)


# In the place of a value of JSON.
ODD = (
    *(0, -1, 1, 2, 3, 7, 64, 0.5, 1 << 15, 1 << 16, (1 << 24) - 1, 1 << 31, 1 << 63),
    *(10**300, 10**4000, 5e-324, -1e300, 1e300, float("nan"), float("inf")),
    *(None, True, False, "", "x", "\0", "..", "/dev/zero", "\ud800", "a" * 5000),
    *([], {}, [[]], [None], {"": 0}, [0] * 300, [[[[[[[[[[0]]]]]]]]]]),
)


def mutate_json(content: bytes, rng: random.Random) -> bytes | None:
    """JSON, or one of its lines, with other values in one to three places."""
    lines = content.split(b"\n") if content.count(b"\n{") else [content]
    idx = rng.randrange(len(lines))
    try:
        value = json.loads(lines[idx])
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _changed(value, rng)
    lines[idx] = json.dumps(value).encode()
    return b"\n".join(lines)


def _changed(value: object, rng: random.Random) -> object:
    if not value or not isinstance(value, dict | list) or rng.random() < 0.1:
        return copy.deepcopy(rng.choice(ODD))
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys)
    what = rng.random()
    if what < 0.1:
        del value[key]
    elif what < 0.2 and isinstance(value, list):
        value.append(value[key])
    else:
        value[key] = _changed(value[key], rng)
    return value


def mutate(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Change ``content`` in one to eight places; of JSON, half the time values."""
    if content[:1] in b"{[" and rng.random() < 0.5:
        if (changed := mutate_json(content, rng)) is not None:
            return changed
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        place = rng.randrange(len(data) + 1)
        # Headers lie at the start, an archive's list at the end.
        if rng.random() < 0.5:
            near = min(len(data), 200)
            place = rng.randrange(near + 1)
            if rng.random() < 0.3:
                place = len(data) - place
        kind = rng.randrange(8)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(data):
            data[place] = rng.randrange(256)
        elif kind == 2:
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice(SIZES) % (1 << (8 * width))
            order = rng.choice(("little", "big"))
            data[place : place + width] = value.to_bytes(width, order)
        elif kind == 3:
            del data[place:]
        elif kind == 4:
            del data[place : place + rng.randrange(1, 64)]
        elif kind == 5:
            data[place:place] = rng.choice(WORDS)
        elif kind == 6:
            end = place + rng.randrange(1, 64)
            data[place:place] = data[place:end] * rng.randrange(1, 4)
        elif others:
            other = rng.choice(others)
            cut = rng.randrange(len(other) + 1)
            data[place:] = other[cut:]
    return bytes(data)
