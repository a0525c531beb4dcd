"""An independent recogniser: pocketsphinx with a trigram over the domain."""

import io
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import domain
import numpy as np
from pocketsphinx import Decoder
from scipy.signal import resample_poly
from speech import PHONES, Voice, speak

DISCOUNT = 0.5


def plain(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.sub(r"[^a-z' ]", " ", text.lower()).split()


def trigram(sentences: list[str]) -> str:
    """A back-off trigram with absolute discounting, as ARPA text."""
    counts: list[Counter] = [Counter(), Counter(), Counter()]
    for sentence in sentences:
        tokens = ["<s>", *plain(sentence), "</s>"]
        for n in (1, 2, 3):
            for i in range(len(tokens) - n + 1):
                counts[n - 1][tuple(tokens[i : i + n])] += 1
    followers = [defaultdict(int), defaultdict(int)]
    sums = [defaultdict(int), defaultdict(int)]
    for n in (1, 2):
        for gram, count in counts[n].items():
            followers[n - 1][gram[:-1]] += 1
            sums[n - 1][gram[:-1]] += count
    total = sum(counts[0].values()) - counts[0][("<s>",)]

    def spare(gram: tuple) -> float:
        """Mass left for the shorter history."""
        level = len(gram) - 1
        if level > 1 or not sums[level][gram]:
            return 1.0
        return DISCOUNT * followers[level][gram] / sums[level][gram]

    def probability(gram: tuple) -> float:
        if len(gram) == 1:
            return max(counts[0][gram], 0.5) / total
        level = len(gram) - 2
        history = gram[:-1]
        if not sums[level][history]:
            return probability(gram[1:])
        own = max(counts[level + 1][gram] - DISCOUNT, 0) / sums[level][history]
        return own + spare(history) * probability(gram[1:])

    out = io.StringIO()
    out.write("\\data\\\n")
    for n in (1, 2, 3):
        out.write(f"ngram {n}={len(counts[n - 1])}\n")
    for n in (1, 2, 3):
        out.write(f"\n\\{n}-grams:\n")
        for gram in sorted(counts[n - 1]):
            p = -99.0 if gram == ("<s>",) else math.log10(probability(gram))
            line = f"{p:.4f} {' '.join(gram)}"
            if n < 3:
                line += f" {math.log10(spare(gram)):.4f}"
            out.write(line + "\n")
    out.write("\n\\end\\\n")
    return out.getvalue()


def pronounce(word: str) -> str:
    """A word's phones by flite, for words that the dictionary lacks."""
    names = [PHONES[i] for _, i in speak(word, Voice("slt")).phones]
    return " ".join({"ax": "AH"}.get(n, n.upper()) for n in names if n != "pau")


class Recognizer:
    """Hears 24 kHz PCM as words."""

    def __init__(self, folder: Path) -> None:
        said = domain.replies() + domain.user_sentences("ask")
        path = folder / "domain.arpa"
        path.write_text(trigram(said))
        probe = Decoder(lm=None, loglevel="FATAL")
        words = {w for text in said for w in plain(text)}
        extra = {w: pronounce(w) for w in words if probe.lookup_word(w) is None}
        self.decoder = Decoder(lm=None, loglevel="FATAL")
        for word, phones in extra.items():
            self.decoder.add_word(word, phones, False)
        self.decoder.add_lm("domain", self._model(path))
        self.decoder.activate_search("domain")

    def _model(self, path: Path):
        from pocketsphinx import NGramModel

        return NGramModel(self.decoder.config, self.decoder.logmath, str(path))

    def hear(self, pcm: np.ndarray) -> list[str]:
        """Words of one utterance."""
        quiet = np.random.default_rng(0).normal(0, 3, 4000)
        x = np.concatenate([quiet, resample_poly(pcm, 2, 3) * 32767, quiet])
        self.decoder.start_utt()
        self.decoder.process_raw(
            x.clip(-32768, 32767).astype(np.int16).tobytes(), full_utt=True
        )
        self.decoder.end_utt()
        found = self.decoder.hyp()
        return plain(found.hypstr) if found else []


def errors(wanted: list[str], heard: list[str]) -> int:
    """Word errors: substitutions, insertions and deletions."""
    row = list(range(len(heard) + 1))
    for i, a in enumerate(wanted, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(heard, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]
