"""What is asked: a recording, how it is answered, and where the results go."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

from pplex.errors import PplexError
from pplex.files import (
    PIPE,
    check_descriptor,
    check_new,
    descriptor,
    is_descriptor,
    is_pipe,
    name_of,
    no_permission,
    not_a_file,
)
from pplex.respond.transcript import CueShape, format_of
from pplex.values import shown

if TYPE_CHECKING:
    from pplex.audio.files import Channel, Part
    from pplex.conversation.quiet import Tail
    from pplex.conversation.script import Line
    from pplex.model.sampling import SamplingConfig

MAX_SEED = 2**63 - 1
MOST_TAIL_S = 3600.0
MOST_TALK_S = 86400.0
Layout = Literal["stereo", "agent", "separate"]

# What else than WAV is written, as libsndfile calls it: the last three lose something.
SOUND_FORMATS = {
    ".flac": ("FLAC", "PCM_16"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
}


@dataclass(frozen=True)
class Settings:
    """What decides the answer, apart from the model and the recording.

    ``voice`` is a name or a file, ``text`` the role, None for the model's own; ``tail``
    how many seconds of silence follow the recording, or ``"auto"``: as many as the
    agent needs to finish. Of the recording only ``part`` is answered. The agent begins
    with ``first_words`` and says the lines of ``script``. The conversation goes on from
    where ``resume`` was saved, which has voice and role.
    """

    voice: str | None
    text: str | None
    sampling: SamplingConfig
    seed: int
    channel: Channel = 1
    tail: Tail = 0.0
    part: Part | None = None
    first_words: Line | None = None
    script: tuple[Line, ...] = ()
    resume: Path | None = None

    @property
    def lines(self) -> tuple[Line, ...]:
        """All that the agent is made to say."""
        first = () if self.first_words is None else (self.first_words,)
        return first + self.script

    def said(self) -> list[dict[str, object]]:
        """The same as JSON has it."""
        return [{"at": line.at_s, "say": line.say} for line in self.lines]


@dataclass(frozen=True)
class Outputs:
    """Where the results of one recording go; None for what is not wanted.

    ``-`` is stdout; transcripts and stats may also be devices and pipes. The first
    transcript is called so, another after its format as well; ``cue`` is of subtitles.
    From ``state`` the conversation can go on.
    """

    audio: Path
    layout: Layout
    transcripts: tuple[Path, ...] = ()
    stats: Path | None = None
    tokens: Path | None = None
    cue: CueShape = CueShape()
    state: Path | None = None

    def files(self) -> dict[str, Path]:
        """Every file that will be written, by what it is."""
        if self.layout == "separate":
            stem = self.audio.with_suffix("")
            audio = {
                side: stem.with_name(f"{stem.name}.{side}.wav")
                for side in ("user", "agent")
            }
        else:
            audio = {"audio": self.audio}
        side_files = {
            f"transcript_{_kind(path)}" if idx else "transcript": path
            for idx, path in enumerate(self.transcripts)
        } | {"stats": self.stats, "tokens": self.tokens, "state": self.state}
        return audio | {k: v for k, v in side_files.items() if v is not None}

    def take(self, number: int) -> Outputs:
        """Where those of one of several answers go."""
        stem = self.audio.stem

        def named(path: Path) -> Path:
            return path.with_name(_take_name(path.name, number, stem))

        return replace(
            self,
            audio=named(self.audio),
            transcripts=tuple(map(named, self.transcripts)),
            stats=self.stats and named(self.stats),
            tokens=self.tokens and named(self.tokens),
            state=self.state and named(self.state),
        )


def seed_of(value: Any, where: str) -> int | None:
    """The seed of a row of a table, None where it has none."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,19}\s*", value):
        value = int(value)
    if value is None or (type(value) is int and 0 <= value <= MAX_SEED):
        return value
    raise PplexError(
        f"{where}: seed is {shown(value)}, where a whole number from 0 to 2**63 - 1 is "
        "expected"
    )


def takes_of(request: Request, takes: int) -> list[Request]:
    """The requests for several answers, whose seeds follow from the first's."""
    settings = request.settings
    return [
        replace(
            request,
            outputs=request.outputs.take(number),
            settings=replace(settings, seed=(settings.seed + number - 1) & MAX_SEED),
            key=request.key and _take_name(request.key, number),
        )
        for number in range(1, takes + 1)
    ]


def _take_name(name: str, number: int, stem: str = "") -> str:
    """The name of a take's file: ``reply.2.wav`` of ``reply.wav``.

    ``stem`` is what names of files that belong together begin with.
    """
    begun = stem if stem and name.startswith(f"{stem}.") else str(PurePath(name).stem)
    folder, _, own = name.rpartition("/")
    return f"{folder}/" * bool(folder) + f"{begun}.{number}{own[len(begun) :]}"


