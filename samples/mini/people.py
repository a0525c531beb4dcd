"""Recordings of people: strangers to mini's domain, and a source of words.

    python people.py FOLDER

Writes the words of every recording of FOLDER beside it, as pocketsphinx hears them:
`NAME.words`, lines of start and end in seconds and the word. Made once; its errors do
not matter much where the words are read by synthesisers, a little where a question is
put together from words.

Every fifth recording (by name) is held out of training.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import domain
import numpy as np
import soundfile
import soxr
from speech import SAMPLE_RATE

LONGEST_PAUSE_S = 1.0
# Of turns; fragments are shorter.
SHORTEST_S, LONGEST_S = 1.5, 11.0
CUTS = 8  # turns of a recording
SPLICED = {"ask": 4000, "test_people": 150}
SHORT_WORDS = 4  # of half of the questions
FADE = 240
TURN = tuple[str, str, str, np.ndarray]


@dataclass(frozen=True)
class Recording:
    """A person's speech at 24 kHz, and its words with their times in seconds."""

    name: str
    pcm: np.ndarray
    words: list[tuple[float, float, str]]
    held_out: bool


def load(folder: Path) -> list[Recording]:
    """All recordings of a folder that have their words beside them."""
    found = []
    for number, file in enumerate(sorted(folder.glob("*.words"))):
        (sound,) = (p for p in folder.glob(f"{file.stem}.*") if p != file)
        pcm, rate = soundfile.read(sound, dtype="float32", always_2d=True)
        lines = (line.split() for line in file.read_text().splitlines())
        words = [(float(start), float(end), word) for start, end, word in lines]
        pcm = soxr.resample(pcm[:, 0], rate, SAMPLE_RATE)
        found.append(Recording(file.stem, pcm, words, number % 5 == 0))
    return found


def readings(recordings: list[Recording]) -> list[str]:
    """What people say, in parts of up to 25 words, to be said by synthesisers."""
    rng, texts = random.Random(21), []
    for recording in recordings:
        words = [word for _, _, word in recording.words]
        for _ in range(0 if recording.held_out else CUTS):
            first = rng.randrange(max(1, len(words) - 7))
            part = words[first : first + rng.randint(7, 25)]
            texts.append(f"{' '.join(part).capitalize()}.")
    return texts


def turns(recordings: list[Recording]) -> Iterator[TURN]:
    """Turns of people, cut at pauses: kind, text, name and samples."""
    rng = random.Random(22)
    for recording in recordings:
        spans = list(speaking(recording.pcm))
        for _ in range(CUTS):
            first = last = rng.randrange(len(spans))
            wanted = rng.uniform(SHORTEST_S, LONGEST_S)
            while (
                last + 1 < len(spans)
                and spans[last + 1][0] - spans[last][1] < LONGEST_PAUSE_S * SAMPLE_RATE
                and spans[last + 1][1] - spans[first][0] < wanted * SAMPLE_RATE
            ):
                last += 1
            kind = "test_stranger" if recording.held_out else "stranger"
            sound = recording.pcm[spans[first][0] : spans[last][1]]
            if len(sound) > SHORTEST_S * SAMPLE_RATE:
                yield kind, domain.STRANGER, recording.name, sound


def fragments(recordings: list[Recording]) -> Iterator[TURN]:
    """People who halt: up to three short pieces with pauses, kind, text, name, samples.

    Three times each, since they are few beside whole turns and taken for questions.
    """
    rng = random.Random(24)
    for recording in (r for r in recordings if not r.held_out):
        spans = list(speaking(recording.pcm))
        for _ in range(CUTS):
            parts: list[np.ndarray] = []
            for number in range(rng.choice((1, 1, 1, 2, 2, 3))):
                if number:
                    pause_s = rng.uniform(0.3, LONGEST_PAUSE_S)
                    parts.append(np.zeros(int(pause_s * SAMPLE_RATE), np.float32))
                first, last = rng.choice(spans)
                size = int(rng.uniform(0.35, 1.6) * SAMPLE_RATE)
                sound = recording.pcm[first : min(last, first + size)].copy()
                ramp = np.linspace(0, 1, FADE)
                sound[:FADE] *= ramp
                sound[-FADE:] *= ramp[::-1]
                parts.append(sound)
            turn = "stranger", domain.STRANGER, recording.name, np.concatenate(parts)
            yield from (turn,) * 3


