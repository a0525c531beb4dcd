"""Seeds that follow from a run's and from a name, never from what is done beside it."""

from __future__ import annotations

import hashlib

from pplex.files import composed


def number_of(*parts: object) -> int:
    """A number below 2**32 that follows from ``parts`` alone.

    Small enough that no JSON reader rounds it. Names are taken in one Unicode form, so
    that they count the same on every file system.
    """
    text = composed("\0".join(str(part) for part in parts))
    data = text.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "big")


def seed_for(seed: int, identity: str) -> int:
    """The seed of the recording ``identity`` in a run that was given ``seed``."""
    return number_of("seed", seed, identity)
