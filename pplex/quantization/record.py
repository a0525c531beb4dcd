"""What a machine makes of a model, measured once and kept as JSON to share.

Nobody has published what the reference answers on the real weights; whoever has them
can write such a file, and another machine can be held against it.
"""

from __future__ import annotations

import hashlib
import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from pplex.audio.files import frames_of, read_pcm
from pplex.checkpoint import hashes
from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.published import voice_sha256
from pplex.checkpoint.voices import find_voices, read_voice_file
from pplex.checkpoint.weights import codec_tensors, lm_tensors
from pplex.conversation.prompts import choose_voice, make_role
from pplex.conversation.roles import ROLES
from pplex.conversation.session import Model, load
from pplex.engine.choose import cost_of, machine
from pplex.engine.device import memory_gb
from pplex.errors import PplexError
from pplex.files import put_new, reading, write_text
from pplex.model.config import TEXT_PAD, ModelConfig
from pplex.model.lm import Lm
from pplex.model.mimi import make_mimi
from pplex.model.prompt import Prompt, make_prompt
from pplex.model.sampling import GREEDY
from pplex.model.streams import NOT_FORCED
from pplex.quantization.forced import answer_whole
from pplex.quantization.layerwise import States, run_apart
from pplex.values import read_json

FORMAT = "pplex-numbers-1"
_RUN_FRAMES = 109  # so many greedy frames of one reference were the same twice
RUN_VOICE, RUN_ROLE = "NATM1", "service"  # as NVIDIA's example has them
_MIN_FRAMES = 3
_MAX_RECORD_BYTES = 1 << 24
_MAX_ID = 1 << 24
_NO_RECORD = "is no record of `pplex models verify --record`"

_ENTRIES = 10
_REPEATS = 10  # frames of a tone or of silence
_CODEC_S = 3.0
_AUDIBLE_DBFS = -60.0
_TONE_HZ = 440.0


@dataclass(frozen=True)
class Step:
    """The first frame of ``tokens`` by the specification, in float32.

    ``moments`` are mean and deviation of the sum of the tables, of each layer's output
    and after the last norm; ``inputs`` and ``outputs`` the first entries of the first
    and the last of these; ``text`` is the likeliest text id; ``codes`` are greedy after
    the text id ``given``.
    """

    tokens: tuple[int, ...]
    moments: tuple[tuple[float, float], ...]
    inputs: tuple[float, ...]
    input_norm: float
    outputs: tuple[float, ...]
    text: int
    text_logit: float
    text_mean: float
    given: int
    codes: tuple[int, ...]


@dataclass(frozen=True)
class CodecFigures:
    """What the codec makes of the prompt's constants.

    Codes of a frame of the sine tone and of zeros, fresh and after some of them; the
    strongest frequency of the constant for the tone, and the loudness of that for
    silence.
    """

    sine: tuple[tuple[int, ...], tuple[int, ...]]
    zeros: tuple[tuple[int, ...], tuple[int, ...]]
    tone_hz: float
    silence_dbfs: float


@dataclass(frozen=True)
class EngineFigures:
    """The engine beside the specification.

    The least cosines of the logits of text and codes; of a sound of some seconds the
    share of frames with the same first code, and how far its decoded codes lie above
    their difference.
    """

    text_cosine: float
    codes_cosine: float
    first_codes: float
    decoded_db: float


@dataclass(frozen=True)
class Run:
    """A greedy answer: text (frames,), agent and user (codebooks, frames)."""

    input_sha256: str
    voice: str
    voice_sha256: str
    prompt: str
    text: tuple[int, ...]
    agent: tuple[tuple[int, ...], ...]
    user: tuple[tuple[int, ...], ...]
    is_repeatable: bool


