"""Encode what users say, each clip in a few rooms; some of it without any sense.

Questions once in the voice they have and once in one bent from it.

    python users.py WORK

Needs WORK/bank.pt and WORK/codec_ear.pt; writes WORK/users.pt: the semantic codes of
every clip as a microphone in a room brings it (one after the other in `codes`), and
those of the rooms alone.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import domain
import torch
import torch.nn.functional as F
from agent import load_codec
from codes import clip_pcm, load_bank
from nets import Codec
from people import LONGEST_PAUSE_S, LONGEST_S, SHORTEST_S
from rooms import RATE, ROOMS, carry, tract
from sizes import FRAME_SIZE
from torch import Tensor
from training import device, seed

LEAD, TAIL = 12, 2
ROOM_FRAMES = 720
COPIES = 24  # of a room's sound
VARIANTS = {"ask": 2, "stranger": 3}  # rooms of a clip
FASTER, SHORTER = (0.86, 1.16), (0.85, 1.2)  # than the clip: speed, the vocal tract
RESHAPED = 1500
PIECE_S = (0.12, 0.5)


def reshape(rng: random.Random, bank: dict, clips: list[dict]) -> Tensor:
    """Speech without sense: pieces of a voice's clips, with pauses, (samples,)."""
    parts, length, wanted = [], 0.0, rng.uniform(SHORTEST_S, LONGEST_S)
    while length < wanted:
        sound = clip_pcm(bank, rng.choice(clips))
        size = int(rng.uniform(*PIECE_S) * RATE)
        first = rng.randrange(max(1, len(sound) - size))
        piece = sound[first : first + size].clone()
        fade = min(120, len(piece) // 2)
        ramp = torch.linspace(0, 1, fade, device=piece.device)
        piece[:fade] *= ramp
        piece[len(piece) - fade :] *= ramp.flip(0)
        parts.append(piece)
        if rng.random() < 0.12:
            pause_s = rng.uniform(0.15, LONGEST_PAUSE_S)
            parts.append(piece.new_zeros(int(pause_s * RATE)))
        length = sum(map(len, parts)) / RATE
    return torch.cat(parts)


def reshaped(
    rng: random.Random, bank: dict, count: int
) -> Iterator[tuple[dict, Tensor]]:
    """Clips of speech without sense, each in one voice."""
    voices: dict[str, list[dict]] = {}
    for clip in bank["clips"]:
        if clip["kind"] in VARIANTS:
            voices.setdefault(clip["voice"], []).append(clip)
    for _ in range(count):
        name = rng.choice(sorted(voices))
        sound = reshape(rng, bank, voices[name])
        frames = -(-len(sound) // FRAME_SIZE) + 2
        clip = {"text": domain.STRANGER, "voice": name, "kind": "stranger"}
        yield clip | {"speech": (0, len(sound)), "frames": frames}, sound


def bent(rng: random.Random, clip: dict, sound: Tensor) -> tuple[dict, Tensor]:
    """A clip in another voice: pitch and tempo by one factor, formants by another."""
    factor = rng.uniform(*FASTER)
    sound = F.interpolate(sound[None, None], scale_factor=1 / factor, mode="linear")
    sound = sound[0, 0]
    first, last = (round(sample / factor) for sample in clip["speech"])
    frames = -(-len(sound) // FRAME_SIZE)
    size = rng.uniform(*SHORTER) / factor
    return clip | {
        "speech": (first, min(last, len(sound))), "frames": frames, "size": size,
    }, sound  # fmt: skip


@torch.no_grad()
def semantic(codec: Codec, pcm: Tensor) -> Tensor:
    """Semantic codes (batch, frames)."""
    first = codec.quantizer.rvq_first
    codes = first.codebooks()[0].nearest(first.project(codec.latents(pcm)))
    return codes.to(torch.uint8).cpu()


def heard(codec: Codec, sounds: list[tuple[dict, Tensor]], room: int) -> list[dict]:
    """Clips of about one length in a room, each at a random offset within a frame."""
    where = sounds[0][1].device
    frames = max(clip["frames"] for clip, _ in sounds) + LEAD + TAIL + 1
    voice = torch.zeros(len(sounds), frames * FRAME_SIZE, device=where)
    sizes = torch.tensor([[clip.get("size", 1.0)] for clip, _ in sounds], device=where)
    offsets = torch.randint(FRAME_SIZE, (len(sounds),)).tolist()
    for row, (_, sound), offset in zip(voice, sounds, offsets, strict=True):
        row[LEAD * FRAME_SIZE + offset :][: len(sound)] = sound
    voice = torch.where(sizes == 1, voice, tract(voice, sizes))
    pcm = carry(voice, ROOMS[room].lowest()) + ROOMS[room].sound(*voice.shape, where)
    codes = semantic(codec, pcm.clamp(-1, 1))
    made = []
    for row, (clip, _), offset in zip(codes, sounds, offsets, strict=True):
        first, last = clip["speech"]
        made.append(
            {
                "text": clip["text"],
                "voice": clip["voice"],
                "kind": clip["kind"],
                "frames": clip["frames"],
                "speech": (first + offset, last + offset),
                "level": room,
                "codes": row[LEAD : LEAD + clip["frames"] + TAIL + 1].clone(),
            }
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--reshaped", type=int, default=RESHAPED)
    args = parser.parse_args()
    work, rng = args.work, random.Random(11)
    seed(11)
    torch.set_float32_matmul_precision("highest")
    bank = load_bank(work)
    codec = load_codec(work / "codec_ear.pt")
    sounds = [
        (clip, clip_pcm(bank, clip))
        for clip in bank["clips"]
        if clip["kind"] in VARIANTS
    ]
    sounds += reshaped(rng, bank, args.reshaped)
    sounds += [bent(rng, *s) for s in sounds if s[0]["kind"] == "ask"]
    sounds.sort(key=lambda s: s[0]["frames"])
    made = []
    while sounds:
        # As many as fit into memory at the length of the longest.
        size = max(4, 12000 // (sounds[-1][0]["frames"] + 1))
        some, sounds = sounds[-size:], sounds[:-size]
        count = max(VARIANTS[clip["kind"]] for clip, _ in some)
        for times, room in enumerate(rng.sample(range(len(ROOMS)), count)):
            there = [s for s in some if VARIANTS[s[0]["kind"]] > times]
            made += heard(codec, there, room)
    rooms = {}
    for number, room in enumerate(ROOMS):
        pcm = room.sound(COPIES, ROOM_FRAMES * FRAME_SIZE, device())
        rooms[number] = torch.cat([semantic(codec, part) for part in pcm.split(4)])
    codes, start = torch.cat([clip["codes"] for clip in made]), 0
    for clip in made:
        length = len(clip.pop("codes"))
        clip["codes_at"] = (start, start + length)
        start += length
    torch.save({"clips": made, "codes": codes, "rooms": rooms}, work / "users.pt")
    print(f"users: {len(made)} clips encoded")


if __name__ == "__main__":
    main()
