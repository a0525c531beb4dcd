"""``pplex score``: turn-taking, and what was heard against what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from pplex.cli.ci import annotate
from pplex.cli.options import (
    FILE,
    FiniteRange,
    OneOf,
    diarization_from,
    diarization_options,
    overwrite_option,
    vad_option,
)
from pplex.cli.score_tables import against_table, score_table
from pplex.cli.tables import echo_json
from pplex.cli.transcripts import formats

if TYPE_CHECKING:
    from pplex.evaluation.find import Found
    from pplex.evaluation.measure import Method

_WORSE = "worse"


@click.command(epilog="Example: pplex score replies/ --format csv > scores.csv")
@click.argument("paths", nargs=-1, required=True, type=FILE)
@click.option(
    "--format",
    "form",
    type=OneOf(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="json has everything, with the method; csv a line per recording.",
)
@vad_option("silero")
@click.option(
    "--words",
    type=OneOf(["auto", "own", "output.json", "asr", "none"]),
    default="auto",
    show_default=True,
    help="The agent's words: the model's own text, Full-Duplex-Bench's output.json, "
    "the recogniser's. auto takes the first there is.",
)
@click.option(
    "--asr",
    metavar="NAME",
    help="Recognise the agent's sound and count word errors against its own text: "
    "pocketsphinx, onnx=FOLDER, or mlx=FOLDER.",
)
@click.option(
    "--asr-sentences",
    metavar="FILE",
    type=FILE,
    help="For pocketsphinx: what is likely to be said, a sentence a line.",
)
@click.option(
    "--transcripts",
    metavar="DIR",
    type=FILE,
    help="With --asr: write what both sides said into DIR.",
)
@click.option(
    "--transcript-format",
    "transcript_formats",
    metavar="FORMATS",
    type=formats,
    default="vtt",
    show_default=True,
    help="The formats of --transcripts, as of pplex batch --transcript.",
)
@click.option(
    "--agent-lag",
    metavar="SECONDS",
    type=FiniteRange(0.0, 10.0),
    default=0.0,
    show_default=True,
    help="Take this off the agent's times; 0.08 undoes the lag of one frame.",
)
@click.option(
    "--human-timing",
    metavar="FILE",
    type=FILE,
    help="Full-Duplex-Bench's icc_gt_distribution.json, if it is not beside the "
    "samples.",
)
@click.option(
    "--mos",
    is_flag=True,
    help="Rate the sound of the agent's speech from 1 to 5 by DNSMOS.",
)
@click.option(
    "--judge",
    metavar="MODEL",
    help="Let a language model grade what was said, from 0 to 5, by a local server of "
    "OpenAI's protocol, such as mlx_lm.server --model MODEL.",
)
@click.option(
    "--judge-url",
    metavar="URL",
    help="The judge's server.  [default: http://localhost:8080/v1]",
)
@diarization_options
@click.option(
    "--against",
    metavar="DIR",
    multiple=True,
    type=FILE,
    help="Compare PATHS (A) with DIR (B): differences with intervals and verdicts.",
)
@click.option(
    "--plot",
    metavar="FILE",
    type=FILE,
    help="With --against: draw the differences (.png, .svg, .pdf).",
)
@click.option(
    "--fail-if",
    metavar="LIMIT",
    multiple=True,
    help="Exit with 1 if so: reply_delay.median>1.2, or with --against, worse.",
)
@overwrite_option
def score(paths: tuple[Path, ...], overwrite: bool, **options: Any) -> None:
    """Score how the agent takes turns in PATHS: a batch's folder, or WAV files.

    Recordings of Full-Duplex-Bench, known by their annotations, also get its figures.
    """
    _check_usage(options)
    form, plot, against = options["form"], options["plot"], options["against"]
    fail_if = options["fail_if"]
    from pplex.evaluation.against import compare_sets, plot_differences, without_folder
    from pplex.evaluation.find import find
    from pplex.evaluation.limits import Limit
    from pplex.evaluation.measure import refuse_unreadable
    from pplex.evaluation.recognisers import make_recogniser
    from pplex.evaluation.score import as_csv
    from pplex.evaluation.score import score as score_all
    from pplex.plots import check_plot

    limits = [Limit.parse(text) for text in fail_if if text != _WORSE]
    check_plot(plot, overwrite)
    method = _method(options)
    asr = options["asr"]
    recogniser = make_recogniser(asr, options["asr_sentences"]) if asr else None
    found = [find(side) for side in (paths, against) if side]
    if asr:
        _say_without_words(found[0])
    planned = _plan(found[0], options, overwrite)
    count = sum(len(side.items) for side in found)
    with tqdm(total=count, disable=None, unit="file") as bar:
        results = [
            score_all(side, method, recogniser, lambda _: bar.update(), written)
            for side, written in zip(found, (planned, {}), strict=False)
        ]
    result = results[0][0]
    refuse_unreadable([(row["status"], row["error"]) for row in result["recordings"]])
    failures = [limit.broken(result["total"]) for limit in limits]
    if against:
        compared = compare_sets(
            *(
                without_folder(measured, side)
                for (_, measured), side in zip(results, (paths, against), strict=True)
            )
        )
        first, second = (", ".join(map(str, side)) for side in (paths, against))
        if plot is not None:
            plot_differences(plot, compared, (first, second))
        if _WORSE in fail_if:
            failures += [f"worse: {one.heading}" for one in compared.worse]
        result |= {"against": results[1][0], "comparison": compared.as_json()}
        table = against_table(compared, (first, second))
    else:
        table = score_table(result)
    if form == "json":
        echo_json(result)
    else:
        click.echo(as_csv(result) if form == "csv" else table, nl=False)
    for failure in filter(None, failures):
        click.echo(f"FAIL {failure}", err=True)
        annotate("pplex score --fail-if", failure)
    if any(failures):
        click.get_current_context().exit(1)


def _say_without_words(found: Found) -> None:
    """Say before the work of recognising what it will not tell."""
    answers = [item for item in found.items if item.agent is not None]
    without = sum(item.words is None for item in answers)
    if without:
        click.echo(
            f"{without} of {len(answers)} recordings have no JSON transcript, so --asr "
            "has nothing to count errors against: answer with --transcript json",
            err=True,
        )


def _check_usage(options: dict[str, Any]) -> None:
    """Refuse options that do not go together."""
    for option, given, needed in (
        ("--asr-sentences", options["asr_sentences"], "asr"),
        ("--transcripts", options["transcripts"], "asr"),
        ("--words asr", options["words"] == "asr", "asr"),
        ("--plot", options["plot"], "against"),
        ("--fail-if worse", _WORSE in options["fail_if"], "against"),
        ("--judge-url", options["judge_url"], "judge"),
    ):
        if given and not options[needed]:
            raise click.UsageError(f"{option} needs --{needed}")
    if options["against"] and options["form"] == "csv":
        raise click.UsageError("--against has no CSV: give --format json")


def _method(options: dict[str, Any]) -> Method:
    """How to measure, as the options say."""
    from pplex.evaluation.judge import make_judge
    from pplex.evaluation.measure import Method
    from pplex.evaluation.sound_quality import make_sound_quality

    judge = options["judge"]
    return Method(
        options["vad"],
        options["words"],
        options["agent_lag"],
        human_timing=options["human_timing"],
        diarization=diarization_from(options["rttm"], options["speaker"]),
        quality=make_sound_quality() if options["mos"] else None,
        judge=make_judge(judge, options["judge_url"]) if judge else None,
    )


def _plan(
    found: Found, options: dict[str, Any], overwrite: bool
) -> dict[str, list[Path]]:
    """Where the dialogue of each recording is written, a file a format."""
    from pplex.files import plan_files

    folder, forms = options["transcripts"], options["transcript_formats"]
    if folder is None:
        return {}
    names = [item.name for item in found.items if item.agent is not None]
    plans = [plan_files(folder, names, f".dialogue.{f}", overwrite) for f in forms]
    return {name: [plan[name] for plan in plans] for name in names}