def speaking(pcm: np.ndarray) -> Iterator[tuple[int, int]]:
    """Speech between pauses of at least 0.12 s, in samples."""
    block = SAMPLE_RATE // 100
    power = np.square(pcm[: len(pcm) // block * block]).reshape(-1, block).mean(1)
    loud = np.flatnonzero(power > np.quantile(power, 0.95) * 1.5e-3)
    pauses = np.flatnonzero(np.diff(loud) > 12)
    for part in np.split(loud, pauses + 1):
        if len(part) > 20:
            yield int(part[0]) * block, int(part[-1] + 1) * block


def spliced(recordings: list[Recording]) -> Iterator[TURN]:
    """Questions in people's voices, put together from words that they said."""
    rng = random.Random(23)
    for kind, count in SPLICED.items():
        split = "ask" if kind == "ask" else "test"
        said: dict[str, list[tuple[Recording, float, float]]] = {}
        for recording in recordings:
            if recording.held_out == (split == "test"):
                for start, end, word in recording.words:
                    if 0.08 < end - start < 1.0:
                        said.setdefault(word, []).append((recording, start, end))
        texts = set(domain.user_sentences(split))
        if split == "ask":
            texts = texts.union(*(domain.variations(text) for text in sorted(texts)))
        able = [t for t in sorted(texts) if said.keys() >= set(spoken(t))]
        short = [text for text in able if len(spoken(text)) <= SHORT_WORDS]
        for number in range(count if short else 0):
            text = rng.choice(short if number % 2 else able)
            parts = [_cut(*rng.choice(said[word])) for word in spoken(text)]
            yield kind, text, "people", _joined(parts)


def spoken(text: str) -> list[str]:
    """The words of a sentence as a recogniser writes them."""
    return [word.strip(".,?!").lower() for word in text.split()]


def _cut(recording: Recording, start: float, end: float) -> np.ndarray:
    """A word, with a little of what is around it, at one loudness."""
    first = max(0, int(start * SAMPLE_RATE) - FADE // 2)
    sound = recording.pcm[first : int(end * SAMPLE_RATE) + FADE // 2].copy()
    sound *= 0.06 / max(float(np.sqrt(np.square(sound).mean())), 1e-4)
    ramp = np.linspace(0, 1, FADE)
    sound[:FADE] *= ramp
    sound[-FADE:] *= ramp[::-1]
    return sound


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Sounds one after the other, each faded into the next."""
    pcm = np.zeros(sum(map(len, parts)) - FADE * (len(parts) - 1), np.float32)
    at = 0
    for part in parts:
        pcm[at : at + len(part)] += part
        at += len(part) - FADE
    return pcm


def main() -> None:
    import pocketsphinx

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    decoder = pocketsphinx.Decoder(loglevel="FATAL")
    for file in sorted(args.folder.iterdir()):
        words = file.with_suffix(".words")
        if file == words or words.exists():
            continue
        pcm, rate = soundfile.read(file, dtype="float32", always_2d=True)
        pcm = (soxr.resample(pcm[:, 0], rate, 16000) * 32767).astype(np.int16)
        decoder.start_utt()
        decoder.process_raw(pcm.tobytes(), full_utt=True)
        decoder.end_utt()
        lines = [
            f"{part.start_frame / 100:.2f} {(part.end_frame + 1) / 100:.2f} "
            f"{part.word.split('(')[0]}\n"
            for part in decoder.seg()
            if not part.word.startswith(("<", "["))
        ]
        words.write_text("".join(lines))


if __name__ == "__main__":
    main()
