"""Small changes to bytes, of the kind that break parsers."""

from __future__ import annotations

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


def mutate(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Change ``content`` in one to eight places."""
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
