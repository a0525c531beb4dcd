"""Recognisers that turn a track into words with times, all on this machine.

``pocketsphinx`` needs nothing but its package and hears a small domain well if it is
given the domain's sentences. ``onnx=FOLDER`` is Parakeet (Full-Duplex-Bench's), Whisper
and others on any machine, ``mlx=FOLDER`` Parakeet, Qwen3-ASR and others in MLX, from
folders that were downloaded before.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pplex.errors import PplexError
from pplex.evaluation.asr import Recogniser, plain
from pplex.evaluation.speech_activity import VAD_RATE
from pplex.files import read_regular, reading
from pplex.respond.transcript import Word

if TYPE_CHECKING:
    from pocketsphinx import Decoder

_MAX_TEXT_BYTES = 1 << 24  # of sentences to expect
_GET_ONNX = "hf download istupakov/parakeet-tdt-0.6b-v2-onnx prints the folder of one"
_GET_MLX = "hf download mlx-community/parakeet-tdt-0.6b-v2 prints the folder of one"
_FRAME_RATE = 100  # pocketsphinx's
_LONGEST_PIECE_S = 0.4  # how long a piece may last of which only the start is known


def make_recogniser(name: str, sentences: Path | None = None) -> Recogniser:
    """The recogniser of that name; ``sentences`` is a text file of what is expected."""
    kind, _, folder = name.partition("=")
    if kind == "pocketsphinx" and not folder:
        return _pocketsphinx(sentences)
    make = _FROM_FOLDERS.get(kind)
    if make is None:
        known = ["pocketsphinx", *(f"{kind}=FOLDER" for kind in _FROM_FOLDERS)]
        raise PplexError(f"there is no recogniser {name}; known are {', '.join(known)}")
    if sentences is not None:
        raise PplexError(
            f"--asr-sentences is for pocketsphinx; {kind} takes no sentences"
        )
    return make(folder)


def _pocketsphinx(sentences: Path | None) -> Recogniser:
    try:
        from pocketsphinx import Decoder
    except ImportError as e:
        raise PplexError(
            "the recogniser pocketsphinx is not installed: install "
            "pplex[asr-pocketsphinx], with Python 3.13 or older"
        ) from e
    if sentences is None:
        decoder = Decoder(loglevel="FATAL", samprate=VAD_RATE)
        details: dict[str, object] = {"language_model": "en-us"}
    else:
        decoder, details = _domain_decoder(sentences)

    def hear(pcm: np.ndarray) -> list[tuple[str, float, float]]:
        # Silence around an utterance, not digital, steadies the recogniser.
        quiet = np.random.default_rng(0).normal(0, 3, VAD_RATE // 4)
        sound = np.concatenate([quiet, pcm * 32767, quiet])
        decoder.start_utt()
        raw = np.clip(sound, -32768, 32767).astype(np.int16).tobytes()
        decoder.process_raw(raw, no_search=False, full_utt=True)
        decoder.end_utt()
        if decoder.hyp() is None:
            return []
        return list(_heard(decoder.seg(), len(pcm) / VAD_RATE))

    version = importlib.metadata.version("pocketsphinx")
    return Recogniser("pocketsphinx", version, hear, details)


def _heard(
    segments: Iterable[Any], length_s: float
) -> Iterator[tuple[str, float, float]]:
    """Words of a pocketsphinx result, the silence in front taken off."""
    for segment in segments:
        text = segment.word.partition("(")[0]
        if not text or text[0] in "<[+":
            continue
        start = segment.start_frame / _FRAME_RATE - 0.25
        end = (segment.end_frame + 1) / _FRAME_RATE - 0.25
        yield text, min(max(0.0, start), length_s), min(max(0.0, end), length_s)


def _domain_decoder(sentences: Path) -> tuple[Decoder, dict[str, object]]:
    """A decoder with a trigram over the sentences instead of general English."""
    from pocketsphinx import Decoder, get_model_path
    from pocketsphinx.lm import ArpaBoLM

    lines = _plain_lines(sentences)
    wanted = {word for line in lines for word in line.split()}
    known: dict[str, list[str]] = {}
    dictionary = Path(get_model_path("en-us/cmudict-en-us.dict"))
    for entry in dictionary.read_text(encoding="utf-8").splitlines():
        word = entry.partition(" ")[0].partition("(")[0]
        if word in wanted:
            known.setdefault(word, []).append(entry)
    with tempfile.TemporaryDirectory() as folder:
        arpa, words = Path(folder, "sentences.arpa"), Path(folder, "words.dict")
        model = ArpaBoLM(text="\n".join(lines), add_start=True, case="lower")
        model.compute()
        model.write_file(str(arpa))
        # The whole dictionary would take seconds to be made into a search.
        entries = [entry for word in sorted(known) for entry in known[word]]
        words.write_text("\n".join(entries) + "\n", encoding="utf-8")
        decoder = Decoder(
            lm=str(arpa), dict=str(words), loglevel="FATAL", samprate=VAD_RATE
        )
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return decoder, {
        "language_model": f"trigram over {len(lines)} sentences",
        "sentences_sha256": digest,
        "words_not_in_dictionary": sorted(wanted - known.keys()),
    }


def _plain_lines(path: Path) -> list[str]:
    with reading(f"the file of sentences {path}", "is not UTF-8 text"):
        text = read_regular(path, _MAX_TEXT_BYTES).decode("utf-8")
    spoken = (plain([Word(line, 0, 0, 0)]) for line in text.splitlines())
    lines = [" ".join(word.text for word in words) for words in spoken]
    lines = [line for line in lines if line]
    if not lines:
        raise PplexError(f"{path} holds no sentences; give a text file, one a line")
    return lines


def _mlx(folders: str) -> Recogniser:
    """``folders`` are a model's and, after a comma, that of a forced aligner."""
    folder, _, aligner = folders.partition(",")
    try:
        import mlx.core as mx
        from mlx_audio.stt import load
    except ImportError as e:
        raise PplexError(
            f"the recogniser mlx cannot be loaded ({e}): install pplex[asr-mlx]"
        ) from e
    with reading(f"--asr mlx={folders}", f"holds no model for mlx-audio; {_GET_MLX}"):
        for name in filter(None, (folder or ".", aligner)):
            if not (Path(name) / "config.json").is_file():
                raise ValueError(f"{name} has no config.json")
        model = load(Path(folder))
        align = load(Path(aligner)) if aligner else None

    def hear(pcm: np.ndarray) -> list[tuple[str, float, float]]:
        sound = mx.array(pcm.astype(np.float32))
        found = model.generate(sound)
        if align is not None and found.text.strip():
            words = align.generate(sound, text=found.text)
            return [(word.text, word.start_time, word.end_time) for word in words]
        sentences = getattr(found, "sentences", None)
        if sentences is None:  # a model that gives no times
            return _spread(found.text.split(), len(pcm) / VAD_RATE)
        tokens = (token for sentence in sentences for token in sentence.tokens)
        return _joined((token.text, token.start, token.end) for token in tokens)

    version = importlib.metadata.version("mlx-audio")
    return Recogniser("mlx", version, hear, {"folders": folders})


