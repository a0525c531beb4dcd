"""``pplex doctor``: what runs here, and how fast."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pplex.bench.doctor import Diagnosis


@click.command(epilog="Example: pplex doctor --json")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "--network",
    is_flag=True,
    help="Also look whether Hugging Face and a login are there.",
)
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, network: bool) -> None:
    """Check this machine: MLX, memory, speed, the models on disk, and what will run.

    Times the products that models are made of, answers two seconds with the built-in
    model, and reads the headers of the files of every model found. Ends with 1 if
    something is at fault. Nothing goes online without --network.
    """
    from pplex.backend import use_fast_blas

    blas = use_fast_blas()
    from dataclasses import asdict

    from pplex.bench.doctor import diagnose
    from pplex.checkpoint.download import check_network

    found = diagnose(blas, check_network if network else None)
    if as_json:
        content = asdict(found) | {"is_well": found.is_well}
        click.echo(json.dumps(content, indent=1, ensure_ascii=False))
    else:
        click.echo("\n".join(report(found)))
    ctx.exit(0 if found.is_well else 1)


def report(found: Diagnosis) -> list[str]:
    """The lines to print."""
    machine = found.machine
    memory = "unknown"
    if machine.memory_gb is not None:
        free = machine.free_memory_gb
        memory = f"{machine.memory_gb:.1f} GB"
        memory += "" if free is None else f", {free:.1f} GB free"
    times = ", ".join(f"{b} bits {t:.2f}" for b, t in machine.ns_per_weight.items())
    lines = [
        f"pplex {machine.pplex}, Python {machine.python}, {machine.platform}",
        f"MLX {machine.mlx} on {machine.device} in {machine.dtype}; "
        f"BLAS {machine.blas}",
        f"{machine.cpu_cores} cores; memory {memory}",
        f"products: {machine.bandwidth_gb_s:.1f} GB/s; ns a weight: {times}",
        f"test: {found.test_run}",
    ]
    if found.network is not None:
        net = found.network
        state = "reachable" if net.reachable else "not reachable"
        login = f"logged in as {net.user}" if net.user else "no login"
        reason = f" ({net.reason})" if net.reason else ""
        lines.append(f"Hugging Face: {state}, {login}{reason}")
    lines.append("")
    for model in found.models:
        voices = f", {model.num_voices} voices" if model.num_voices else ""
        lines.append(f"{model.name}{voices}: {model.verdict}")
    return lines
