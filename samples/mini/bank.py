"""Make the bank: every sentence in the agent's voices and in many user voices.

    python bank.py WORK [--copies N] [--people FOLDER]
    python bank.py WORK --neural N [--people FOLDER]

Writes WORK/bank.pt: all clips one after the other as 16-bit PCM, whole frames each,
with a phone label for every third of a frame and an index. FOLDER has recordings of
people who say none of the questions, and their words (people.py). With `--neural`, N
sentences by Kokoro (kokoro.py) in WORK/neural.pt, to which the other steps look too,
and some in voices held out of training in WORK/held_neural.pt.
"""

import argparse
import multiprocessing
import random
from pathlib import Path

import domain
import numpy as np
import people
import torch
from sizes import FRAME_SIZE
from speech import PHONES, SAMPLE_RATE, Clip, Voice, speak

AGENTS = {
    "slt": Voice("slt", stretch=1.05),
    "rms": Voice("rms", stretch=1.0),
}
VARIANTS = (
    "Alex Andy Annie Gene Hugo Lee Mike adam anika belinda benjamin boris david edward "
    "john klatt klatt3 linda m6 m8 max miguel quincy robert shelby steph travis victor"
).split()
ACCENTS = ("en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")
MANY = ((1.0, 1.0), (0.85, 0.95), (1.2, 1.08), (1.1, 0.9), (0.9, 1.12))
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
MORE_USERS = [
    *(Voice(f"en-us+{name}", 1.0, 50) for name in VARIANTS),
    *(Voice(f"{accent}+m2", 1.0, 45) for accent in ACCENTS),
    *(Voice(f"{accent}+f2", 1.0, 50) for accent in ACCENTS),
    *(
        Voice(name, 1.0, pitch, warp)
        for name in ("rhvoice:BDL", "rhvoice:CLB", "pico:en-US", "pico:en-GB")
        for pitch, warp in MANY * 2
    ),
]  # fmt: skip
HELD_OUT = [
    Voice("slt", 1.05, 175, 0.94),
    Voice("awb", 1.0, 120, 1.12),
    Voice("kal16", 0.95, 110, 1.04),
    Voice("en-us+m5", 1.0, 45),
    Voice("en-us+f5", 1.05, 50),
]
# An engine whose voices are never trained.
HELD_OUT_ENGINE = [
    Voice("festival:ked_diphone"), Voice("festival:ked_diphone", 1.12),
    Voice("festival:cmu_us_slt_arctic_hts"),
    Voice("festival:cmu_us_slt_arctic_hts", 0.9),
]  # fmt: skip
# Kokoro's voices, alone or between two; those of other languages only so.
NEURAL = (
    "af_alloy af_aoede af_bella af_heart af_jessica af_nicole af_nova af_river "
    "af_sarah af_sky am_adam am_echo am_eric am_fenrir am_liam am_michael am_puck "
    "am_santa bf_alice bf_isabella bf_lily bm_daniel bm_fable bm_george"
).split()
ACCENTED = (
    "ef_dora em_alex ff_siwis hf_alpha hf_beta hm_omega hm_psi if_sara im_nicola "
    "jf_alpha jf_nezumi jm_kumo pf_dora pm_alex zf_xiaoni zm_yunjian"
).split()
HELD_OUT_NEURAL = "af_kore am_onyx bf_emma bm_lewis".split()
SPEEDS = (0.87, 1.0, 1.14)
SLOT = FRAME_SIZE // 3
NO_LABEL = 255
MORE = 0.5  # of the sentences in another of MORE_USERS too


