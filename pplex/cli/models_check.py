"""``pplex models info`` and ``verify``: what a model is made of, and whether whole."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from pplex.cli.options import FILE, FiniteRange, complete_model, json_option
from pplex.cli.tables import echo_json, echo_table, wrapped
from pplex.errors import PplexError
from pplex.units import count, counted, percent, significant, size

if TYPE_CHECKING:
    from pplex.checkpoint.describe import ModelInfo
    from pplex.checkpoint.hub import LocalModel
    from pplex.checkpoint.verify import Finding


@click.command(epilog="Example: pplex models info mini --bandwidth 400")
@click.argument("model", shell_complete=complete_model)
@click.option(
    "--bandwidth",
    metavar="GB/S",
    type=FiniteRange(min=0, min_open=True),
    help="The machine's memory bandwidth, for the least time of a frame.",
)
@json_option
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
    titles = ("PART", "BITS", "TYPE", "MATRICES", "PARAMETERS", "SIZE", "SHARE")
    rows = [
        (
            *(part.part, part.form, part.dtype, str(part.matrices)),
            *(count(part.parameters), size(part.bytes)),
            percent(part.bytes / max(1, found.lm_bytes)),
        )
        for part in sorted(found.parts, key=lambda part: -part.bytes)
    ]
    click.echo()
    echo_table([titles, *rows], right=(3, 4, 5, 6))


def _lines(found: ModelInfo, bandwidth: float | None) -> list[str]:
    where = f", {found.repo} at {found.revision}" if found.repo else ""
    per_frame = found.bytes_per_frame + found.codec_bytes_per_frame
    lines = [
        f"{found.name}: {found.path}{where}",
        f"layout {found.layout}, {found.depformer_steps} depformer steps, "
        f"{count(found.parameters)} parameters",
        f"language model {size(found.lm_bytes)}, codec {size(found.codec_bytes)}",
        f"in memory {size(found.memory_bytes)}, with {found.context} frames remembered",
        f"a frame reads {size(per_frame)} of weights, and "
        f"{size(found.kv_bytes_per_frame)} for each frame remembered",
        wrapped(f"voices: {', '.join(found.voices) or 'none'}"),
    ]
    if found.licence:
        lines.append(f"licence of the weights: {found.licence}")
    if bandwidth:
        budget = 1000 / found.frame_rate
        for kept, when in ((0, "at first"), (found.context, "in the end")):
            ms = found.least_frame_ms(bandwidth, kept)
            lines.append(
                f"at {bandwidth:g} GB/s a frame takes at least {significant(ms)} ms "
                f"{when}: real-time factor {significant(ms / budget, 2)}"
            )
    return lines


@click.command(epilog="Example: pplex models verify mini --numbers")
@click.argument("model", shell_complete=complete_model)
@click.option(
    "--sums",
    metavar="FILE",
    type=FILE,
    help="A list of SHA-256, as sha256sum writes it, instead of the model's own.",
)
@click.option(
    "--numbers",
    is_flag=True,
    help="Also run it, and compare it with PersonaPlex 7B as published.",
)
@click.option(
    "--input",
    "recording",
    metavar="WAV",
    type=FILE,
    help="With --numbers: a recording whose beginning is answered greedily, twice.",
)
@click.option(
    "--record",
    metavar="FILE",
    type=FILE,
    help="Write what this machine computed as JSON, to share. Implies --numbers.",
)
@click.option(
    "--against",
    metavar="FILE",
    type=FILE,
    help="Compare with such a file of another machine; MODEL may be one too.",
)
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print faults and warnings only.")
def verify(
    model: str,
    sums: Path | None,
    numbers: bool,
    recording: Path | None,
    record: Path | None,
    against: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check every file of MODEL, which must be on this machine.

    Names, shapes, types and values of all tensors; codec, tokenizer, voices; and the
    SHA-256 of every file where a list of them is at hand: SHA256SUMS in the folder, or
    the names in the Hugging Face cache. Exits with 1 if a fault is found.

    With --numbers also whether it is PersonaPlex as published, by a table of hashes,
    ids and figures, and whether this machine runs it right.
    """
    from pplex.checkpoint.hub import locate
    from pplex.checkpoint.verify import verify as check

    numbers = numbers or record is not None or against is not None
    if recording is not None and not numbers:
        raise click.UsageError("--input is read with --numbers only")
    if record is not None and record.is_file():
        raise PplexError(f"{record} exists already; choose another name for --record")
    if record is not None and not record.parent.is_dir():
        raise PplexError(f"--record {record}: there is no folder {record.parent}")
    if against is not None and model.endswith(".json") and Path(model).is_file():
        if record is not None or recording is not None:
            raise click.UsageError("a record computes nothing: MODEL must be a model")
        _report(model, _records(Path(model), against), as_json, quiet)
        return
    local = locate(model)
    with tqdm(unit="B", unit_scale=True, disable=quiet or None, leave=False) as bar:
        findings = list(check(local, sums, bar.update))
    if numbers:
        findings += _numbers(local, findings, recording, record, against)
    _report(str(local.path), findings, as_json, quiet)


def _numbers(
    local: LocalModel,
    findings: list[Finding],
    recording: Path | None,
    record: Path | None,
    against: Path | None,
) -> list[Finding]:
    """Run the model and hold it against what is known; writes ``record``."""
    from pplex.checkpoint.verify import Finding
    from pplex.quantization.numbers import verify_numbers
    from pplex.quantization.record import read_record, write_record

    if any(finding.level == "fault" for finding in findings):
        if record is not None:
            raise PplexError(
                f"{local.path} is at fault, so nothing is recorded; `pplex models "
                f"verify {local.name}` says what is wrong"
            )
        text = "not looked at while files are at fault"
        return [Finding("note", "numbers", text)]
    other = None if against is None else read_record(against)
    measured, found = verify_numbers(
        local,
        recording,
        other,
        _looking,
        hashing=record is not None or other is not None,
    )
    if record is not None:
        write_record(record, measured)
    return found


def _looking(what: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"looking at {what}", err=True)


def _records(ours: Path, other: Path) -> list[Finding]:
    from pplex.quantization.numbers import compare_records
    from pplex.quantization.record import read_record

    return list(compare_records(read_record(ours), read_record(other), None))


def _report(where: str, findings: list[Finding], as_json: bool, quiet: bool) -> None:
    """Print findings; a PplexError if one is a fault."""
    if as_json:
        echo_json([asdict(finding) for finding in findings])
    for finding in () if as_json else findings:
        if not quiet or finding.level in ("fault", "warning"):
            click.echo(f"{finding.level:7}  {finding.what}: {finding.text}")
    faults = [finding for finding in findings if finding.level == "fault"]
    if faults:
        raise PplexError(
            f"{where} has {counted(len(faults), 'fault')}, the first "
            f"in {faults[0].what}; get it again"
        )
