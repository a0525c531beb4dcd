"""Make the user recordings of samples/, in phrasings and voices mini was not taught.

    python record.py FOLDER

Every recording leaves time for the answers. All voices are flite's.
"""

import argparse
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly
from speech import SAMPLE_RATE, Voice, speak

VOICES = {
    "woman": Voice("slt", 1.05, 175, 0.94),
    "man": Voice("awb", 1.0, 120, 1.12),
    "robot": Voice("kal16", 0.95, 110, 1.04),
}

# name: voice, then pauses in seconds and sentences in turn
RECORDINGS: dict[str, tuple] = {
    "teacher_sky": ("woman", 0.6, "Why is the sky so blue?", 5.0),
    "teacher_two_turns": (
        "man", 0.6, "Hello there.", 3.8, "So what is the biggest planet?", 4.5,
    ),
    "bank_card": ("man", 0.6, "I think I lost my card.", 4.5),
    "bank_hours": (
        "robot", 0.6, "May I ask what your name is?", 3.5,
        "What time do you close in the evening?", 4.5,
    ),
    "restaurant_booking": (
        "woman", 0.6, "I need a table for two.", 4.5, "What is the special?", 4.5,
    ),
    "chat_weekend": (
        "robot", 0.6, "So how was your weekend?", 4.5, "Do you have a cat?", 4.5,
    ),
    "interruption": (
        "woman", 0.6, "So why do we sleep?", 1.3, "Please stop talking.", 4.0,
    ),
    "long_turn": (
        "man", 0.6, "My grandmother lived in a small village.", 1.3,
        "Last Monday I walked along the street.", 1.3, "I am so tired today.", 5.0,
    ),
    "unknown": ("woman", 0.6, "Who invented the bicycle?", 4.5),
    "noisy": ("man", 0.6, "How far is the moon from here?", 5.0),
    "silence": ("man", 6.0),
}  # fmt: skip


def record(voice: Voice, parts: tuple) -> np.ndarray:
    """Sentences with pauses; the pauses count from the end of speech."""
    pcm = []
    for part in parts:
        if isinstance(part, str):
            pcm.append(speak(part, voice).pcm)
        else:
            pcm.append(np.zeros(int(part * SAMPLE_RATE), np.float32))
    return np.concatenate(pcm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    noise = np.random.default_rng(4)
    for name, (voice, *parts) in RECORDINGS.items():
        pcm = record(VOICES[voice], tuple(parts))
        if name == "noisy":
            pcm = pcm + 0.006 * noise.standard_normal(len(pcm))
        if name == "bank_card":
            quiet = np.zeros_like(pcm)
            pcm = np.stack([pcm, quiet], 1)
            pcm, rate = resample_poly(pcm, 147, 160), 22050
        elif name == "teacher_sky":
            rate = SAMPLE_RATE
        else:
            pcm, rate = resample_poly(pcm, 2, 3), 16000
        soundfile.write(folder / f"{name}.wav", pcm, rate, subtype="PCM_16")


if __name__ == "__main__":
    main()