def speech_bounds(pcm: np.ndarray) -> tuple[int, int]:
    """First and last sample within 34 dB of the loudest 10 ms."""
    block = SAMPLE_RATE // 100
    power = np.square(pcm[: len(pcm) // block * block]).reshape(-1, block).mean(1)
    loud = np.flatnonzero(power > power.max() * 4e-4)
    return int(loud[0]) * block, int(loud[-1] + 1) * block


def labels(clip: Clip, lead: int, num_slots: int) -> np.ndarray:
    """Phone in the middle of every slot, after `lead` samples of silence.

    NO_LABEL where the synthesiser does not tell.
    """
    if not clip.phones:
        return np.full(num_slots, NO_LABEL, np.uint8)
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
    if ":" in voice.name:
        pitch = (pitch or 1.0) * rng.uniform(0.92, 1.09)
    elif pitch is not None and voice.name.startswith("en"):
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
        "text": domain.STRANGER if kind == "stranger" else text,
        "voice": voice.name,
        "words": words,
        "speech": (first - start, last - start),
        "frames": frames,
        "pcm": (pcm.clip(-1, 1) * 32767).astype(np.int16),
        "labels": labels(clip, -start, 3 * frames),
    }


def clip_of(kind: str, text: str, voice: str, sound: np.ndarray) -> dict:
    """A clip of recorded speech (samples,), at one loudness."""
    before, after = 1920, 3840
    pcm = np.pad(sound * (0.5 / max(np.abs(sound).max(), 1e-3)), (before, after))
    frames = -(-len(pcm) // FRAME_SIZE)
    pcm = np.pad(pcm, (0, frames * FRAME_SIZE - len(pcm)))
    return {
        "kind": kind,
        "text": text,
        "voice": voice,
        "words": [],
        "speech": (before, before + len(sound)),
        "frames": frames,
        "pcm": (pcm * 32767).astype(np.int16),
        "labels": np.full(3 * frames, NO_LABEL, np.uint8),
    }


def neural_jobs(count: int, readings: list[str]) -> list[tuple[str, str, Voice]]:
    """What Kokoro says, in the order of importance: questions, and what strangers say.

    Of those to be tested there are as many as sentences, up to 250.
    """
    rng = random.Random(2)
    asked = domain.user_sentences("ask")
    varied = sorted({v for text in asked for v in domain.variations(text)})
    rest = domain.others() + domain.statements("ask")
    pools = [("ask", asked), ("ask", varied), ("ask", rest), ("stranger", readings)]
    todo = []
    for (kind, texts), share in zip(pools, (0.6, 0.2, 0.08, 0.12), strict=True):
        for text in rng.sample(texts, min(len(texts), round(share * count))):
            name, draw = rng.choice(NEURAL), rng.random()
            if draw > 0.5:
                name += f"+{rng.choice(NEURAL if draw < 0.75 else ACCENTED)}"
            stretch = rng.uniform(0.8, 1.25)
            todo.append((kind, text, Voice(f"kokoro:{name}", stretch)))
    rng.shuffle(todo)
    tested = domain.user_sentences("test")
    return todo + [
        ("test_neural", text, Voice(f"kokoro:{rng.choice(HELD_OUT_NEURAL)}"))
        for text in rng.sample(tested, min(len(tested), 250, count))
    ]


def at_speeds(clip: dict) -> list[dict]:
    """A clip resampled: as a larger and a smaller person would say it."""
    made = []
    for speed in SPEEDS:
        frames = round(clip["frames"] / speed)
        at = np.arange(frames * FRAME_SIZE) * speed
        pcm = np.interp(at, np.arange(len(clip["pcm"])), clip["pcm"])
        slots = np.arange(3 * frames) * speed
        labels = clip["labels"][slots.astype(int).clip(max=len(clip["labels"]) - 1)]
        first, last = clip["speech"]
        last = min(round(last / speed), len(pcm))
        made.append(
            clip
            | {"pcm": pcm.astype(np.int16), "labels": labels, "frames": frames}
            | {"speech": (round(first / speed), last)}
        )
    return made


def save(clips: list[dict], path: Path) -> None:
    """Write a bank."""
    start = 0
    for clip in clips:
        clip["start"] = start
        start += clip["frames"] * FRAME_SIZE
    bank = {
        "pcm": torch.from_numpy(np.concatenate([c.pop("pcm") for c in clips])),
        "labels": torch.from_numpy(np.concatenate([c.pop("labels") for c in clips])),
        "clips": clips,
    }
    torch.save(bank, path)
    print(f"{path}: {len(clips)} clips, {start / SAMPLE_RATE / 3600:.2f} h")


def jobs(copies: int, readings: list[str]) -> list[tuple[str, str, Voice]]:
    """Everything to be spoken; `readings` are what strangers say."""
    rng, more_rng = random.Random(0), random.Random(1)
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
        # Those that are over soon must be known in any voice.
        short = len(text.split()) <= people.SHORT_WORDS
        for _ in range(2 if short else more_rng.random() < MORE):
            voice = another(more_rng, more_rng.choice(MORE_USERS))
            todo.append(("ask", text, voice))
    for text in readings:
        voice = another(more_rng, more_rng.choice(USERS + MORE_USERS))
        todo.append(("stranger", text, voice))
    for text in domain.user_sentences("test"):
        todo += [("test", text, voice) for voice in rng.sample(HELD_OUT, 3)]
        todo.append(("test_known", text, rng.choice(USERS)))
        todo.append(("test_engine", text, more_rng.choice(HELD_OUT_ENGINE)))
    return todo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--copies", type=int, default=2, help="voices a sentence")
    parser.add_argument("--people", type=Path, help="a folder of recordings")
    parser.add_argument("--neural", type=int, help="speak so much with Kokoro")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    spoken = people.load(args.people) if args.people else []
    readings = people.readings(spoken)
    with multiprocessing.get_context("spawn").Pool() as pool:
        if args.neural:
            clips = pool.map(make, neural_jobs(args.neural, readings), chunksize=4)
            held = [clip for clip in clips if clip["kind"] == "test_neural"]
            said = [clip for clip in clips if clip["kind"] != "test_neural"]
            save(held, args.work / "held_neural.pt")
            save(sum(map(at_speeds, said), []), args.work / "neural.pt")
            return
        clips = pool.map(make, jobs(args.copies, readings), chunksize=16)
    clips += [clip_of(*turn) for turn in people.turns(spoken)]
    clips += [clip_of(*turn) for turn in people.fragments(spoken)]
    clips += [clip_of(*turn) for turn in people.spliced(spoken)]
    # What is trained lies together, for random crops of it.
    clips.sort(key=lambda clip: clip["kind"].startswith("test"))
    save(clips, args.work / "bank.pt")


if __name__ == "__main__":
    main()