@dataclass(frozen=True)
class Record:
    """Everything that was measured of one model on one machine.

    ``sha256`` is of the model's files, ``voices`` of their embeddings; ``codec``,
    ``engine`` and ``run`` are None where the model was not loaded.
    """

    format: str
    machine: dict[str, str]
    name: str
    repo: str | None
    revision: str | None
    layout: str
    bits: tuple[int, ...]
    sha256: dict[str, str]
    voices: dict[str, str]
    initial: Step
    silence: Step
    codec: CodecFigures | None
    engine: EngineFigures | None
    run: Run | None


def measure(
    local: LocalModel,
    given: int | None,
    recording: Path | None,
    looking: Callable[[str], object],
    *,
    hashing: bool,
) -> tuple[Record, Model | None]:
    """Measure a model; the model too, if there is memory to load it.

    ``given`` is the text id after which codes of the silent step are drawn, its own
    likeliest if None; ``recording`` what to answer; ``hashing`` whether to make SHA-256
    of all files. ``looking`` is told what comes next.
    """
    folder, config = local.folder, local.folder.read_config()
    pcm = None
    if recording is not None:
        pcm = read_pcm(recording, sample_rate=config.sample_rate).pcm
        if len(pcm) < _MIN_FRAMES * config.frame_size:
            raise PplexError(f"{recording} is too short: give {_MIN_FRAMES} frames")
    voices = {
        name: voice_sha256(read_voice_file(path))
        for name, path in find_voices(local.path).items()
    }
    sums = {}
    if hashing:
        looking("the hashes of all files")
        sums = {n: hashes.name_or_sha256(folder.path / n) for n in folder.names}
    looking("the specification, layer after layer")
    silent = np.array([TEXT_PAD, *config.silence_codes, *config.sine_codes])
    prompt, coming = _short_prompt(config)
    grids = [prompt.columns, silent[:, None]]
    (states, silence), ends = run_apart(folder, config.lm, grids)
    steps = (
        _step(prompt.columns[:, 0], states, ends, None),
        _step(silent, silence, ends, given),
    )
    chosen = mx.array(coming[: config.lm.num_agent_streams].T)
    agent = ends.agent_logits(mx.array(states.hidden[-1:]), chosen)
    expected = states.text[-1:], np.array(agent)
    del ends
    mx.clear_cache()
    tensors = lm_tensors(folder, config.lm)
    layout, bits = tensors.layout, tensors.bits
    model, codec, engine, run = None, None, None, None
    need, (_, free) = cost_of(config, tensors).held / 1e9, memory_gb()
    if free is None or need < free:
        looking("the engine")
        model = load(local)
        codec = _codec_figures(model)
        engine = _engine_figures(model, prompt, coming, expected, pcm)
        if pcm is not None:
            looking("the recording, twice")
            run = _run(model, pcm, voices)
    elif pcm is not None:
        raise PplexError(
            f"{local.path}: to answer a recording takes {need:.0f} GB, and {free:.0f} "
            "GB of memory are free; leave out --input"
        )
    record = Record(
        format=FORMAT,
        machine=machine(None if model is None else model.engine),
        name=local.name if local.repo else local.path.name,
        repo=local.repo,
        revision=local.revision,
        layout=layout,
        bits=bits,
        sha256=sums,
        voices=voices,
        initial=steps[0],
        silence=steps[1],
        codec=codec,
        engine=engine,
        run=run,
    )
    return record, model


def _step(tokens: np.ndarray, states: States, ends: Lm, given: int | None) -> Step:
    """The figures of the first frame, whose tokens these are."""
    passed = [*states.layers[:, 0], states.hidden[0]]
    text = int(states.text[0].argmax())
    after = text if given is None else given
    codes = ends.depformer(
        mx.array(states.hidden[:1]),
        mx.array([after]),
        lambda logits, _: mx.argmax(logits, axis=-1),
    )
    return Step(
        tokens=_ints(tokens),
        moments=tuple((_short(x.mean()), _short(x.std())) for x in passed),
        inputs=_floats(passed[0][:_ENTRIES]),
        input_norm=_short(np.linalg.norm(passed[0])),
        outputs=_floats(passed[-1][:_ENTRIES]),
        text=text,
        text_logit=_short(states.text[0].max()),
        text_mean=_short(states.text[0].mean()),
        given=after,
        codes=_ints(np.array(mx.concatenate(codes))),
    )


