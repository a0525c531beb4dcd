"""Options that more than one command has, and how they become settings."""

from __future__ import annotations

import functools
import math
import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.shell_completion import CompletionItem

from pplex.checkpoint.known import AUTO_MODEL, DEFAULT_MODEL, KNOWN_MODELS
from pplex.cli.foresee import chosen_model
from pplex.conversation.roles import DEFAULT_ROLE, DEFAULT_SEED, ROLES
from pplex.errors import PplexError, did_you_mean
from pplex.files import reading
from pplex.model.config import TEMP, TEXT_TEMP, TEXT_TOP_K, TOP_K
from pplex.respond.request import MAX_SEED, MOST_TAIL_S, Layout

if TYPE_CHECKING:
    from pplex.evaluation.checks import Checks
    from pplex.evaluation.diarization import Diarization
    from pplex.model.sampling import SamplingConfig
    from pplex.respond.request import Settings


Command = Callable[..., Any]


def complete_model(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Known models for the shell to offer, and otherwise files."""
    names = [name for name in KNOWN_MODELS if name.startswith(incomplete)]
    return [CompletionItem(name) for name in names] or _files(incomplete)


def complete_voice(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Voices of the model, if it is on this machine, and otherwise files."""
    from pplex.checkpoint.hub import resolve
    from pplex.checkpoint.voices import find_voices

    try:
        local = resolve(ctx.params.get("model_name") or DEFAULT_MODEL, offline=True)
        found = find_voices(local.path)
    except PplexError:
        found = {}
    names = [name for name in found if name.startswith(incomplete)]
    return [CompletionItem(name) for name in names] or _files(incomplete)


def _files(incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="file")]


