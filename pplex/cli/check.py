"""``pplex check``: does an output hold what a script expects of it?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pplex.cli.ci import annotate_checks, write_junit
from pplex.cli.options import FILE, FiniteRange, json_option, regex
from pplex.cli.tables import echo_json


@click.command(
    epilog="Example: pplex check reply.wav --not-silent --no-clipping --max-rtf 1"
)
@click.argument("outputs", metavar="OUT.wav...", nargs=-1, required=True, type=FILE)
@click.option(
    "--stats",
    metavar="FILE",
    type=FILE,
    help="The stats of the run.  [default: those beside the output]",
)
@click.option("--not-silent", is_flag=True, help="The agent makes a sound.")
@click.option(
    "--no-clipping", is_flag=True, help="The agent's sound never stays at full scale."
)
@click.option(
    "--max-rtf",
    metavar="X",
    type=FiniteRange(0.0),
    help="The real-time factor is at most X.",
)
@click.option(
    "--length-of",
    metavar="IN.wav",
    type=FILE,
    help="The output is as long as this recording, and the tail if there was one.",
)
@click.option(
    "--max-late-frames",
    metavar="P",
    type=FiniteRange(0.0, 100.0),
    help="At most P percent of the steps took over 80 ms.",
)
@click.option(
    "--says",
    metavar="REGEX",
    type=regex,
    help="The transcript matches; capitals do not matter.",
)
@json_option
@click.option(
    "--junit",
    metavar="FILE",
    type=FILE,
    help="Also write the checks as a JUnit file, which CI servers show.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing FILE of --junit.")
def check(
    outputs: tuple[Path, ...],
    stats: Path | None,
    as_json: bool,
    junit: Path | None,
    overwrite: bool,
    **asked: Any,
) -> None:
    """Check outputs, a line a check; exit with 0 if all pass and 1 if one fails.

    Stats and the transcript (JSON) are looked for beside OUT.wav.
    """
    if stats is not None and len(outputs) > 1:
        raise click.UsageError("--stats is of one output, and several are given")
    from dataclasses import asdict

    from pplex.evaluation.checks import Checks, passed, run_checks

    checked = {one: run_checks(one, Checks(**asked), stats) for one in outputs}
    if as_json:
        content = [
            {
                "file": str(output),
                "passed": passed(outcomes),
                "checks": [asdict(outcome) for outcome in outcomes],
            }
            for output, outcomes in checked.items()
        ]
        echo_json(content if len(content) > 1 else content[0])
    else:
        for output, outcomes in checked.items():
            of = f"{output}: " if len(checked) > 1 else ""
            for outcome in outcomes:
                verdict = "ok  " if outcome.passed else "FAIL"
                click.echo(f"{verdict} {of}{outcome.check}: {outcome.detail}")
    for output, outcomes in checked.items():
        annotate_checks(output, outcomes)
    if junit is not None:
        write_junit(junit, checked, overwrite)
    if not all(map(passed, checked.values())):
        click.get_current_context().exit(1)
