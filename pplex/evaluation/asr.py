"""Recognisers that turn a track into words with times, all on this machine.

What they hear is compared with the model's own text: word errors, and where they are.

``pocketsphinx`` needs nothing but its package and hears a small domain well if it is
given the domain's sentences. ``parakeet=FOLDER`` is NVIDIA's Parakeet in MLX, the
transcriber of Full-Duplex-Bench, from a folder that was downloaded before.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pplex.errors import PplexError
from pplex.evaluation.speech_activity import (
    VAD_RATE,
    Segment,
    VadSettings,
    energy_segments,
    merge,
)
from pplex.files import read_regular, reading
from pplex.respond.transcript import Word

if TYPE_CHECKING:
    from pocketsphinx import Decoder

RECOGNISERS = ("pocketsphinx", "parakeet=FOLDER")

Hear = Callable[[np.ndarray], list[tuple[str, float, float]]]

_CUT_AT_S = 0.5  # silences at which a track is cut into utterances
_LONGEST_S = 30.0
_MAX_TEXT_BYTES = 1 << 24  # of sentences to expect
_MARGIN_S = 0.15
_FRAME_RATE = 100  # pocketsphinx's
_NOT_A_WORD = re.compile(r"[^\w' ]")


@dataclass(frozen=True)
class Recogniser:
    """Hears 16 kHz PCM (samples,) as words with their times in the track."""

    name: str
    version: str
    hear: Hear
    details: dict[str, object] = field(default_factory=dict)

    def __call__(self, pcm: np.ndarray) -> list[Word]:
        """Hear the track utterance by utterance."""
        words = []
        for utterance in utterances(pcm):
            start = round(utterance.start_s * VAD_RATE)
            heard = self.hear(pcm[start : round(utterance.end_s * VAD_RATE)])
            words += [
                Word(
                    text,
                    utterance.start_s + begin,
                    min(utterance.start_s + end, utterance.end_s),
                    0,
                )
                for text, begin, end in heard
            ]
        return words

    def describe(self) -> dict[str, object]:
        """Name, version and what it was given, for the output."""
        return {"name": self.name, "version": self.version, **self.details}


def make_recogniser(name: str, sentences: Path | None = None) -> Recogniser:
    """The recogniser of that name; ``sentences`` is a text file of what is expected."""
    kind, _, folder = name.partition("=")
    if kind == "pocketsphinx" and not folder:
        return _pocketsphinx(sentences)
    if kind == "parakeet":
        if sentences is not None:
            raise PplexError(
                "--asr-sentences is for pocketsphinx; parakeet takes no sentences"
            )
        return _parakeet(folder)
    raise PplexError(
        f"there is no recogniser {name}; known are {' and '.join(RECOGNISERS)}"
    )


def utterances(pcm: np.ndarray) -> list[Segment]:
    """Cut at silences; what is too long is cut at its length."""
    speech = merge(energy_segments(pcm, VadSettings()), _CUT_AT_S)
    length_s = len(pcm) / VAD_RATE
    found = []
    for segment in speech:
        start, end = segment.start_s - _MARGIN_S, segment.end_s + _MARGIN_S
        start, end = max(0.0, start), min(length_s, end)
        while end - start > _LONGEST_S:
            found.append(Segment(start, start + _LONGEST_S))
            start += _LONGEST_S
        found.append(Segment(start, end))
    return found


@dataclass(frozen=True)
class Disagreement:
    """Words said and heard otherwise, and when; either may be empty."""

    start_s: float
    end_s: float
    said: str
    heard: str


@dataclass(frozen=True)
class RoundTrip:
    """Word errors of one recording; the rate is None where nothing was said."""

    words: int
    heard: int
    substitutions: int
    deletions: int
    insertions: int
    word_error_rate: float | None
    disagreements: list[Disagreement]

    @property
    def errors(self) -> int:
        """Words that were not heard as they were meant."""
        return self.substitutions + self.deletions + self.insertions


def compare(said: Sequence[Word], heard: Sequence[Word]) -> RoundTrip:
    """Align the two by words, without case and punctuation."""
    try:
        import jiwer
    except ImportError as e:
        raise PplexError("word errors need jiwer: install pplex[score]") from e
    ours, theirs = plain(said), plain(heard)
    if ours:
        output = jiwer.process_words(
            " ".join(word.text for word in ours),
            " ".join(word.text for word in theirs),
        )
        chunks = output.alignments[0]
    else:  # jiwer refuses an empty reference
        chunks = []
    disagreements = [
        _disagreement(
            ours[c.ref_start_idx : c.ref_end_idx],
            theirs[c.hyp_start_idx : c.hyp_end_idx],
        )
        for c in chunks
        if c.type != "equal"
    ]
    if not ours and theirs:
        disagreements = [_disagreement([], theirs)]
    counts = {
        kind: sum(
            max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx)
            for c in chunks
            if c.type == kind
        )
        for kind in ("substitute", "delete", "insert")
    }
    if not ours:
        counts["insert"] = len(theirs)
    wrong = sum(counts.values())
    return RoundTrip(
        words=len(ours),
        heard=len(theirs),
        substitutions=counts["substitute"],
        deletions=counts["delete"],
        insertions=counts["insert"],
        word_error_rate=wrong / len(ours) if ours else None,
        disagreements=disagreements,
    )


def plain(words: Sequence[Word]) -> list[Word]:
    """Lower-case words without punctuation; what is none is left out."""
    found = []
    for word in words:
        text = word.text.lower().replace("\u2019", "'").replace("-", " ")
        for part in _NOT_A_WORD.sub("", text).split():
            part = part.strip("'_")
            if part:
                found.append(Word(part, word.start_s, word.end_s, word.frame))
    return found


def _pocketsphinx(sentences: Path | None) -> Recogniser:
    try:
        from pocketsphinx import Decoder
    except ImportError as e:
        raise PplexError(
            "the recogniser pocketsphinx is not installed: install "
            "pplex[asr-pocketsphinx]"
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


def _parakeet(folder: str) -> Recogniser:
    path = Path(folder)
    if not folder or not (path / "config.json").is_file():
        raise PplexError(
            f"parakeet needs the folder of its model, and {folder or 'none'} has no "
            "config.json: hf download mlx-community/parakeet-tdt-0.6b-v2 prints the "
            "folder; then give --asr parakeet=FOLDER"
        )
    try:
        import mlx.core as mx
        from parakeet_mlx import from_pretrained
        from parakeet_mlx.audio import get_logmel
    except ImportError as e:
        raise PplexError(
            f"the recogniser parakeet cannot be loaded ({e}): install pplex[asr-mlx]"
        ) from e
    model = from_pretrained(str(path.resolve()))

    def hear(pcm: np.ndarray) -> list[tuple[str, float, float]]:
        mel = get_logmel(mx.array(pcm), model.preprocessor_config)
        (result,) = model.generate(mel)
        return _words_of(result.tokens)

    version = importlib.metadata.version("parakeet-mlx")
    return Recogniser("parakeet", version, hear, {"folder": str(path)})


def _words_of(tokens: Iterable[Any]) -> list[tuple[str, float, float]]:
    """Join pieces, of which those with a space in front begin a word."""
    words: list[tuple[str, float, float]] = []
    for token in tokens:
        text = token.text
        start, end = token.start, token.end
        if words and not text.startswith((" ", "\u2581")):
            last, begin, _ = words[-1]
            words[-1] = (last + text, begin, end)
        elif text.strip(" \u2581"):
            words.append((text.strip(" \u2581"), start, end))
    return words


def _disagreement(said: Sequence[Word], heard: Sequence[Word]) -> Disagreement:
    both = [*said, *heard]
    return Disagreement(
        min(word.start_s for word in both),
        max(word.end_s for word in both),
        " ".join(word.text for word in said),
        " ".join(word.text for word in heard),
    )
