"""``pplex respond``: one recording."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pplex.cli.foresee import foresee
from pplex.cli.options import (
    FILE,
    FiniteRange,
    OneOf,
    WholeRange,
    check_option,
    checks_from,
    compute_options,
    conversation_options,
    layout_option,
    model_options,
    overwrite_option,
    role_text,
    settings_from,
    takes_option,
    verbosity_options,
)
from pplex.cli.progress import Progress
from pplex.cli.transcripts import cue_from, subtitle_options, transcript_paths
from pplex.files import PIPE, is_descriptor
from pplex.respond.stopping import Stop
from pplex.units import size

if TYPE_CHECKING:
    from pplex.respond.request import Request
    from pplex.respond.stats import Stats


_SECTIONS = {
    "Output": (
        *("output", "layout", "transcripts", "line_width", "cue_lines"),
        *("stats", "tokens", "save_state", "overwrite"),
    ),
    "Model": ("model_name", "offline", "compute", "kv_bits"),
    "Conversation": (
        "start",
        "duration",
        "voice",
        "prompt",
        "prompt_file",
        "role",
        "channel",
        "tail",
        "script",
        "first_words",
        "resume",
        "takes",
    ),
    "Sampling": ("seed", "greedy", "temp", "top_k", "text_temp", "text_top_k"),
    "Streams": ("raw", "rate", "live"),
    "Reporting": (),  # and whatever else there is
}


class _Sectioned(click.Command):
    """A command whose help has its many options in sections."""

    def format_options(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        """Write the options section by section."""
        params = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        titles = {name: title for title, names in _SECTIONS.items() for name in names}
        for title in _SECTIONS:
            own = [p for p in params if titles.get(p.name or "", "Reporting") == title]
            rows = [p.get_help_record(ctx) for p in own]
            with formatter.section(title):
                formatter.write_dl([row for row in rows if row is not None])


@click.command(
    cls=_Sectioned,
    epilog="Example: pplex respond call.wav -o reply.wav --model mini --role teacher",
)
@click.argument("inputs", metavar="INPUT", nargs=-1, required=True, type=FILE)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    type=FILE,
    help="The file to write: WAV, or by its suffix .flac, .mp3, .ogg, .opus; - for WAV "
    "on stdout.  [default: INPUT.reply.wav, beside it]",
)
@layout_option
@click.option(
    "--raw",
    type=OneOf(["s16le", "f32le"]),
    help="INPUT is - and has bare mono samples of this kind; give --rate as well.",
)
@click.option(
    "--rate",
    metavar="HZ",
    type=WholeRange(1000, 768_000),
    help="Samples a second of --raw.",
)
@click.option(
    "--live",
    is_flag=True,
    help="INPUT is - and a microphone: leave out what comes before the model is ready, "
    "and let replies go to a player as soon as they are made.",
)
@click.option(
    "--start",
    metavar="SECONDS",
    type=FiniteRange(0.0),
    default=0.0,
    show_default=True,
    help="Answer INPUT from there on.",
)
@click.option(
    "--duration",
    metavar="SECONDS",
    type=FiniteRange(0.0, min_open=True),
    help="Answer so much of INPUT.  [default: to its end]",
)
@model_options
@conversation_options
@compute_options
@click.option(
    "--transcript",
    "transcripts",
    metavar="FILE|FORMATS",
    multiple=True,
    type=FILE,
    help="Write what the agent said, with times: .json, .srt, .vtt, .tsv or .txt; - "
    "prints the words. Formats such as json,srt, or all, are written beside OUT. May "
    "be given several times.",
)
@subtitle_options
@click.option(
    "--stats",
    metavar="FILE",
    type=FILE,
    help="Write timings and settings as JSON; - prints them.",
)
@click.option(
    "--tokens",
    metavar="FILE",
    type=FILE,
    help="Write the token arrays user, agent and text as .npz.",
)
@click.option(
    "--save-state",
    metavar="FILE",
    type=FILE,
    help="Write what --resume goes on from, as .safetensors.",
)
@click.option(
    "--resume",
    metavar="FILE",
    type=FILE,
    help="Go on where --save-state saved a conversation, with its voice, role, seed "
    "and sampling; options of these two count.",
)
@takes_option
@click.option(
    "--captions",
    is_flag=True,
    help="Show the agent's words as they are said; so does -v.",
)
@check_option
@overwrite_option
@verbosity_options
@click.pass_context
def respond(ctx: click.Context, verbosity: int, **options: Any) -> None:
    """Let the agent answer the recording INPUT and write both sides to a WAV file.

    The agent hears the recording as it would a call, 80 ms at a time, and speaks when
    it sees fit; its track is as long as the recording and in time with it.

    INPUT - is a live stream on stdin, WAV or bare samples: each frame is answered and
    written as soon as it has come. Ctrl-C ends it and leaves what there is.
    """
    text = role_text(options)
    if options["resume"] is not None:
        _take_from_state(ctx, options)
    source = _one_of(options["inputs"])
    options["output"] = options["output"] or _beside(source)
    is_stream, takes = source == PIPE, options["takes"]
    _check_usage(options, is_stream)
    from pplex.audio.streams import StreamFormat
    from pplex.respond import run
    from pplex.respond.live import respond_stream
    from pplex.respond.takes import respond_takes

    request = _request(source, text, options)
    raw, rate = options["raw"], options["rate"]
    plain = "model_name", "offline", "overwrite", "compute", "kv_bits", "live"
    config = run.Config(
        **{name: options[name] for name in plain},
        check=checks_from(options["checks"]),
        raw=StreamFormat(raw, rate, channels=1) if raw else None,
    )
    stop = ctx.ensure_object(Stop)
    # A name that is wrong is answered at once: nothing will be downloaded for it.
    if not config.offline and (is_stream or source.exists()):
        foresee(config.model_name, config.kv_bits, quiet=verbosity < 0)
    progress = Progress(verbosity, options["channel"] is not None, options["captions"])
    with closing(progress):
        progress.waiting(config.model_name)
        if takes is not None:
            every = respond_takes(request, takes, config, progress, stop)
        else:
            answer = respond_stream if is_stream else run.respond
            every = [answer(request, config, progress, stop)]
    if verbosity >= 0:
        lines = [line for done in every for line in _summary(done)]
        lines += progress.said_lines()
        if stop.signum is None:  # else it was cut off as it was asked to be
            from pplex.respond.ending import Ending, advice

            lines += advice([Ending(done.words, done.cut_off) for done in every])
        for line in lines:
            click.echo(line, err=True)
    stop.check()
    if not progress.all_passed:
        ctx.exit(1)


def _request(source: Path, text: str | None, options: dict[str, Any]) -> Request:
    """The recording, how it is answered with the role ``text``, and the outputs."""
    from pplex.audio.files import Part
    from pplex.respond.request import Outputs, Request

    paths = transcript_paths(options["transcripts"], options["output"])
    outputs = Outputs(
        options["output"],
        options["layout"],
        paths,
        options["stats"],
        options["tokens"],
        cue_from(
            options["line_width"],
            options["cue_lines"],
            [path.suffix.lower().removeprefix(".") for path in paths],
        ),
        options["save_state"],
    )
    part = Part(options["start"], options["duration"]) if _is_part(options) else None
    settings = settings_from(text, options)
    settings = replace(settings, resume=options["resume"], part=part)
    return Request(source, outputs, settings)


def _is_part(options: dict[str, Any]) -> bool:
    return options["start"] > 0.0 or options["duration"] is not None


def _take_from_state(ctx: click.Context, options: dict[str, Any]) -> None:
    """Let a saved conversation decide what no option does."""
    from pplex.conversation.state import read_notes

    names = [n for n in ("voice", "prompt", "prompt_file", "role") if options[n]]
    if names:
        raise click.UsageError(
            f"--{names[0].replace('_', '-')} and --resume exclude each other: the "
            "conversation has its voice and role"
        )
    notes = read_notes(options["resume"])
    sampling = "seed", "temp", "top_k", "text_temp", "text_top_k"
    for option, value in (
        ("model_name", notes.name),
        *((name, getattr(notes, name)) for name in sampling),
    ):
        if ctx.get_parameter_source(option) == click.core.ParameterSource.DEFAULT:
            options[option] = value


def _one_of(inputs: Sequence[Path]) -> Path:
    """The recording; more than one are a batch's."""
    if len(inputs) > 1:
        raise click.UsageError(
            f"respond answers one recording, and {len(inputs)} are given; pplex batch "
            "answers many: pplex batch FILES -o FOLDER"
        )
    return inputs[0]


