"""What this machine can do with a published model, said before its download."""

from __future__ import annotations

import click

from pplex.checkpoint.known import KNOWN_MODELS
from pplex.errors import PplexError


def foresee(name: str, *, quiet: bool = False) -> None:
    """Say how fast a published model that is not on this machine will be.

    PplexError where the memory does not suffice for it.
    """
    from pplex.checkpoint.hub_cache import cached_snapshot

    known = KNOWN_MODELS.get(name)
    if known is None or known.repo is None or cached_snapshot(known.repo, None):
        return
    from pplex.bench.estimate import (
        estimate_published,
        minute_in_words,
        published_need_gb,
    )

    need_gb, memory_gb = published_need_gb(name), machine_memory_gb()
    if need_gb is not None and memory_gb is not None and need_gb > memory_gb:
        raise PplexError(
            f"{name} takes {need_gb:.0f} GB of memory and this machine has "
            f"{memory_gb:.0f} GB: `pplex models list` shows what fits; --model mini "
            "runs anywhere"
        )
    factor = None if quiet else estimate_published(name)
    if factor is not None:
        click.echo(
            f"{name} will be downloaded, {known.download_gb:.1f} GB; this machine "
            f"takes {minute_in_words(factor)}",
            err=True,
        )


def machine_memory_gb() -> float | None:
    """Memory that a model can have here in GB, where the system tells."""
    from pplex.engine.device import memory_gb

    total, free = memory_gb()
    return total if free is None else free