def _short_prompt(config: ModelConfig) -> tuple[Prompt, np.ndarray]:
    """The initial column and two of silence, and one (streams, 1) after them.

    Each position takes as long again: a CPU has the time of few.
    """
    silence = np.array(config.silence_codes)[:, None]
    columns = make_prompt(config, [], voice_codes=silence).columns
    nothing = np.full(len(columns), NOT_FORCED, np.int32)
    return Prompt(None, columns[:, :3], nothing), columns[:, 3:4]


def _engine_figures(
    model: Model,
    prompt: Prompt,
    coming: np.ndarray,
    expected: tuple[np.ndarray, np.ndarray],
    pcm: np.ndarray | None,
) -> EngineFigures:
    engine, config = model.engine, model.config
    (logits,) = engine.forced(engine.prefill(prompt), coming)
    sound = _loudest(_made_sound(config) if pcm is None else pcm, config)
    mimi = make_mimi(config.mimi, codec_tensors(model.local.folder, config.mimi))
    wave = mx.array(sound.reshape(1, -1))
    specified = mimi.encode(wave, mimi.make_state())
    decoded = np.array(mimi.decode(specified, mimi.make_state()))[0]
    codes, codec = np.array(specified)[0], engine.codec
    found = codec.encode(sound, codec.make_state())
    level = 20 * np.log10(np.sqrt(np.mean(sound**2, axis=1)) + 1e-9)
    heard = level > _AUDIBLE_DBFS
    heard = heard if heard.any() else ~heard
    error = codec.decode(codes, codec.make_state()) - decoded
    return EngineFigures(
        text_cosine=_cosine(logits.text, expected[0]),
        codes_cosine=_cosine(logits.agent, expected[1]),
        first_codes=_short((found[0] == codes[0])[heard].mean()),
        decoded_db=_short(10 * np.log10(_power(decoded) / _power(error))),
    )


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The least cosine of rows."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return _short(((a * b).sum(axis=-1) / np.maximum(lengths, 1e-30)).min())


def _power(x: np.ndarray) -> float:
    return float(np.mean(x.astype(np.float64) ** 2)) + 1e-20


def _made_sound(config: ModelConfig) -> np.ndarray:
    """A gliding buzz with pauses (samples,), where no recording is given."""
    t = np.arange(int(_CODEC_S * config.sample_rate)) / config.sample_rate
    phase = 2 * np.pi * (120 * t + 15 * t**2)
    buzz = sum(np.sin(k * phase) / k for k in range(1, 20))
    swell = np.sin(2 * np.pi * 1.5 * t) ** 2
    sound: np.ndarray = (0.15 * swell * buzz).astype(np.float32)
    return sound


