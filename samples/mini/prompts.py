"""What comes before a conversation: the tokenizer, role prompts, loudness of voices."""

import io
import math
import re
import string
from pathlib import Path

import domain
import numpy as np
import sentencepiece
from scipy.signal import lfilter
from speech import SAMPLE_RATE

VOCABULARY = 640


def train_tokenizer(path: Path) -> None:
    """A unigram model with the published special ids.

    Every word of a reply or a prompt is one piece, so that text keeps up with speech;
    anything else is spelt.
    """
    texts = domain.replies()
    for template in sum(domain.domain()["roles"].values(), []):
        texts += domain.fill(template)[:200]
    known = {f"\u2581{w}" for text in texts for w in re.findall(r"[A-Za-z]+", text)}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts + domain.user_sentences("ask")),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="unigram",
        user_defined_symbols=sorted(known) + ["\u2581<", "system"],
        required_chars=string.ascii_letters + string.digits + ".,:;!?'-<>$&()",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        normalization_rule_name="identity",
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def prompt_ids(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """Ids of a role prompt between its tags."""
    return tokenizer.encode(f"<system> {text.strip()} <system>")


def loudness(pcm: np.ndarray) -> float:
    """Integrated loudness in LUFS (ITU-R BS.1770, gated 400 ms blocks)."""
    shelf, high = _biquad(1500.0, 1 / math.sqrt(2), 4.0), _biquad(38.0, 0.5, None)
    x = lfilter(*high, lfilter(*shelf, pcm.astype(np.float64)))
    size, hop = int(0.4 * SAMPLE_RATE), int(0.1 * SAMPLE_RATE)
    starts = range(0, len(x) - size + 1, hop)
    power = np.array([np.mean(np.square(x[s : s + size])) for s in starts])
    level = -0.691 + 10 * np.log10(power + 1e-20)
    kept = level > -70
    gate = -0.691 + 10 * np.log10(power[kept].mean()) - 10
    return float(-0.691 + 10 * np.log10(power[kept & (level > gate)].mean()))


def _biquad(
    hertz: float, q: float, gain_db: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """A high shelf, or without gain a high pass."""
    w = 2 * math.pi * hertz / SAMPLE_RATE
    cos, alpha = math.cos(w), math.sin(w) / (2 * q)
    if gain_db is None:
        b = [(1 + cos) / 2, -(1 + cos), (1 + cos) / 2]
        a = [1 + alpha, -2 * cos, 1 - alpha]
    else:
        g = 10 ** (gain_db / 40)
        r = 2 * math.sqrt(g) * alpha
        b = [
            g * ((g + 1) + (g - 1) * cos + r),
            -2 * g * ((g - 1) + (g + 1) * cos),
            g * ((g + 1) + (g - 1) * cos - r),
        ]
        a = [
            (g + 1) - (g - 1) * cos + r,
            2 * ((g - 1) - (g + 1) * cos),
            (g + 1) - (g - 1) * cos - r,
        ]
    return np.array(b) / a[0], np.array(a) / a[0]
