"""Load a model and talk to it: PCM frames in, PCM frames and text ids out.

This is the library's front door; it prints nothing and knows no command line.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from pplex.audio.files import frames_of, read_pcm
from pplex.audio.loudness import normalize_loudness
from pplex.checkpoint import voices
from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.tokenizer import TextTokenizer
from pplex.checkpoint.weights import load_lm, load_mimi
from pplex.codec.mimi import CodecState, Mimi
from pplex.config import ModelConfig, load_config
from pplex.conversation.generate import generate
from pplex.conversation.prompt import Prefilled, Prompt, make_prompt
from pplex.errors import PplexError
from pplex.model.lm import Lm
from pplex.model.sampling import Sampler, SamplingConfig
from pplex.model.streams import shift, unshift, user_rows

DEFAULT_VOICE = "NATF2"
MIMI_PATTERNS = ("mimi.safetensors", "tokenizer-*-checkpoint*.safetensors")
TOKENIZER_PATTERN = "tokenizer_spm_*.model"


@dataclass
class Model:
    """A loaded model: networks, tokenizer, voices, and where they came from."""

    local: LocalModel
    config: ModelConfig
    lm: Lm
    mimi: Mimi
    tokenizer: TextTokenizer
    voices: dict[str, Path]
    layout: str
    bits: tuple[int, ...]
    dtype: str
    load_s: float


def load(local: LocalModel) -> Model:
    """Load the model at ``local``: float32 on a CPU, bfloat16 on a GPU."""
    start = time.perf_counter()
    folder = local.path if local.path.is_dir() else local.path.parent
    config = load_config(folder / "config.json")
    tokenizer = TextTokenizer.load(_one_file(folder, (TOKENIZER_PATTERN,)))
    if tokenizer.num_pieces != config.lm.text_card:
        raise PplexError(
            f"{folder}: the tokenizer has {tokenizer.num_pieces} pieces, the model "
            f"{config.lm.text_card}; they belong to different models"
        )
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    dtype = mx.float32 if on_cpu else mx.bfloat16
    mimi = load_mimi(_one_file(folder, MIMI_PATTERNS), config.mimi)
    loaded = load_lm(local.path, config.lm, dtype)
    return Model(
        local=local,
        config=config,
        lm=loaded.lm,
        mimi=mimi,
        tokenizer=tokenizer,
        voices=voices.find_voices(folder),
        layout=loaded.layout,
        bits=loaded.bits,
        dtype=str(dtype).removeprefix("mlx.core."),
        load_s=time.perf_counter() - start,
    )


def _one_file(folder: Path, patterns: Sequence[str]) -> Path:
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if found:
            return found[0]
    raise PplexError(
        f"{folder}: {' or '.join(patterns)} is missing; every checkpoint needs it"
    )


@dataclass(frozen=True)
class Role:
    """A prompt laid out for a model, with the names to report."""

    prompt: Prompt
    voice: str
    text: str


def choose_voice(model: Model, voice: str | None) -> str:
    """The voice to use: ``voice`` itself, else NATF2, else the first by name."""
    if voice is not None:
        return voice
    if not model.voices:
        raise PplexError(
            f"{model.local.path}: the checkpoint has no voices; give one with "
            "--voice FILE.wav"
        )
    return DEFAULT_VOICE if DEFAULT_VOICE in model.voices else next(iter(model.voices))


def make_role(model: Model, voice: str | None, text: str) -> Role:
    """Lay out the prompt of ``voice`` (a name or a file) and the role ``text``."""
    name = choose_voice(model, voice)
    text_ids = model.tokenizer.encode_prompt(text)
    path = model.voices.get(name)
    if path is None:
        path = Path(name)
        if not path.is_file():
            known = ", ".join(model.voices) or "none"
            raise PplexError(
                f"voice {name!r}: neither a voice of this model ({known}) nor a file"
            )
    if path.suffix.lower() in voices.VOICE_SUFFIXES:
        saved = voices.read_voice_file(path)
        lm = model.config.lm
        voices.check_voice(saved, lm.dim, text_card=lm.text_card, card=lm.card)
        prompt = make_prompt(
            model.config, text_ids, saved_voice=(saved.embeddings, saved.cache)
        )
    else:
        codes = encode_voice(model, path)
        prompt = make_prompt(model.config, text_ids, voice_codes=codes)
    return Role(prompt, name, text)


def encode_voice(model: Model, path: Path) -> np.ndarray:
    """Codes (codebooks, frames) of a voice recording, normalised to -24 LUFS."""
    rate = model.config.sample_rate
    try:
        pcm = normalize_loudness(read_pcm(path, sample_rate=rate).pcm, rate)
    except PplexError as e:
        raise PplexError(f"voice {path}: {e}") from e
    frames = frames_of(pcm, model.config.frame_size)
    state = model.mimi.make_state()
    return encode_chunk(model.mimi, frames, state)


def encode_chunk(mimi: Mimi, frames: np.ndarray, state: CodecState) -> np.ndarray:
    """Codes int32 (codebooks, frames) of ``frames`` (frames, frame_size)."""
    pcm = mx.array(frames.reshape(1, -1))
    return np.array(mimi.encode(pcm, state)[0])


@dataclass(frozen=True)
class Reply:
    """The agent's side of a stretch of frames, beside the user's codes.

    ``pcm`` is (samples,), ``text`` (frames,), ``agent`` and ``user`` (codebooks,
    frames); all belong to the same frames of the recording.
    """

    pcm: np.ndarray
    text: np.ndarray
    agent: np.ndarray
    user: np.ndarray


@dataclass
class Timings:
    """Seconds spent so far, by part; ``steps`` has an entry a frame."""

    encode_s: float = 0.0
    decode_s: float = 0.0
    steps: list[float] = field(default_factory=list)


class Conversation:
    """One conversation on a model; others may use the same model at the same time."""

    def __init__(
        self,
        model: Model,
        prefilled: Prefilled,
        sampling: SamplingConfig,
        seed: int,
    ) -> None:
        """Start after a prompt."""
        lm = model.config.lm
        self._model = model
        self._prompt = prefilled.prompt
        self._state = prefilled.start(lm, seed)
        self._sampler = Sampler(sampling, lm.text_card, lm.card)
        self._user_codes: list[np.ndarray] = []
        self.timings = Timings()

    def run(
        self, chunks: Iterable[np.ndarray], *, ahead: bool = True, decode_frames: int
    ) -> Iterator[Reply]:
        """Yield a reply for each ``decode_frames`` frames, the last one shorter.

        ``chunks`` are (frames, frame_size) PCM of the user. For a live stream give
        chunks of one frame, ``ahead=False`` and ``decode_frames=1``: every frame is
        answered before the next is asked for.
        """
        config = self._model.config.lm
        state = self._model.mimi.make_state()
        delays = config.delays[: config.num_agent_streams]
        columns = [self._prompt.columns[: config.num_agent_streams, -1]]
        steps = generate(
            self._model.lm,
            self._state,
            self._user_columns(chunks),
            self._sampler,
            ahead=ahead,
        )
        for step in steps:
            self.timings.steps.append(step.seconds)
            columns.append(step.column[0])
            if len(columns) > decode_frames:
                yield self._decode(unshift(np.stack(columns, axis=1), delays), state)
                columns = columns[-1:]
        if len(columns) > 1:
            yield self._decode(unshift(np.stack(columns, axis=1), delays), state)

    def _user_columns(self, chunks: Iterable[np.ndarray]) -> Iterator[mx.array]:
        """Encode the user and lay the codes out as columns of the grid."""
        config = self._model.config.lm
        rows = user_rows(config)
        before = self._prompt.pending[rows]
        state = self._model.mimi.make_state()
        for frames in chunks:
            start = time.perf_counter()
            codes = encode_chunk(self._model.mimi, frames, state)
            columns = mx.array(shift(codes, config.delays[rows], before).T)
            before = codes[:, -1]
            self._user_codes.append(codes)
            self.timings.encode_s += time.perf_counter() - start
            for idx in range(len(frames)):
                yield columns[idx : idx + 1]

    def _decode(self, frames: np.ndarray, state: CodecState) -> Reply:
        start = time.perf_counter()
        text, agent = frames[0], frames[1:]
        pcm = np.array(self._model.mimi.decode(mx.array(agent[None]), state)[0])
        self.timings.decode_s += time.perf_counter() - start
        return Reply(pcm, text, agent, self._take_user_codes(len(text)))

    def _take_user_codes(self, count: int) -> np.ndarray:
        codes = np.concatenate(self._user_codes, axis=1)
        self._user_codes = [codes[:, count:]]
        return codes[:, :count]


def warm_up(model: Model, prefilled: Prefilled) -> None:
    """Run a frame that leaves no trace, so that the first real one is not slower."""
    silence = np.zeros((1, model.config.frame_size), np.float32)
    conversation = Conversation(model, prefilled, SamplingConfig(), seed=0)
    for _ in conversation.run([silence], decode_frames=1):
        pass