def _loudest(pcm: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The loudest seconds of a recording (frames, frame_size)."""
    frames = frames_of(pcm, config.frame_size)
    count = min(len(frames), int(_CODEC_S * config.frame_rate))
    power = np.cumsum([0.0, *np.mean(frames.astype(np.float64) ** 2, axis=1)])
    start = int(np.argmax(power[count:] - power[:-count]))
    return np.ascontiguousarray(frames[start : start + count])


def _codec_figures(model: Model) -> CodecFigures:
    config, codec = model.config, model.engine.codec
    t = np.arange(config.frame_size) / config.sample_rate
    tone = (0.5 * np.sin(2 * np.pi * _TONE_HZ * t)).astype(np.float32)

    def encoded(frame: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
        frames = np.repeat(frame[None], _REPEATS, axis=0)
        codes = codec.encode(frames, codec.make_state())
        return _ints(codes[:, 0]), _ints(codes[:, -1])

    def heard(constant: tuple[int, ...]) -> np.ndarray:
        codes = np.repeat(np.array(constant, np.int32)[:, None], _REPEATS, axis=1)
        half = _REPEATS // 2 * config.frame_size
        return codec.decode(codes, codec.make_state())[half:]

    sounding = heard(config.sine_codes)
    spectrum = np.abs(np.fft.rfft(sounding * np.hanning(len(sounding))))
    hertz = np.argmax(spectrum[1:]) + 1
    return CodecFigures(
        sine=encoded(tone),
        zeros=encoded(np.zeros_like(tone)),
        tone_hz=_short(hertz * config.sample_rate / len(sounding)),
        silence_dbfs=_short(10 * np.log10(_power(heard(config.silence_codes)))),
    )


def _run(model: Model, pcm: np.ndarray, voices: dict[str, str]) -> Run:
    """Answer the beginning of a recording greedily, twice."""
    voice = RUN_VOICE if RUN_VOICE in voices else choose_voice(model, None)
    text = ROLES[RUN_ROLE]
    prompt = make_role(model, voice, text).prompt
    pcm = pcm[: _RUN_FRAMES * model.config.frame_size]
    answer, again = (
        answer_whole(model.engine, prompt, pcm, GREEDY, 0) for _ in range(2)
    )
    same = (answer.text == again.text).all() and (answer.agent == again.agent).all()
    return Run(
        input_sha256=hashlib.sha256(pcm.astype("<f4").tobytes()).hexdigest(),
        voice=voice,
        voice_sha256=voices[voice],
        prompt=text,
        text=_ints(answer.text),
        agent=tuple(map(_ints, answer.agent)),
        user=tuple(map(_ints, answer.user)),
        is_repeatable=bool(same),
    )


def _ints(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(_short(value) for value in values)


def _short(value: Any) -> float:
    """Six digits: more would not be the same on another machine."""
    return float(f"{float(value):.6g}")


def write_record(path: Path, record: Record) -> None:
    """Write a record as JSON; nothing is replaced."""
    text = json.dumps(asdict(record), ensure_ascii=False)
    write_text(path, text + "\n", place=put_new)


def read_record(path: Path) -> Record:
    """Read what ``write_record`` wrote; anything else is refused."""
    with reading(path, _NO_RECORD):
        raw = read_json(path, _MAX_RECORD_BYTES)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise PplexError(f"{path} {_NO_RECORD}")
    with reading(path, "is a damaged record"):
        record = _typed(raw, Record, "")
    assert isinstance(record, Record)
    if record.run is not None:
        tokens = [record.run.text, *record.run.agent, *record.run.user]
        ids = {token for row in tokens for token in row}
        if len({len(row) for row in tokens}) > 1 or len(record.run.text) < _MIN_FRAMES:
            raise PplexError(f"{path} is a damaged record: `run` has rows cut short")
        if min(ids) < 0 or max(ids) > _MAX_ID:
            raise PplexError(f"{path} is a damaged record: `run` has ids out of range")
    return record


def _typed(value: Any, kind: Any, where: str) -> Any:
    """``value`` of JSON as a value of the type ``kind``; ValueError if it is none."""
    inner = typing.get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        if value.keys() == hints.keys():
            return kind(**{k: _typed(value[k], hints[k], k) for k in hints})
    elif isinstance(kind, types.UnionType):
        return None if value is None else _typed(value, inner[0], where)
    elif typing.get_origin(kind) is tuple and isinstance(value, list):
        if inner[-1] is Ellipsis:
            inner = (inner[0],) * len(value)
        if len(inner) == len(value):
            pairs = zip(value, inner, strict=True)
            return tuple(_typed(item, kind, where) for item, kind in pairs)
    elif typing.get_origin(kind) is dict and isinstance(value, dict):
        return {k: _typed(v, inner[1], where) for k, v in value.items()}
    elif kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif kind in (int, str, bool) and type(value) is kind:
        return value
    raise ValueError(f"`{where}` is not what it should be")
