"""Two agents that talk to each other: what is asked, the run, its files."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from pplex.checkpoint import voices
from pplex.checkpoint.hashes import digest_of, model_identity, sampled
from pplex.checkpoint.hub import LocalModel, resolve
from pplex.checkpoint.weights import codec_tensors
from pplex.conversation.answer import Answer
from pplex.conversation.prompts import (
    KEPT_ROLES,
    Role,
    choose_text,
    choose_voice,
    make_role,
)
from pplex.conversation.roles import role_words
from pplex.conversation.script import (
    Script,
    first_words,
    lay_out,
    read_script,
    too_late,
    unsaid,
)
from pplex.conversation.seeds import seed_for
from pplex.conversation.session import Model, load
from pplex.conversation.talk import Dialogue, Side, converse_together
from pplex.engine.base import Start
from pplex.engine.choose import Compute, batch_size
from pplex.errors import PplexError, did_you_mean
from pplex.files import PIPE, Place, Together, folded, make_folder, put, put_new
from pplex.model.sampling import SamplingConfig
from pplex.respond.lock import FolderLock, remove_leftovers
from pplex.respond.manifest import (
    DONE,
    STOPPED,
    Line,
    Manifest,
    file_print,
    new_line,
    stopped_line,
)
from pplex.respond.outputs import (
    SoundWriter,
    Write,
    metadata_of,
    open_sink,
    spoken_words,
    write_tokens,
)
from pplex.respond.request import (
    MOST_TALK_S,
    Outputs,
    Request,
    Settings,
    check_outputs,
    seed_of,
)
from pplex.respond.transcript import Word, write_dialogue
from pplex.respond.transcript import text_of as words_of
from pplex.values import read_rows, seconds_of, shown, text_of

if TYPE_CHECKING:
    from pplex.respond.run import Report

SIDES = ("left", "right")
COLUMNS = ("output", *SIDES, "seconds", "seed")
_KEYS = ("voice", "prompt", "role", "model", "first-words", "script")

_Key = tuple[int, str, str]


@dataclass(frozen=True)
class Talk:
    """Two agents that talk for so many seconds, left and right in the sound."""

    sides: tuple[Settings, Settings]
    seconds: float
    outputs: Outputs


@dataclass(frozen=True)
class Config:
    """By which models, those of left and right, and what may be done.

    What is written to ``folder`` is noted in its manifest: what is done there already
    is not done again.
    """

    model_names: tuple[str, str]
    offline: bool
    overwrite: bool
    compute: Compute = "auto"
    kv_bits: int | None = None
    batch_size: int | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Talked:
    """A dialogue that is written, with the words of each side."""

    talk: Talk
    words: tuple[list[Word], list[Word]]
    audio_s: float


def parse_side(text: str, where: str) -> dict[str, str]:
    """What ``key=value,key=value`` says of an agent; values may have commas.

    A ``role`` becomes the ``prompt`` that it stands for.
    """
    parts = re.split(rf"(?:^|,)\s*({'|'.join(_KEYS)})=", text)
    if parts[0].strip():
        raise PplexError(
            f"{where}: {parts[0]!r} is not KEY=VALUE with a KEY of {', '.join(_KEYS)}"
        )
    found: dict[str, str] = {}
    for key, value in zip(parts[1::2], parts[2::2], strict=True):
        if key in found:
            raise PplexError(f"{where}: {key} is given twice")
        if not value and key != "prompt":
            raise PplexError(f"{where}: {key} has no value")
        found[key] = value
    words = role_words(found.get("prompt"), found.pop("role", None), where)
    return found if words is None else found | {"prompt": words}


def settings_of(
    side: Mapping[str, str],
    sampling: SamplingConfig,
    seed: int,
    where: str,
    folder: Path = Path(),
) -> Settings:
    """The settings of an agent that ``parse_side`` read; files are from ``folder``."""
    voice, script, words = (side.get(k) for k in ("voice", "script", "first-words"))
    if voice is not None and (folder / voice).is_file():
        voice = str(folder / voice)
    return Settings(
        voice=voice,
        text=side.get("prompt"),
        sampling=sampling,
        seed=seed,
        first_words=None if words is None else first_words(words, f"{where}: {words}"),
        script=() if script is None else read_script(folder / script),
    )


def read_talks(
    path: Path,
    outdir: Path,
    sides: tuple[Mapping[str, str], Mapping[str, str]],
    seconds: float,
    sampling: SamplingConfig,
    seed: int,
    outputs: Callable[[Path], Outputs],
) -> list[Talk]:
    """The talks of a ``.jsonl`` or ``.csv`` file: ``output``, and what differs.

    ``left`` and ``right`` add to ``sides``; a seed follows from the output's name.
    """
    talks = []
    seen: dict[str, int] = {}
    for number, fields in read_rows(path, "jobs file", COLUMNS):
        where = f"{path} line {number}"
        if unknown := sorted(fields.keys() - set(COLUMNS)):
            raise PplexError(
                f"{where}: there is no column {shown(unknown[0])}; there are "
                f"{', '.join(COLUMNS)}" + did_you_mean(str(unknown[0]), COLUMNS)
            )
        output = PurePosixPath(text_of(fields.get("output", ""), where, "output"))
        if output.is_absolute() or ".." in output.parts or not output.name:
            raise PplexError(
                f"{where}: output {str(output)!r} leaves the output folder"
            )
        name = str(output)
        if (other := seen.setdefault(folded(Path(name)), number)) != number:
            raise PplexError(
                f"{path}: lines {other} and {number} have the output {name}; rename one"
            )
        own = seed_of(fields.get("seed"), where)
        own = seed_for(seed, name) if own is None else own
        both = []
        for idx, (side, given) in enumerate(zip(SIDES, sides, strict=True)):
            text, about = fields.get(side, ""), f"{where} {side}"
            said = parse_side(text_of(text, where, side, may_be_empty=True), about)
            if "model" in said:
                raise PplexError(f"{where}: the models are those of --left and --right")
            settings = settings_of(
                {**given, **said}, sampling, side_seed(own, idx), about, path.parent
            )
            both.append(settings)
        length = fields.get("seconds", seconds)
        length = seconds_of(length, where, "seconds", MOST_TALK_S)
        talks.append(Talk((both[0], both[1]), length, outputs(outdir / name)))
    if not talks:
        raise PplexError(f"the jobs file {path} names no talks")
    return talks


def side_seed(seed: int, side: int) -> int:
    """The seed of an agent: the right one's is the next."""
    return (seed + side) % (1 << 63)


