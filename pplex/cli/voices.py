"""``pplex voices``: the voices of a model, and one from a recording."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pplex.cli.options import (
    FILE,
    Group,
    complete_voice,
    json_option,
    model_options,
    overwrite_option,
)
from pplex.cli.options import channel as channel_type
from pplex.cli.tables import echo_json
from pplex.errors import PplexError
from pplex.files import check_named
from pplex.units import size

if TYPE_CHECKING:
    from pplex.audio.files import Channel
    from pplex.checkpoint.hub import LocalModel

SHORT_S, LONG_S = 3.0, 15.0


@click.group(cls=Group)
def voices() -> None:
    """List the voices that a model can speak with, or make one."""


@voices.command("list", epilog="Example: pplex voices list --model mini")
@model_options
def list_voices(model_name: str, offline: bool) -> None:
    """Print the names of a model's voices, one a line.

    Nothing is downloaded for this. Of a published model that is not on this machine
    the published names are printed.
    """
    from pplex.checkpoint.known import KNOWN_MODELS
    from pplex.checkpoint.reference import PUBLISHED_VOICES
    from pplex.checkpoint.voices import find_voices

    try:
        found = list(find_voices(_local(model_name).path))
    except PplexError:
        known = KNOWN_MODELS.get(model_name)
        if known is None or not known.speaks_published_voices:
            raise
        found = list(PUBLISHED_VOICES)
        click.echo(f"{model_name} is not on this machine; as published:", err=True)
    for name in found:
        click.echo(name)


def _local(model_name: str) -> LocalModel:
    """The model, which must be on this machine."""
    from pplex.checkpoint.hub import resolve

    return resolve(model_name, offline=True)


@voices.command(
    "make", epilog="Example: pplex voices make me.wav me.safetensors -m mini"
)
@click.argument("recording", metavar="IN", type=FILE)
@click.argument("output", metavar="OUT", type=FILE)
@model_options
@click.option(
    "--channel",
    metavar="N|MIX",
    type=channel_type,
    default=1,
    show_default=True,
    help="Which channel to take: a number from 1, or 'mix' for the average.",
)
@click.option("--trim", is_flag=True, help="Leave out silence at both ends.")
@overwrite_option
def make(
    recording: Path,
    output: Path,
    model_name: str,
    offline: bool,
    channel: Channel,
    trim: bool,
    overwrite: bool,
) -> None:
    """Make the voice file OUT from IN, a recording of one person speaking.

    3 to 15 seconds with little noise serve best. The sound is brought to -24 LUFS.
    OUT works with the model it was made for, at any bits, as --voice OUT. Use a voice
    only with the consent of the person it belongs to.
    """
    check_named(output, [".safetensors"], overwrite)
    from pplex.checkpoint.hub import resolve
    from pplex.conversation.prompts import write_voice
    from pplex.conversation.session import load

    local = resolve(model_name, offline=offline)
    made = write_voice(
        load(local),
        recording,
        output,
        channel=channel,
        trim=trim,
        warn=lambda warning: click.echo(warning, err=True),
    )
    click.echo(output)
    seconds = round(made.duration_s, 1)  # judged as it is shown
    click.echo(f"{seconds} s, {made.frames} frames", err=True)
    if not SHORT_S <= seconds <= LONG_S:
        click.echo(
            f"a voice of {SHORT_S:g} to {LONG_S:g} s serves best: this one may be "
            f"{'too little to go by' if seconds < SHORT_S else 'long to read'}",
            err=True,
        )


@voices.command("show", epilog="Example: pplex voices show NATF0 --model mini")
@click.argument("voice", shell_complete=complete_voice)
@model_options
@json_option
def show(voice: str, model_name: str, offline: bool, as_json: bool) -> None:
    """Print what VOICE, a name or a file, is, and whether it fits the model.

    The model must be on this machine.
    """
    found = _describe(voice, _local(model_name))
    if as_json:
        echo_json(found)
        return
    click.echo(f"{found['name']}: {found['path']}")
    click.echo(
        f"{found['duration_s']:.2f} s, {found['frames']} frames of width "
        f"{found['width']}, {found['dtype']}, {size(found['bytes'])}"
    )
    for key, value in found["notes"].items():
        click.echo(f"{key.removeprefix('pplex_')}: {value}")
    fits = "fits" if not found["doubts"] else "may not fit"
    click.echo(f"{fits} the model {model_name}")
    for doubt in found["doubts"]:
        click.echo(f"  {doubt}")


def _describe(voice: str, local: LocalModel) -> dict[str, Any]:
    from pplex.checkpoint.source import Source
    from pplex.checkpoint.verify import first_vector, voice_doubts
    from pplex.checkpoint.voices import (
        check_voice,
        find_voices,
        read_voice_file,
        voice_file,
    )

    path = voice_file(voice, find_voices(local.path))
    read = read_voice_file(path)
    config = local.folder.read_config()
    lm = config.lm
    try:
        check_voice(read, lm.dim, text_card=lm.text_card, card=lm.card)
        first = first_vector(Source(local.folder, lm))
        doubts = list(voice_doubts(read, config, first))
    except PplexError as e:
        doubts = [str(e)]
    frames = len(read.embeddings) + 1
    return {
        "name": read.name,
        "path": str(path),
        "frames": frames,
        "duration_s": frames / config.frame_rate,
        "width": read.embeddings.shape[1],
        "dtype": read.dtype,
        "bytes": path.stat().st_size,
        "notes": dict(read.notes),
        "doubts": doubts,
    }
