"""``pplex doctor``: what runs here, and how fast."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from pplex.cli.options import complete_model, json_option
from pplex.cli.tables import echo_json, table, wrapped
from pplex.units import duration, significant, size

if TYPE_CHECKING:
    from pplex.bench.doctor import Diagnosis, OnDisk


@click.command(epilog="Example: pplex doctor --json")
@json_option
@click.option(
    "--network",
    is_flag=True,
    help="Also look whether Hugging Face and a login are there.",
)
@click.option(
    "-m",
    "--model",
    "models",
    metavar="MODEL",
    multiple=True,
    shell_complete=complete_model,
    help="Look at this model only, and whether its files are those published; may be "
    "given several times.",
)
@click.pass_context
def doctor(
    ctx: click.Context, as_json: bool, network: bool, models: tuple[str, ...]
) -> None:
    """Check this machine: MLX, memory, speed, the models on disk, and what will run.

    Answers ten seconds with the built-in model, reads the headers of the files of every
    model found, and runs a part of each size to say how fast the whole will be. Ends
    with 1 if something is at fault. Nothing goes online without --network.
    """
    from dataclasses import asdict

    from pplex.bench.doctor import diagnose
    from pplex.checkpoint.download import check_network

    def looking(name: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"running {name}, or a part of it", err=True)

    found = diagnose(models, check_network if network else None, looking)
    if as_json:
        echo_json(asdict(found) | {"is_well": found.is_well})
    else:
        click.echo("\n".join(_report(found)))
    ctx.exit(0 if found.is_well else 1)


def _report(found: Diagnosis) -> list[str]:
    """The lines to print."""
    machine = found.machine
    memory = "unknown"
    if machine.memory_gb is not None:
        free = machine.free_memory_gb
        memory = f"{machine.memory_gb:.1f} GB"
        memory += "" if free is None else f", {free:.1f} GB free"
    lines = [
        f"pplex {machine.pplex}, Python {machine.python}, {machine.platform}",
        f"MLX {machine.mlx} on {machine.device}; engine {machine.engine} in "
        f"{machine.dtype}",
        f"4 and 8 bits are computed {machine.form}",
        f"{machine.cpu_cores} cores; memory {memory}, copied at "
        f"{machine.bandwidth_gb_s:.1f} GB/s",
        f"test: {found.test_run}",
    ]
    if found.network is not None:
        net = found.network
        state = "reachable" if net.reachable else "not reachable"
        login = f"logged in as {net.user}" if net.user else "no login"
        reason = f" ({net.reason})" if net.reason else ""
        lines.append(f"Hugging Face: {state}, {login}{reason}")
    heading = ("MODEL", "HERE", "NEEDS", "A MINUTE", "FACTOR", "VERDICT")
    rows = [heading, *map(_row, found.models)]
    lines += ["", table(rows, right=(2, 3, 4))]
    for model in found.models:
        for said in (*model.faults, *filter(None, [model.published])):
            lines.append(wrapped(f"{model.name}: {said}"))
    lines.append(
        "A MINUTE: what a minute of sound takes. FACTOR: that as real-time factor, 1 "
        "is\nreal time; from a short measurement, of mini measured itself."
    )
    return lines


def _row(model: OnDisk) -> tuple[str, ...]:
    from pplex.bench.estimate import live_in_words

    factor = model.real_time_factor
    if model.faults:
        verdict = "at fault"
    elif model.fits is False:
        verdict = "too little free memory"
    elif factor is None:
        verdict = "runs" if model.complete else "would run"
    else:
        verdict = live_in_words(factor)
    return (
        model.name,
        "yes" if model.complete else "no",
        size(1e9 * model.need_gb) if model.need_gb else "-",
        "-" if factor is None else duration(60 * factor),
        "-" if factor is None else significant(factor, 2),
        verdict,
    )