def transcript_beside(audio: Path, form: str) -> Path:
    """The transcript's name that follows from the sound's.

    None ends in ``output.json``: Full-Duplex-Bench writes one of its own.
    """
    return audio.with_suffix(".transcript.json" if form == "json" else f".{form}")


def _kind(transcript: Path) -> str:
    """A transcript's format; what is piped are the words alone."""
    return "words" if is_pipe(transcript) else format_of(transcript)


@dataclass(frozen=True)
class Request:
    """One recording to answer; ``source`` may be ``-``, a stream on stdin.

    Of many, ``key`` is the recording's name, unique among them, and ``extra`` what is
    kept with its results; ``where`` says which line of a jobs file asks for it.
    """

    source: Path
    outputs: Outputs
    settings: Settings
    key: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    @property
    def opening(self) -> tuple[object, ...]:
        """Where its conversation begins: those with the same share that."""
        settings = self.settings
        return settings.voice, settings.text, settings.resume

    @property
    def heard(self) -> tuple[object, ...]:
        """What its agent hears from there: takes of one recording have the same."""
        settings = self.settings
        heard = self.source, settings.channel, settings.tail, settings.part
        return *self.opening, *heard


def check_outputs(request: Request, overwrite: bool) -> None:
    """Refuse outputs that would destroy something, before any work is done."""
    source, outputs = request.source, request.outputs
    if is_descriptor(outputs.audio):
        if outputs.layout == "separate":
            raise PplexError(
                f"two files do not fit on {name_of(outputs.audio)}: choose another "
                "--layout"
            )
    elif outputs.audio.is_dir():
        raise not_a_file(outputs.audio)
    elif outputs.layout == "separate" and outputs.audio.suffix.lower() != ".wav":
        raise PplexError(
            f"cannot write {outputs.audio}: separate tracks are WAV files; end its "
            "name in .wav"
        )
    elif outputs.audio.suffix.lower() not in (".wav", *SOUND_FORMATS):
        raise PplexError(
            f"cannot write {outputs.audio}: the output is a WAV file; end its name in "
            f".wav, or for another format in {', '.join(SOUND_FORMATS)}"
        )
    kinds = [_kind(path) for path in outputs.transcripts]
    if len(set(kinds)) < len(kinds):
        names = " and ".join(map(str, outputs.transcripts))
        raise PplexError(
            f"{names} would be two transcripts of one format; leave one out"
        )
    tokens = outputs.tokens
    if tokens is not None and not (
        is_descriptor(tokens) or tokens.suffix.lower() == ".npz"
    ):
        raise PplexError(
            f"cannot write {tokens}: tokens are a NumPy archive; end its name in .npz"
        )
    check_state_name(outputs.state)
    files = outputs.files()
    seen = {} if source == PIPE else {os.path.realpath(source): "the input"}
    for what, path in files.items():
        if is_descriptor(path):
            is_text = what == "stats" or path in outputs.transcripts
            check_descriptor(path, is_text=is_text)
            if seen.setdefault(f"{descriptor(path)}", what) != what:
                raise PplexError(
                    f"only one output fits on {name_of(path)}: give the others file "
                    "names"
                )
            continue
        if (what == "stats" or path in outputs.transcripts) and is_pipe(path):
            continue
        other = seen.setdefault(os.path.realpath(path), f"the {what} output")
        if other != f"the {what} output":
            raise PplexError(
                f"cannot write {path}: it is also {other}; choose another name"
            )
        _check_name(path)
        if path.exists() and os.path.exists(source) and path.samefile(source):
            raise PplexError(f"cannot write {path}: it is the input by another name")
        _check_place(path, overwrite)


def check_state_name(path: Path | None) -> None:
    """Refuse a saved conversation that is no file, or by its name another one."""
    if path is not None and (is_pipe(path) or path.suffix.lower() != ".safetensors"):
        raise PplexError(
            f"cannot write {name_of(path)}: a saved conversation is a file; end its "
            "name in .safetensors"
        )


def _check_name(path: Path) -> None:
    """Refuse a name that is too long, and links that go round in a circle."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as e:
        raise PplexError(f"cannot write {path}: {e.strerror or e}") from e


def _check_place(path: Path, overwrite: bool) -> None:
    if path.parent.exists() and not path.parent.is_dir():
        raise PplexError(f"cannot write {path}: {path.parent} is not a folder")
    if path.is_dir():
        raise not_a_file(path)
    check_new(path, overwrite)
    if not os.access(path.parent, os.W_OK):
        raise no_permission(path)
