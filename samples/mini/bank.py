"""Make the bank: every sentence in the agent's voices and in many user voices.

    python bank.py WORK [--copies N]

Writes WORK/bank.pt: all clips one after the other as 16-bit PCM, whole frames each,
with a phone label for every third of a frame and an index.
"""

import argparse
import multiprocessing
import random
from pathlib import Path

import domain
import numpy as np
import torch
from sizes import FRAME_SIZE
from speech import PHONES, SAMPLE_RATE, Clip, Voice, speak

AGENTS = {
    "slt": Voice("slt", stretch=1.05),
    "rms": Voice("rms", stretch=1.0),
}
USERS = [
    Voice("awb"), Voice("awb", 1.1, 135, 1.06), Voice("awb", 0.95, 105, 0.94),
    Voice("kal16"), Voice("kal16", 1.1, 130, 1.1), Voice("kal16", 1.0, 90, 0.95),
    Voice("rms", 1.0, 120, 1.12), Voice("rms", 0.9, 85, 0.92), Voice("rms", 0.95),
    Voice("slt", 1.0, 150, 0.88), Voice("slt", 1.0, 200, 1.1), Voice("slt", 1.1),
    Voice("en-us+m1", 1.0, 40), Voice("en-us+m3", 1.1, 50), Voice("en-us+m4", 1.0, 30),
    Voice("en-us+m7", 0.95, 55), Voice("en-us+f1", 1.0, 60),
    Voice("en-us+f2", 1.05, 50), Voice("en-us+f3", 0.95, 40),
    Voice("en-us+f4", 1.1, 60),
    Voice("en-us", 1.0, 45, 1.08), Voice("en-us", 1.1, 35, 0.92),
]  # fmt: skip
HELD_OUT = [
    Voice("slt", 1.05, 175, 0.94),
    Voice("awb", 1.0, 120, 1.12),
    Voice("kal16", 0.95, 110, 1.04),
    Voice("en-us+m5", 1.0, 45),
    Voice("en-us+f5", 1.05, 50),
]
SLOT = FRAME_SIZE // 3


def speech_bounds(pcm: np.ndarray) -> tuple[int, int]:
    """First and last sample within 34 dB of the loudest 10 ms."""
    block = SAMPLE_RATE // 100
    power = np.square(pcm[: len(pcm) // block * block]).reshape(-1, block).mean(1)
    loud = np.flatnonzero(power > power.max() * 4e-4)
    return int(loud[0]) * block, int(loud[-1] + 1) * block


def labels(clip: Clip, lead: int, num_slots: int) -> np.ndarray:
    """Phone in the middle of every slot, after `lead` samples of silence."""
    ends = np.array([end for end, _ in clip.phones])
    ids = np.array([phone for _, phone in clip.phones] + [PHONES.index("pau")])
    delay = 0.02
    middle = ((np.arange(num_slots) + 0.5) * SLOT - lead) / SAMPLE_RATE - delay
    slots = ids[np.searchsorted(ends, middle)]
    slots[middle < 0] = PHONES.index("pau")
    return slots.astype(np.uint8)


def another(rng: random.Random, voice: Voice) -> Voice:
    """A voice like this one: faster or slower, higher or lower, larger or smaller.

    The held-out voices are further away than this goes.
    """
    pitch, warp = voice.pitch, voice.warp * rng.uniform(0.97, 1.03)
    if pitch is not None and voice.name.startswith("en"):
        pitch += rng.uniform(-6, 6)
    elif pitch is not None:
        pitch *= rng.uniform(0.94, 1.06)
    return Voice(voice.name, voice.stretch * rng.uniform(0.88, 1.15), pitch, warp)


def make(job: tuple[str, str, Voice]) -> dict:
    """Speak one clip: trimmed, whole frames, with its labels and word frames."""
    kind, text, voice = job
    clip = speak(text, voice)
    first, last = speech_bounds(clip.pcm)
    before, after = (1200, 1920) if kind == "agent" else (1920, 3840)
    start, stop = first - before, min(last + after, len(clip.pcm))
    pcm = np.concatenate([np.zeros(max(-start, 0)), clip.pcm[max(start, 0) : stop]])
    fade = 240
    pcm[:fade] *= np.linspace(0, 1, fade)
    pcm[-fade:] *= np.linspace(1, 0, fade)
    frames = -(-len(pcm) // FRAME_SIZE)
    pcm = np.pad(pcm, (0, frames * FRAME_SIZE - len(pcm)))
    words = [(max(t - start / SAMPLE_RATE, 0.0), word) for t, word in clip.words]
    return {
        "kind": kind,
        "text": text,
        "voice": voice.name,
        "words": words,
        "speech": (first - start, last - start),
        "frames": frames,
        "pcm": (pcm.clip(-1, 1) * 32767).astype(np.int16),
        "labels": labels(clip, -start, 3 * frames),
    }


def jobs(copies: int) -> list[tuple[str, str, Voice]]:
    """Everything to be spoken."""
    rng = random.Random(0)
    todo = [("agent", t, v) for t in domain.replies() for v in AGENTS.values()]
    todo += [("voice", t, v) for t in domain.VOICE_SENTENCES for v in AGENTS.values()]
    asked = {text: copies for text in domain.user_sentences("ask")}
    for text in list(asked):
        asked |= {other: 1 for other in domain.variations(text) if other not in asked}
    more = domain.others() + domain.statements("ask")
    asked |= {text: 1 for text in more if text not in asked}
    for text, count in asked.items():
        for voice in rng.sample(USERS, count):
            todo.append(("ask", text, another(rng, voice)))
    for text in domain.user_sentences("test"):
        todo += [("test", text, voice) for voice in rng.sample(HELD_OUT, 3)]
        todo.append(("test_known", text, rng.choice(USERS)))
    return todo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--copies", type=int, default=2, help="voices a sentence")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool() as pool:
        clips = pool.map(make, jobs(args.copies), chunksize=16)
    start = 0
    for clip in clips:
        clip["start"] = start
        start += clip["frames"] * FRAME_SIZE
    bank = {
        "pcm": torch.from_numpy(np.concatenate([c.pop("pcm") for c in clips])),
        "labels": torch.from_numpy(np.concatenate([c.pop("labels") for c in clips])),
        "clips": clips,
    }
    torch.save(bank, args.work / "bank.pt")
    print(f"bank: {len(clips)} clips, {start / SAMPLE_RATE / 3600:.2f} h")


if __name__ == "__main__":
    main()
