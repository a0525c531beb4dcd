"""``pplex score``: turn-taking, and what was heard against what was meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from pplex.cli.options import FiniteRange

if TYPE_CHECKING:
    from pplex.evaluation.asr import Recogniser

_FILE = click.Path(path_type=Path)


@click.command(epilog="Example: pplex score replies/ --format csv > scores.csv")
@click.argument("paths", nargs=-1, required=True, type=_FILE)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="json has everything, with the method; csv a line per recording.",
)
@click.option(
    "--vad",
    type=click.Choice(["silero", "energy"]),
    default="silero",
    show_default=True,
    help="What finds speech: a small network, or loudness alone.",
)
@click.option(
    "--words",
    type=click.Choice(["auto", "own", "output.json", "asr", "none"]),
    default="auto",
    show_default=True,
    help="The agent's words: the model's own text, Full-Duplex-Bench's output.json, "
    "the recogniser's. auto takes the first there is.",
)
@click.option(
    "--asr",
    metavar="NAME",
    help="Recognise the agent's sound and count word errors against its own text: "
    "pocketsphinx, or parakeet=FOLDER.",
)
@click.option(
    "--asr-sentences",
    metavar="FILE",
    type=_FILE,
    help="For pocketsphinx: what is likely to be said, a sentence a line.",
)
@click.option(
    "--transcripts",
    metavar="DIR",
    type=_FILE,
    help="With --asr: write what both sides said into DIR.",
)
@click.option(
    "--transcript-format",
    type=click.Choice(["json", "srt", "vtt", "txt"]),
    default="vtt",
    show_default=True,
    help="The format of --transcripts.",
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
    type=_FILE,
    help="Full-Duplex-Bench's icc_gt_distribution.json, if it is not beside the "
    "samples.",
)
@click.option("--overwrite", is_flag=True, help="Replace existing transcripts.")
def score(
    paths: tuple[Path, ...],
    form: str,
    vad: str,
    words: str,
    asr: str | None,
    asr_sentences: Path | None,
    transcripts: Path | None,
    transcript_format: str,
    agent_lag: float,
    human_timing: Path | None,
    overwrite: bool,
) -> None:
    """Score how the agent takes turns in PATHS: a batch's folder, or WAV files.

    Recordings of Full-Duplex-Bench, known by their annotations, also get its figures.
    """
    for option, given in (
        ("--asr-sentences", asr_sentences),
        ("--transcripts", transcripts),
        ("--words asr", words == "asr"),
    ):
        if given and asr is None:
            raise click.UsageError(f"{option} needs --asr")
    from pplex.evaluation.asr import make_recogniser
    from pplex.evaluation.find import find
    from pplex.evaluation.score import Method, as_csv, as_table
    from pplex.evaluation.score import score as score_all
    from pplex.files import plan_files

    method = Method(vad, words, agent_lag, human_timing=human_timing)
    recogniser: Recogniser | None = make_recogniser(asr, asr_sentences) if asr else None
    found = find(paths)
    planned: dict[str, Path] = {}
    if transcripts is not None:
        names = [item.name for item in found.items if item.agent is not None]
        ending = f".dialogue.{transcript_format}"
        planned = plan_files(transcripts, names, ending, overwrite)
    with tqdm(total=len(found.items), disable=None, unit="file") as bar:
        result = score_all(found, method, recogniser, lambda _: bar.update(), planned)
    if form == "json":
        click.echo(json.dumps(result, ensure_ascii=False, indent=1))
    else:
        click.echo(as_csv(result) if form == "csv" else as_table(result), nl=False)