def _beside(source: Path) -> Path:
    """Where the answer to a file goes if no place is named."""
    if source == PIPE or is_descriptor(source):
        raise click.UsageError("a stream has no name: say with -o where it goes")
    return source.parent / f"{source.stem}.reply.wav"  # a folder may have no name


def _check_usage(given: dict[str, Any], is_stream: bool) -> None:
    """Refuse options that do not go together."""
    raw, checks, output = given["raw"], given["checks"], given["output"]
    is_part = _is_part(given)
    by_length = any(name == "length-of" for name, _ in checks)
    for is_wrong, why in (
        ((raw is None) != (given["rate"] is None), "--raw and --rate go together"),
        (raw and not is_stream, "--raw is for a stream: give - as INPUT"),
        (
            is_stream and sys.stdin.isatty(),
            "stdin is a terminal: pipe a recording into it",
        ),
        (
            given["live"] and not is_stream,
            "--live is for a microphone: give - as INPUT",
        ),
        (
            checks and is_descriptor(output),
            "--check reads the output again: give -o a file",
        ),
        (is_stream and by_length, "--check length-of needs a recording, not a stream"),
        (
            is_stream and given["takes"] is not None,
            "--takes answers a recording, not a stream",
        ),
        (is_stream and is_part, "--start and --duration are for a file, not a stream"),
        (is_part and by_length, "--check length-of is about the whole of INPUT"),
    ):
        if is_wrong:
            raise click.UsageError(why)