class Group(click.Group):
    """A group whose help has the whole first sentence of each command's."""

    def format_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        """List the commands."""
        rows = [
            (name, self.commands[name].get_short_help_str(limit=1000))
            for name in self.list_commands(ctx)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class OneOf(click.Choice):
    """One of some words; a word that is nearly one of them is asked back."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Turn the option's text into its value."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as e:
            words = [str(choice) for choice in self.choices]
            near = did_you_mean(str(value), words)
            self.fail(e.message.removesuffix(".") + near, param, ctx)


class _File(click.Path):
    """A file or folder, as a ``Path``; no name at all is not the current folder."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        """Turn the option's text into its value."""
        if value == "":
            self.fail("the name of a file or folder is empty", param, ctx)
        if re.match(r"https?://", str(value)):
            self.fail(f"{value} is on the network: download it first", param, ctx)
        return super().convert(value, param, ctx)


class _NewModel(_File):
    """The folder of a model that is made; no name by which another is meant."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        """Turn the argument's text into its value."""
        names = *KNOWN_MODELS, AUTO_MODEL
        if value in names:
            self.fail(
                f"by {value} pplex means a model that it knows; for a folder of that "
                f"name write ./{value}",
                param,
                ctx,
            )
        path = super().convert(value, param, ctx)
        # It is printed, to be given to others.
        return path.absolute() if str(path) in names else path


FILE = _File(path_type=Path)
NEW_MODEL = _NewModel(path_type=Path)
FOLDER = _File(path_type=Path, file_okay=False)


class FiniteRange(click.FloatRange):
    """A range of numbers that are finite."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Turn the option's text into its value."""
        try:
            number = super().convert(value, param, ctx)
        except click.BadParameter:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{value!r} is not {_in_words('a number', self)}", param, ctx)
        return number


class WholeRange(click.IntRange):
    """A range of whole numbers."""

    name = "whole number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """Turn the option's text into its value."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            said = _in_words("a whole number", self)
            self.fail(f"{value!r} is not {said}", param, ctx)


def _in_words(what: str, bounds: click.IntRange | click.FloatRange) -> str:
    low, high = f"{bounds.min or 0:g}", bounds.max
    above = f"{what} above {low}" if bounds.min_open else f"{what} from {low}"
    if high is None:
        return above if bounds.min_open else f"{above} on"
    upto = ", at most" if bounds.min_open else " to"
    return f"{above}{upto} {int(high) if high == int(high) else high}"


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in their order in the help."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def kv_bits_option(text: str) -> Callable[[Command], Command]:
    """``--kv-bits``; its help says what that does."""
    return click.option(
        "--kv-bits",
        type=OneOf(["8"]),
        callback=lambda ctx, param, value: value and int(value),
        is_eager=True,
        help=text,
    )


def replies_option(does: str) -> Callable[[Command], Command]:
    """``--replies``; its help begins with what it ``does``."""
    return click.option(
        "--replies",
        metavar="TABLE",
        type=FILE,
        help=f"{does} are right: TABLE (.csv, .jsonl) has input, reply, and if need be "
        "voice, prompt or role.",
    )


# What values of options stand for that click has no type of.


def _number_or(
    word: str, meaning: Callable[[], Any], numbers: click.ParamType, said: str
) -> Callable[[Any], Any]:
    """A number, which ``said`` describes, or ``word``."""

    def convert(value: Any) -> Any:
        if value == word:
            return meaning()
        try:
            return numbers.convert(value, None, None)
        except click.BadParameter as e:
            text = f"{value!r} is neither {said} nor {word!r}"
            raise click.BadParameter(text) from e

    return convert


channel = _number_or("mix", lambda: "mix", click.IntRange(1), "a channel number from 1")
_seed = _number_or(
    "random",
    lambda: secrets.randbelow(1 << 31),
    click.IntRange(0, MAX_SEED),
    "a whole number from 0 to 2**63 - 1",
)
_tail = _number_or(
    "auto",
    lambda: "auto",
    FiniteRange(0.0, MOST_TAIL_S),
    f"seconds from 0 to {MOST_TAIL_S:.0f}",
)
_batch_size = _number_or(
    "auto", lambda: None, click.IntRange(1, 4096), "a number from 1 to 4096"
)


def regex(value: str) -> str:
    """A regular expression."""
    try:
        re.compile(value)
    except re.error as e:
        said = f"{value!r} is no regular expression: {e}"
        raise click.BadParameter(said) from e
    return value


# The checks of `pplex check` by name, and whether they take a number or a text.
_CHECKS: dict[str, type | None] = {
    "not-silent": None,
    "no-clipping": None,
    "length-of": None,
    "max-rtf": float,
    "max-late-frames": float,
    "says": str,
}


def _check(value: str) -> tuple[str, Any]:
    """A check's name, and its value where it takes one."""
    name, sign, text = value.partition("=")
    if name not in _CHECKS:
        known = ", ".join(_CHECKS)
        text = f"{name!r} is no check; there are {known}"
        raise click.BadParameter(text + did_you_mean(name, _CHECKS))
    kind = _CHECKS[name]
    if kind is None and sign:
        raise click.BadParameter(f"{name} takes no value")
    if kind is not None and not text:
        raise click.BadParameter(f"{name} needs a value: {name}=...")
    if kind is float:
        most = 100.0 if name == "max-late-frames" else None
        return name, FiniteRange(0.0, most).convert(text, None, None)
    return name, regex(text) if kind is str else True


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
offline_option = click.option(
    "--offline", is_flag=True, is_eager=True, help="Never use the network."
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace existing outputs."
)
quiet_option = click.option(
    "-q", "--quiet", is_flag=True, help="Say nothing but errors."
)


def vad_option(default: str) -> Callable[[Command], Command]:
    """``--vad``."""
    return click.option(
        "--vad",
        type=OneOf(["silero", "energy"]),
        default=default,
        show_default=True,
        help="What finds speech: a small network, slow and good with noise, or "
        "loudness alone.",
    )


diarization_options = together(
    click.option(
        "--rttm",
        metavar="FILE",
        multiple=True,
        type=FILE,
        help="Take the user's speech from a diarization: RTTM files or folders.",
    ),
    click.option(
        "--speaker",
        metavar="NAME",
        help="The user's name in the RTTM files.  [default: every speaker]",
    ),
)
model_options = together(
    click.option(
        "-m",
        "--model",
        "model_name",
        envvar="PPLEX_MODEL",
        default=DEFAULT_MODEL,
        show_default=True,
        show_envvar=True,
        metavar="MODEL",
        shell_complete=complete_model,
        callback=chosen_model,
        help="8bit, 4bit, bf16, mini, auto for the best that fits and keeps up, a "
        "folder or file, or owner/name[@revision].",
    ),
    offline_option,
)
check_option = click.option(
    "--check",
    "checks",
    type=_check,
    metavar="NAME[=VALUE]",
    multiple=True,
    help="Check the output as `pplex check` does, and exit with 1 if it fails: "
    "not-silent, no-clipping, length-of (the input), max-rtf=X, "
    "max-late-frames=P, says=REGEX. May be given several times.",
)
layout_option = click.option(
    "--layout",
    type=OneOf(get_args(Layout)),
    default="stereo",
    show_default=True,
    help="stereo: user left, agent right; agent: mono; separate: NAME.user.wav and "
    "NAME.agent.wav.",
)
takes_option = click.option(
    "--takes",
    metavar="N",
    type=WholeRange(1, 1000),
    help="Answer N times, with the seeds that follow from --seed, into NAME.1.wav "
    "to NAME.N.wav: the recording is heard and the prompt read once for all.",
)
compute_options = together(
    click.option(
        "--compute",
        type=OneOf(["auto", "quantized", "dense", "alone"]),
        default="auto",
        show_default=True,
        help="Multiply quantized weights as they are, or written out, which takes more "
        "memory; or, on a GPU, compute each conversation alone. auto takes what is "
        "faster here, and -v says what it took.",
    ),
    kv_bits_option(
        "Keep keys and values at 8 bits: a long conversation takes half as much "
        "memory, on a CPU a quarter, and goes almost the same way."
    ),
)


def _drawing(
    prefix: str, tokens: str, *, temp: float, top_k: int
) -> Callable[[Command], Command]:
    """How ``tokens`` of a kind are drawn."""
    return together(
        click.option(
            f"--{prefix}temp",
            metavar="X",
            type=FiniteRange(0.0, 100.0),
            default=temp,
            show_default=True,
            help=f"Temperature of the {tokens} tokens; 0 is greedy.",
        ),
        click.option(
            f"--{prefix}top-k",
            metavar="K",
            type=WholeRange(0),
            default=top_k,
            show_default=True,
            help=f"Draw {tokens} tokens from the K likeliest; 0 keeps all.",
        ),
    )


def _seed_option(text: str) -> Callable[[Command], Command]:
    return click.option(
        "--seed",
        metavar="N|random",
        type=_seed,
        default=DEFAULT_SEED,
        show_default=True,
        help=text,
    )


sampling_options = together(
    _seed_option(
        "The same seed gives the same answer on the same machine; random draws one, "
        "and the summary says which."
    ),
    click.option("--greedy", is_flag=True, help="Take the likeliest token every time."),
    _drawing("", "audio", temp=TEMP, top_k=TOP_K),
    _drawing("text-", "text", temp=TEXT_TEMP, top_k=TEXT_TOP_K),
)
# Of commands that learn something of a model from what it answers.
study_options = together(
    _seed_option("For the random draws."),
    click.option(
        "--seconds",
        type=FiniteRange(min=0.2),
        default=60.0,
        show_default=True,
        help="How much of each recording to use.",
    ),
    offline_option,
)
# Everything that decides the answer, apart from the model and the recording.
conversation_options = together(
    click.option(
        "--voice",
        metavar="NAME|FILE",
        shell_complete=complete_voice,
        help="The agent's voice: a name of `pplex voices list`, or a .pt, "
        ".safetensors or audio file.  [default: NATF2, or the model's first]",
    ),
    click.option(
        "--prompt", metavar="TEXT", help="The agent's role in words; '' for none."
    ),
    click.option(
        "--prompt-file",
        metavar="FILE",
        type=FILE,
        help="Read the role from a UTF-8 text file.",
    ),
    click.option(
        "--role",
        type=OneOf(list(ROLES)),
        help=f"A published role prompt.  [default: {DEFAULT_ROLE}]",
    ),
    click.option(
        "--channel",
        metavar="N|mix",
        type=channel,
        default=None,
        help="Which channel is the user: a number from 1, or mix for the "
        "average.  [default: 1]",
    ),
    click.option(
        "--tail",
        type=_tail,
        default=0.0,
        show_default=True,
        metavar="SECONDS|auto",
        help="Silence after the user, for the agent to finish in; auto: until "
        "it has been quiet for 1.5 s, at most 30 s.",
    ),
    click.option(
        "--script",
        metavar="FILE",
        type=FILE,
        help="Make the agent say things at times: a .csv or .jsonl file with "
        "at (seconds) and say (text).",
    ),
    click.option(
        "--first-words",
        metavar="TEXT",
        help="Make the agent speak first, and say this.",
    ),
    sampling_options,
)


def batch_size_option(counted: str) -> Callable[[Command], Command]:
    """``--batch-size``; its help says of what, ``counted``, so many go at a time."""
    return click.option(
        "--batch-size",
        type=_batch_size,
        metavar="auto|N",
        default="auto",
        show_default=True,
        help=f"How many {counted} at a time.",
    )


def verbosity_options(command: Command) -> Command:
    """``-q`` and ``-v``."""

    @quiet_option
    @click.option("-v", "--verbose", is_flag=True, help="Say more.")
    @functools.wraps(command)
    def wrapped(*args: Any, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        if quiet and verbose:
            raise click.UsageError("--quiet and --verbose exclude each other")
        return command(*args, verbosity=verbose - quiet, **kwargs)

    return wrapped


def diarization_from(rttm: Sequence[Path], speaker: str | None) -> Diarization | None:
    """What ``diarization_options`` name, read."""
    if not rttm:
        if speaker is not None:
            raise click.UsageError("--speaker needs --rttm")
        return None
    from pplex.evaluation.diarization import read_rttm

    return read_rttm(rttm, speaker)


def checks_from(checks: Sequence[tuple[str, Any]]) -> Checks | None:
    """What ``check_option`` parsed; of a check given twice, the last counts."""
    if not checks:
        return None
    from pplex.evaluation.checks import Checks

    found = {name.replace("-", "_"): value for name, value in checks}
    input_length = found.pop("length_of", False)
    return Checks(**found, input_length=input_length)


def sampling_from(options: dict[str, Any]) -> SamplingConfig:
    """What ``sampling_options`` parsed, but for the seed."""
    from pplex.model.sampling import GREEDY, SamplingConfig

    names = ("temp", "top_k", "text_temp", "text_top_k")
    sampling = SamplingConfig(**{name: options[name] for name in names})
    return GREEDY if options["greedy"] else sampling


def settings_from(text: str | None, options: dict[str, Any]) -> Settings:
    """The job's settings: the role's text, and what ``conversation_options`` parsed."""
    from pplex.conversation.script import first_words, read_script
    from pplex.respond.request import Settings

    words = options["first_words"]
    return Settings(
        voice=options["voice"],
        text=text,
        sampling=sampling_from(options),
        seed=options["seed"],
        channel=options["channel"] or 1,
        tail=options["tail"],
        first_words=None if words is None else first_words(words),
        script=() if options["script"] is None else read_script(options["script"]),
    )


def role_text(options: dict[str, Any]) -> str | None:
    """The role prompt that ``conversation_options`` parsed, in words; None: its own."""
    names = ("prompt", "prompt_file", "role")
    given = [name for name in names if options[name] is not None]
    if len(given) > 1:
        flags = (f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"{' and '.join(flags)} exclude each other")
    if options["prompt_file"] is not None:
        return _read_prompt(options["prompt_file"])
    if options["prompt"] is not None:
        return options["prompt"]
    return ROLES[options["role"]] if options["role"] else None


def _read_prompt(path: Path) -> str:
    """The text of a prompt file."""
    limit, what = 1 << 20, f"--prompt-file {path}"
    with reading(what, "is not UTF-8 text"), path.open("rb") as file:
        content = file.read(limit + 1)
        if len(content) > limit:
            raise PplexError(f"{what}: over 1 MiB; give a short text")
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    if "\0" in text:
        raise PplexError(f"{what}: not text, as it holds bytes of 0")
    return text
