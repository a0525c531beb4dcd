"""Load a model and talk to it: PCM frames in, PCM frames and text ids out.

This is the library's front door; it prints nothing and knows no command line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from pplex.audio.files import Channel, frames_of, read_pcm
from pplex.audio.loudness import normalize_loudness, trim_silence
from pplex.checkpoint import voice_codes, voices
from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.tokenizer import TextTokenizer
from pplex.checkpoint.weights import load_lm, load_mimi
from pplex.codec.codec import Codec, make_codec
from pplex.conversation.generate import Step, generate, make_sampler
from pplex.conversation.prompt import Prefilled, Prompt, make_prompt
from pplex.conversation.worker import codec_worker, one_ahead
from pplex.errors import PplexError
from pplex.layers.device import on_cpu
from pplex.model.config import ModelConfig
from pplex.model.lm import Lm
from pplex.model.native import NativeCache
from pplex.model.sampling import SamplingConfig
from pplex.model.streams import TEXT_ROW, shift, unshift, user_rows

DEFAULT_VOICE = "NATF2"


@dataclass
class Model:
    """A loaded model: networks, tokenizer, voices, and where they came from."""

    local: LocalModel
    config: ModelConfig
    lm: Lm
    codec: Codec
    tokenizer: TextTokenizer
    voices: dict[str, Path]
    layout: str
    bits: tuple[int, ...]
    dtype: str
    load_s: float

    @property
    def compute(self) -> str:
        """How weights are multiplied: some ``quantized``, or all ``dense``."""
        is_packed = any("scales" in module for module in self.lm.modules())
        return "quantized" if is_packed else "dense"


def load(local: LocalModel, *, dense: bool = False) -> Model:
    """Load the model at ``local``: float32 on a CPU, bfloat16 on a GPU.

    With ``dense``, quantized weights are written out in that type: more memory, and
    faster where many rows go through them at once.
    """
    start = time.perf_counter()
    folder = local.folder
    config = folder.read_config()
    tokenizer = TextTokenizer.load(folder.tokenizer)
    if tokenizer.num_pieces != config.lm.text_card:
        raise PplexError(
            f"{folder.path}: the tokenizer has {tokenizer.num_pieces} pieces, the "
            f"model {config.lm.text_card}; they belong to different models"
        )
    dtype = mx.float32 if on_cpu() else mx.bfloat16
    mimi = load_mimi(folder.codec, config.mimi)
    codec = make_codec(mimi, config.mimi)
    loaded = load_lm(local.path, config.lm, dtype, dense=dense)
    if not on_cpu():
        loaded.lm.compile()
    return Model(
        local=local,
        config=config,
        lm=loaded.lm,
        codec=codec,
        tokenizer=tokenizer,
        voices=voices.find_voices(local.path),
        layout=loaded.layout,
        bits=loaded.bits,
        dtype=str(dtype).removeprefix("mlx.core."),
        load_s=time.perf_counter() - start,
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
        voices.check_made_for(saved, first_input(model))
        prompt = make_prompt(
            model.config, text_ids, saved_voice=(saved.embeddings, saved.cache)
        )
    else:
        codes = encode_voice(model, path)
        prompt = make_prompt(model.config, text_ids, voice_codes=codes)
    return Role(prompt, name, text)


def first_input(model: Model) -> np.ndarray:
    """The model's input before the first frame, float32 (dim,)."""
    lm = model.config.lm
    initial = np.full((1, lm.num_streams, 1), lm.audio_initial, np.int32)
    initial[:, TEXT_ROW] = lm.text_initial
    return np.array(model.lm.embed(mx.array(initial))[0, 0].astype(mx.float32))


def encode_voice(
    model: Model, path: Path, *, channel: Channel = 1, trim: bool = False
) -> np.ndarray:
    """Codes (codebooks, frames) of a voice recording, normalised to -24 LUFS.

    With ``trim``, without the silence at both ends. The codes are kept in the user's
    cache, for the next time.
    """
    rate = model.config.sample_rate
    try:
        pcm = read_pcm(path, sample_rate=rate, channel=channel).pcm
        pcm = normalize_loudness(trim_silence(pcm, rate) if trim else pcm, rate)
    except PplexError as e:
        raise PplexError(f"voice {path}: {e}") from e
    device = "cpu" if on_cpu() else "gpu"
    key = voice_codes.key(pcm, model.local.folder.codec, device)
    codes = voice_codes.read(key)
    if codes is None:
        codes = encode_frames(model, pcm)
        voice_codes.write(key, codes)
    return codes


def encode_frames(model: Model, pcm: np.ndarray) -> np.ndarray:
    """Codes (codebooks, frames) of a whole recording (samples,)."""
    frames = frames_of(pcm, model.config.frame_size)
    state, size = model.codec.make_state(), chunk_frames()
    chunks = [frames[i : i + size] for i in range(0, len(frames), size)]
    return np.concatenate([model.codec.encode(c, state) for c in chunks], axis=1)