def talk(talks: Sequence[Talk], config: Config, report: Report) -> Iterator[Talked]:
    """Have agents talk, many pairs at a time; each is whole when it is yielded."""
    if config.folder is None:
        yield from _talk(talks, config, report, None)
        return
    folders = {p for one in talks for p in one.outputs.audio.absolute().parents}
    new = [folder for folder in folders if not folder.exists()]
    try:
        for folder in [config.folder, *(one.outputs.audio.parent for one in talks)]:
            make_folder(folder)
        lock, ended = FolderLock(config.folder), False
        try:
            yield from _talk(talks, config, report, lock)
            ended = True
        finally:
            lock.release(ended=ended)
    finally:
        for folder in sorted(new, reverse=True):
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _talk(
    talks: Sequence[Talk], config: Config, report: Report, lock: FolderLock | None
) -> Iterator[Talked]:
    known, unknown = None, []
    if config.folder is not None and lock is not None:
        known = Manifest(config.folder, note=report.warn)
        unknown = [output for output in lock.begun if not known.knows(output)]
        for output in unknown:
            known.know(output)
    for one in talks:
        if known is None or known.line_of(known.relative(one.outputs.audio)) is None:
            _check_outputs(one, _may_replace(one, config, known))
    models = _load(config, report)
    frame_rate = models[0].config.frame_rate
    roles: dict[_Key, Role] = {}
    ready = [_ready(one, models, roles, report) for one in talks]
    digests = {} if known is None else _digests(ready, models)
    if known is not None and not config.overwrite:
        ready = [one for one in ready if not _is_done(known, one, digests)]
        for one in ready:
            _check_outputs(one, _may_replace(one, config, known))
    frames = [math.ceil(one.seconds * frame_rate) for one in ready]
    scripts = [
        _scripts(one, models, count) for one, count in zip(ready, frames, strict=True)
    ]
    if known is not None:
        files = [path for one in talks for path in one.outputs.files().values()]
        if removed := remove_leftovers(known.outdir, files):
            report.warn(f"removed {removed} temporary files of a run that was killed")
        known.open()
        for output in unknown:
            known.append(stopped_line(output))
    if not ready:
        return
    rate = models[0].config.sample_rate
    together = [Together() for _ in ready]
    writers = [
        SoundWriter(partial(_open, one.outputs, rate, files))
        for one, files in zip(ready, together, strict=True)
    ]

    @functools.lru_cache(KEPT_ROLES)
    def start(key: _Key) -> Start:
        return models[key[0]].engine.prefill(roles[key].prompt)

    def dialogues() -> Iterator[Dialogue]:
        for idx, one in enumerate(ready):
            left, right = (
                Side(start(_key(side, models, settings)), settings.seed, script)
                for side, settings, script in zip(
                    (0, 1), one.sides, scripts[idx], strict=True
                )
            )
            yield Dialogue(str(idx), (left, right), frames[idx], writers[idx])

    prompt_frames = max(role.prompt.num_frames for role in roles.values())
    rows = min(
        batch_size(m.config, m.engine.cost(), max(frames), prompt_frames=prompt_frames)
        for m in models
    )
    pairs = config.batch_size or max(1, rows // 2)
    report.answering(sum(frames) / frame_rate)
    try:
        for dialogue, answers in converse_together(
            (models[0].engine, models[1].engine),
            dialogues(),
            ready[0].sides[0].sampling,
            batch_size=min(pairs, len(ready)),
        ):
            idx = int(dialogue.key)
            one = ready[idx]
            _check_outputs(one, _may_replace(one, config, known))
            writers[idx].finish()
            talked = _write(one, models, answers, together[idx], report)
            together[idx].name(partial(_place, one, config, known, lock, digests))
            if known is not None:
                known.append(_line(known, talked, models, digests))
            yield talked
            report.advance(dialogue.num_frames / frame_rate)
    finally:
        for writer, drafts in zip(writers, together, strict=True):
            writer.abandon()
            drafts.discard()
        if known is not None:
            known.close()


def _key(side: int, models: tuple[Model, Model], settings: Settings) -> _Key:
    """What a prompt follows from: a model, by the first side that has it, its role."""
    side = 0 if models[0] is models[1] else side
    return side, settings.voice or "", settings.text or ""


def _ready(
    one: Talk, models: tuple[Model, Model], roles: dict[_Key, Role], report: Report
) -> Talk:
    """``one`` with the voices and roles that it gets; these are added to ``roles``."""
    sides = []
    for side, (settings, model) in enumerate(zip(one.sides, models, strict=True)):
        voice = choose_voice(model, settings.voice)
        text = choose_text(model, settings.text)
        settings = replace(settings, voice=voice, text=text)
        key = _key(side, models, settings)
        if key not in roles:
            roles[key] = make_role(model, voice, text, report.warn)
        sides.append(settings)
    return replace(one, sides=(sides[0], sides[1]))


def _scripts(
    one: Talk, models: tuple[Model, Model], num_frames: int
) -> tuple[Script, Script]:
    """What each side is to say, which has to have room."""
    left, right = (
        lay_out(settings.lines, model.tokenizer, model.config)
        for settings, model in zip(one.sides, models, strict=True)
    )
    for script in (left, right):
        if late := too_late(script, num_frames, models[0].config.frame_rate):
            raise PplexError(f"{late}: give more --seconds, or an earlier time")
    return left, right


def _check_outputs(one: Talk, overwrite: bool) -> None:
    check_outputs(Request(Path(PIPE), one.outputs, one.sides[0]), overwrite)


def _is_done(known: Manifest, one: Talk, digests: Mapping[Path, str]) -> bool:
    audio, files = one.outputs.audio, one.outputs.files().values()
    return known.is_done(known.relative(audio), digests[audio], None, files)


def _may_replace(one: Talk, config: Config, known: Manifest | None) -> bool:
    """Whether outputs that are there may go: as asked, or as left by a killed run."""
    if config.overwrite or known is None:
        return config.overwrite
    line = known.line_of(known.relative(one.outputs.audio))
    return (line is None or line["status"] == STOPPED) and all(
        known.origin_of(path, surely=True)
        for path in one.outputs.files().values()
        if os.path.lexists(path)
    )


def _place(
    one: Talk,
    config: Config,
    known: Manifest | None,
    lock: FolderLock | None,
    digests: Mapping[Path, str],
    hidden: Path,
    path: Path,
) -> None:
    """Give a file its name; the lock has been told by then."""
    is_there = config.overwrite or os.path.lexists(path)
    place = put if is_there and _may_replace(one, config, known) else put_new
    if known is not None and lock is not None:
        audio = one.outputs.audio
        told = {"recording": known.relative(audio), "settings": digests[audio]}
        output = known.describe(path, file_print(hidden)) | told
        known.know(output)
        lock.begin(output)
    place(hidden, path)


def _digests(talks: Sequence[Talk], models: tuple[Model, Model]) -> dict[Path, str]:
    """Of each talk, by its sound, a hash of all that decides its files."""
    weights = [model_identity(model.local) for model in models]

    @functools.cache
    def voice(side: int, name: str) -> object:
        return name and sampled(voices.voice_file(name, models[side].voices))[-1]

    def digest(one: Talk) -> str:
        sides = [
            metadata_of(models[side], settings)
            | {"voice": voice(side, settings.voice or ""), "weights": weights[side]}
            | asdict(settings.sampling)
            for side, settings in enumerate(one.sides)
        ]
        forms = [path.suffix for path in one.outputs.transcripts]
        has_tokens = one.outputs.tokens is not None
        return digest_of([sides, one.seconds, forms, has_tokens])

    return {one.outputs.audio: digest(one) for one in talks}


def _line(
    known: Manifest,
    talked: Talked,
    models: tuple[Model, Model],
    digests: Mapping[Path, str],
) -> Line:
    """What the manifest says of a talk; the right agent is the one that answers."""
    one, words = talked.talk, talked.words[1]
    left, right = map(metadata_of, models, one.sides)
    audio = one.outputs.audio
    return new_line(known.relative(audio), DONE, digests[audio]) | {
        "outputs": {
            what: known.describe(path, file_print(path))
            for what, path in one.outputs.files().items()
        },
        **right,
        **asdict(one.sides[1].sampling),
        "left": left,
        "audio_s": round(talked.audio_s, 3),
        "words": len(words),
        "text": words_of(words),
    }


def _open(outputs: Outputs, rate: int, place: Place) -> AbstractContextManager[Write]:
    return open_sink("stereo", outputs.files(), rate, place=place)


def _load(config: Config, report: Report) -> tuple[Model, Model]:
    """The models of left and right, one of them if they are the same."""
    found = [
        resolve(name, offline=config.offline, progress=report.shows_bars)
        for name in config.model_names
    ]
    if found[0].path != found[1].path:
        _check_codecs(found[0], found[1])
    loaded: dict[Path, Model] = {}
    for local in found:
        if local.path not in loaded:
            report.loading(local)
            form = config.compute, config.kv_bits
            model = load(local, compute=form[0], kv_bits=form[1], many=True)
            report.computing(str(model.form))
            loaded[local.path] = model
    return loaded[found[0].path], loaded[found[1].path]


def _check_codecs(left: LocalModel, right: LocalModel) -> None:
    """Refuse models whose codes mean different sounds: each is told the other's."""
    tables = []
    for local in (left, right):
        tensors = codec_tensors(local.folder, local.folder.read_config().mimi)
        tables.append({k: v for k, v in tensors.items() if k.endswith(".codebooks")})
    same = tables[0].keys() == tables[1].keys() and all(
        table.shape == tables[1][name].shape
        and bool(mx.allclose(table, tables[1][name], rtol=1e-2, atol=1e-3))
        for name, table in tables[0].items()
    )
    if not same:
        raise PplexError(
            f"{left.name} and {right.name} cannot talk to each other: they have "
            "different codecs, and hear each other's codes"
        )


def _write(
    one: Talk,
    models: tuple[Model, Model],
    answers: tuple[Answer, Answer],
    place: Place,
    report: Report,
) -> Talked:
    """Write what the sides said, beside the sound."""
    words: list[list[Word]] = []
    metadata: dict[str, Any] = {}
    for name, settings, model, answer in zip(
        SIDES, one.sides, models, answers, strict=True
    ):
        words.append(spoken_words(model, answer.text, settings.lines))
        metadata[name] = metadata_of(model, settings)
        script = lay_out(settings.lines, model.tokenizer, model.config)
        if late := unsaid(script, answer.text):
            report.warn(f"{one.outputs.audio}, {name}: {late}")
    said = dict(zip(SIDES, words, strict=True))
    for path in one.outputs.transcripts:
        write_dialogue(path, said, metadata, one.outputs.cue, place)
    if one.outputs.tokens is not None:
        arrays: dict[str, np.ndarray] = {}
        for name, answer in zip(SIDES, answers, strict=True):
            arrays |= {name: answer.agent, f"{name}_text": answer.text}
        write_tokens(one.outputs.tokens, arrays, place)
    seconds = len(answers[0].text) / models[0].config.frame_rate
    return Talked(one, (words[0], words[1]), seconds)
