"""``pplex models info`` and ``verify``: what a model is made of, and whether whole."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from pplex.cli.options import complete_model
from pplex.cli.progress import size
from pplex.cli.tables import echo_json, echo_table
from pplex.errors import PplexError

if TYPE_CHECKING:
    from pplex.checkpoint.describe import ModelInfo

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command(epilog="Example: pplex models info mini --bandwidth 400")
@click.argument("model", shell_complete=complete_model)
@click.option(
    "--bandwidth",
    metavar="GB/S",
    type=click.FloatRange(min=0, min_open=True),
    help="The machine's memory bandwidth, for the least time of a frame.",
)
@_JSON
def info(model: str, bandwidth: float | None, as_json: bool) -> None:
    """Print what MODEL, which must be on this machine, is made of.

    A frame of 80 ms reads every weight it needs once, so memory bandwidth bounds the
    speed: with --bandwidth, the least time of a frame is shown, and that time over
    80 ms, which is the least real-time factor.
    """
    from pplex.checkpoint.describe import describe
    from pplex.checkpoint.hub import resolve

    found = describe(resolve(model, offline=True))
    if as_json:
        speed = {}
        if bandwidth:
            speed = {
                "least_frame_ms": found.least_frame_ms(bandwidth),
                "least_frame_ms_full": found.least_frame_ms(bandwidth, found.context),
            }
        memory = {"memory_bytes": found.memory_bytes}
        echo_json(asdict(found) | memory | speed)
        return
    for line in _lines(found, bandwidth):
        click.echo(line)
    rows = [("PART", "BITS/GROUP", "TYPE", "MATRICES", "PARAMETERS", "SIZE")]
    for part in found.parts:
        rows.append(
            (
                part.part,
                part.form,
                part.dtype,
                str(part.matrices),
                f"{part.parameters:,}",
                size(part.bytes / 1e9),
            )
        )
    click.echo()
    echo_table(rows, right=(3, 4, 5))


def _lines(found: ModelInfo, bandwidth: float | None) -> list[str]:
    where = f", {found.repo} at {found.revision}" if found.repo else ""
    per_frame = found.bytes_per_frame + found.codec_bytes_per_frame
    lines = [
        f"{found.name}: {found.path}{where}",
        f"layout {found.layout}, {found.depformer_steps} depformer steps, "
        f"{found.parameters:,} parameters",
        f"language model {size(found.lm_bytes / 1e9)}, codec "
        f"{size(found.codec_bytes / 1e9)}; in memory, with {found.context} frames "
        f"remembered, {size(found.memory_bytes / 1e9)}",
        f"a frame reads {size(per_frame / 1e9)} of weights, and "
        f"{found.kv_bytes_per_frame:,} bytes for each frame remembered",
        f"voices: {', '.join(found.voices) or 'none'}",
    ]
    if found.licence:
        lines.append(f"licence of the weights: {found.licence}")
    if bandwidth:
        budget = 1000 / found.frame_rate
        for count, when in ((0, "at first"), (found.context, "with a full memory")):
            ms = found.least_frame_ms(bandwidth, count)
            lines.append(
                f"at {bandwidth:g} GB/s a frame takes at least {ms:.2f} ms {when}: "
                f"real-time factor {ms / budget:.3f}"
            )
    return lines


@click.command(epilog="Example: pplex models verify mini")
@click.argument("model", shell_complete=complete_model)
@click.option(
    "--sums",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A list of SHA-256, as sha256sum writes it, instead of the model's own.",
)
@click.option(
    "--numbers",
    is_flag=True,
    help="Also load it and compare with another project's published values (7B).",
)
@_JSON
@click.option("-q", "--quiet", is_flag=True, help="Print faults and warnings only.")
def verify(
    model: str, sums: Path | None, numbers: bool, as_json: bool, quiet: bool
) -> None:
    """Check every file of MODEL, which must be on this machine.

    Names, shapes, types and values of all tensors; codec, tokenizer, voices; and the
    SHA-256 of every file where a list of them is at hand: SHA256SUMS in the folder, or
    the names in the Hugging Face cache. Exits with 1 if a fault is found.
    """
    from pplex.checkpoint.hub import locate
    from pplex.checkpoint.verify import verify as check

    local = locate(model)
    with tqdm(unit="B", unit_scale=True, disable=quiet or None, leave=False) as bar:
        findings = list(check(local, sums, bar.update))
    if numbers:
        from pplex.quantization.numbers import check_numbers

        findings += check_numbers(local)
    if as_json:
        echo_json([asdict(finding) for finding in findings])
    for finding in () if as_json else findings:
        if not quiet or finding.level in ("fault", "warning"):
            click.echo(f"{finding.level:7}  {finding.what}: {finding.text}")
    faults = [finding for finding in findings if finding.level == "fault"]
    if faults:
        raise PplexError(
            f"{local.path} has {len(faults)} fault{'s' * (len(faults) > 1)}, the first "
            f"in {faults[0].what}; get it again"
        )