def _joined(
    pieces: Iterable[tuple[str, float, float]],
) -> list[tuple[str, float, float]]:
    """Join pieces, of which those with a space in front begin a word."""
    words: list[tuple[str, float, float]] = []
    for text, start, end in pieces:
        if words and not text.startswith((" ", "\u2581")):
            last, begin, _ = words[-1]
            words[-1] = (last + text, begin, end)
        elif text.strip(" \u2581"):
            words.append((text.strip(" \u2581"), start, end))
    return words


def _onnx(folder: str) -> Recogniser:
    """The package's own name of the kind of model is in the folder's config.json."""
    path = Path(folder)
    try:
        import onnx_asr
    except ImportError as e:
        raise PplexError(
            f"the recogniser onnx cannot be loaded ({e}): install pplex[asr-onnx]"
        ) from e
    with reading(f"--asr onnx={folder}", f"holds no model for onnx-asr; {_GET_ONNX}"):
        config = json.loads(read_regular(path / "config.json", _MAX_TEXT_BYTES))
        kind = str(config["model_type"])
        quantized = None if any(path.glob("*model.onnx")) else "int8"
        model = onnx_asr.load_model(kind, path, quantization=quantized)
        heard = model.with_timestamps()

    def hear(pcm: np.ndarray) -> list[tuple[str, float, float]]:
        found = heard.recognize(pcm.astype(np.float32), sample_rate=VAD_RATE)
        length_s = len(pcm) / VAD_RATE
        if not found.tokens or not found.timestamps:
            return _spread(found.text.split(), length_s)
        starts = [*found.timestamps, length_s]
        return _joined(
            (token, start, min(following, start + _LONGEST_PIECE_S))
            for token, start, following in zip(
                found.tokens, starts, starts[1:], strict=False
            )
        )

    version = importlib.metadata.version("onnx-asr")
    return Recogniser("onnx", version, hear, {"folder": str(path), "model": kind})


def _spread(words: list[str], length_s: float) -> list[tuple[str, float, float]]:
    """Words without times, by their letters over the utterance they are in."""
    edges = np.cumsum([0, *(len(word) + 1 for word in words)])
    edges = edges * (length_s / max(1, edges[-1]))
    return [
        (word, float(start), float(end))
        for word, start, end in zip(words, edges, edges[1:], strict=False)
    ]


_FROM_FOLDERS: dict[str, Callable[[str], Recogniser]] = {"onnx": _onnx, "mlx": _mlx}