def chunk_frames() -> int:
    """Frames to encode and decode at a time where nobody waits for them.

    Many on a GPU, where a chunk of any size takes as long to launch.
    """
    return 32 if on_cpu() else 128


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
    """Seconds spent so far, by part; ``steps`` has an entry a frame.

    What the codec does in a thread beside the steps counts only as far as they had to
    wait for it.
    """

    encode_s: float = 0.0
    decode_s: float = 0.0
    steps: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Decoding:
    """A reply whose PCM is under way: ``pcm`` waits for it, ``is_done`` does not."""

    pcm: Callable[[], np.ndarray]
    is_done: Callable[[], bool]
    text: np.ndarray
    agent: np.ndarray
    user: np.ndarray


class Track:
    """The codec's side of one conversation.

    The user's PCM becomes columns of the grid, the agent's columns become replies.
    """

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        chunks: Iterable[np.ndarray],
        decode_frames: int,
        worker: Executor | None = None,
    ) -> None:
        """``chunks`` are (frames, frame_size) PCM; replies have ``decode_frames``.

        With a ``worker`` the next chunk is encoded in it before it is needed, and a
        reply is there only when the one after it begins to be decoded.
        """
        self._config = model.config.lm
        self._prompt = prompt
        self._codec = model.codec
        self._decode_frames = decode_frames
        self._worker = worker
        encode = partial(self._codec.encode, state=self._codec.make_state())
        self._encoded = one_ahead(worker, encode, chunks)
        self._user_codes: list[np.ndarray] = []
        self._decoder = self._codec.make_state()
        self._decoding: _Decoding | None = None
        self._columns = [prompt.columns[: self._config.num_agent_streams, -1]]
        self.timings = Timings()

    def user_columns(self) -> Iterator[np.ndarray]:
        """Encode the user; yield (codebooks,) int32 for each frame."""
        rows = user_rows(self._config)
        delays, before = self._config.delays[rows], self._prompt.pending[rows]
        while True:
            start = time.perf_counter()
            codes = next(self._encoded, None)
            self.timings.encode_s += time.perf_counter() - start
            if codes is None:
                return
            columns = shift(codes, delays, before).T
            before = codes[:, -1]
            self._user_codes.append(codes)
            yield from columns

    def push(self, step: Step, row: int = 0) -> Reply | None:
        """Add the agent's column of a frame; a reply if one is there."""
        self.timings.steps.append(step.seconds)
        self._columns.append(step.column[row])
        return self._decode() if len(self._columns) > self._decode_frames else None

    def end(self) -> Reply | None:
        """Begin to decode the frames that are left; a reply if one is there."""
        return self._decode() if len(self._columns) > 1 else None

    @property
    def is_decoded(self) -> bool:
        """Whether nothing that has begun must be waited for."""
        return self._decoding is None or self._decoding.is_done()

    def finish(self) -> Iterator[Reply]:
        """The replies still to come."""
        for reply in (self.end(), self._decoded()):
            if reply is not None:
                yield reply

    def _decode(self) -> Reply | None:
        """Decode the frames that have come since; the reply that is there."""
        ready = self._decoded()
        delays = self._config.delays[: self._config.num_agent_streams]
        frames = unshift(np.stack(self._columns, axis=1), delays)
        self._columns = self._columns[-1:]
        text, agent = frames[0], frames[1:]
        pcm = partial(self._codec.decode, agent, self._decoder)
        user = self._take_user_codes(len(text))
        if self._worker is None:
            self._decoding = _Decoding(pcm, bool, text, agent, user)
            return self._decoded()
        call = self._worker.submit(pcm)
        self._decoding = _Decoding(call.result, call.done, text, agent, user)
        return ready

    def _decoded(self) -> Reply | None:
        """The reply under way, once it is there."""
        if self._decoding is None:
            return None
        under_way, self._decoding = self._decoding, None
        start = time.perf_counter()
        pcm = under_way.pcm()
        self.timings.decode_s += time.perf_counter() - start
        return Reply(pcm, under_way.text, under_way.agent, under_way.user)

    def _take_user_codes(self, count: int) -> np.ndarray:
        codes = np.concatenate(self._user_codes, axis=1)
        self._user_codes = [codes[:, count:]]
        return codes[:, :count]


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
        self._sampler = make_sampler(lm, sampling)
        self.timings = Timings()

    def run(
        self, chunks: Iterable[np.ndarray], *, ahead: bool = True, decode_frames: int
    ) -> Iterator[Reply]:
        """Yield a reply for each ``decode_frames`` frames, the last one shorter.

        ``chunks`` are (frames, frame_size) PCM of the user. For a live stream give
        chunks of one frame, ``ahead=False`` and ``decode_frames=1``: every frame is
        answered before the next is asked for.
        """
        model = self._model
        if not ahead and isinstance(self._state.cache, NativeCache):
            self._state.cache.reserve()
        with codec_worker(model.codec, beside=1 if ahead else 0) as worker:
            track = Track(model, self._prompt, chunks, decode_frames, worker)
            self.timings = track.timings
            columns = (mx.array(column[None]) for column in track.user_columns())
            steps = generate(model.lm, self._state, columns, self._sampler, ahead=ahead)
            for step in steps:
                if reply := track.push(step):
                    yield reply
            yield from track.finish()


def warm_up(model: Model, prefilled: Prefilled) -> None:
    """Run a frame that leaves no trace, so that the first real one is not slower."""
    silence = np.zeros((1, model.config.frame_size), np.float32)
    conversation = Conversation(model, prefilled, SamplingConfig(), seed=0)
    for _ in conversation.run([silence], decode_frames=1):
        pass
