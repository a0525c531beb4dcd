"""What this machine can do with a published model, said before its download."""

from __future__ import annotations

import click

from pplex.checkpoint.known import AUTO_MODEL, KNOWN_MODELS
from pplex.errors import PplexError


def foresee(name: str, kv_bits: int | None = None, *, quiet: bool = False) -> None:
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
    from pplex.engine.device import available_gb, memory_gb

    need_gb, room_gb = published_need_gb(name, kv_bits), available_gb()
    if need_gb is not None and room_gb is not None and need_gb > room_gb:
        total_gb = memory_gb()[0] or room_gb
        takes = f"{name} takes {need_gb:.1f} GB of memory and this machine has"
        if need_gb > total_gb:
            raise PplexError(f"{takes} {total_gb:.1f} GB: {_what_fits()}")
        click.echo(
            f"warning: {takes} {room_gb:.1f} GB of {total_gb:.1f} for it, so that it "
            f"would wait for what is swapped: {_what_fits()}",
            err=True,
        )
    factor = None if quiet else estimate_published(name)
    if factor is not None:
        click.echo(
            f"{name} will be downloaded, {known.download_gb:.1f} GB; this machine "
            f"takes {minute_in_words(factor)}",
            err=True,
        )


def _what_fits() -> str:
    """What this machine can hold, and how fast that would be."""
    from pplex.bench.estimate import best_model

    best = best_model(offline=False)
    if best.name == "mini":
        return "`pplex models list` shows what fits; --model mini runs anywhere"
    return f"--model {best.name} fits and takes {best.takes}"


def chosen_model(ctx: click.Context, param: click.Parameter, name: str) -> str:
    """The model that was named, or of ``auto`` the best here, which is said."""
    if name != AUTO_MODEL or ctx.resilient_parsing:
        return name
    from pplex.bench.estimate import best_model

    known = ctx.params  # of options that are eager
    best = best_model(offline=known.get("offline", False), kv_bits=known.get("kv_bits"))
    reasons = "".join(f"; {reason}" for reason in best.passed)
    click.echo(f"--model auto is {best.name}: {best.takes}{reasons}", err=True)
    return best.name