def _summary(stats: Stats) -> list[str]:
    """What a run wrote and how long it took, in a few lines."""
    step = stats.step_ms
    voice = f"voice {stats.voice}, " if stats.voice else ""
    lines = [
        f"{', '.join(stats.outputs.values())}: {stats.audio_s:.1f} s, "
        f"{voice}seed {stats.seed}",
        f"{stats.total_s:.1f} s in all, {stats.load_s:.1f} s of it loading; real-time "
        f"factor {stats.real_time_factor:.2f} without that; step p50 {step.p50:.1f} "
        f"ms, p95 {step.p95:.1f} ms; {size(1e9 * stats.peak_memory_gb)}",
    ]
    latency, with_step = stats.latency_ms, stats.latency_with_step_ms
    if latency is not None and with_step is not None:
        lines.append(
            f"latency from a frame's last sample to its reply p50 {latency.p50:.1f} "
            f"ms, p95 {latency.p95:.1f} ms, max {latency.max:.0f} ms, with the step "
            f"that is made before {with_step.p50:.1f}, {with_step.p95:.1f}, "
            f"{with_step.max:.0f}; {latency.late_frames} late frames, "
            f"{stats.start_up_frames} at start-up"
        )
    if (state := stats.outputs.get("state")) is not None:
        from pplex.conversation.state import read_notes

        saved_s, saved = read_notes(Path(state)).duration_s, Path(state).stat().st_size
        lines.append(f"{state}: {saved_s:.1f} s of conversation, {size(saved)}")
    return lines
