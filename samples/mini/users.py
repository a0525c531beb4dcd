"""Encode the users' sentences, each in a few rooms.

    python users.py WORK

Needs WORK/bank.pt and WORK/codec_listen.pt; writes WORK/users.pt: the semantic codes of
every clip amid the noise of a room (one after the other in `codes`), and those of the
rooms alone.
"""

import argparse
from pathlib import Path

import torch
from agent import load_codec
from codes import clip_pcm
from nets import Codec
from rooms import colour_noise
from sizes import FRAME_SIZE
from torch import Tensor
from training import device, seed

LEVELS_DB = (None, -66.0, -52.0, -40.0)
LEAD, TAIL = 12, 2
ROOM_FRAMES = 720
ROOMS = 24
VARIANTS = 2


def noise(count: int, samples: int, level: int, where: torch.device) -> Tensor:
    """Background of a level, other colours for each row."""
    decibels = LEVELS_DB[level]
    if decibels is None:
        return torch.zeros(count, samples, device=where)
    spread = 6 * torch.rand(count, 1, device=where) - 3
    return 10 ** ((decibels + spread) / 20) * colour_noise((count, samples), where)


def narrow(pcm: Tensor) -> Tensor:
    """One voice in four through a telephone's or an old microphone's band."""
    count, samples = pcm.shape
    draw = torch.rand(count, 1, device=pcm.device)
    top = torch.where(draw < 0.25, 3300 + 16000 * draw, 12000.0)
    hertz = torch.linspace(0, 12000, samples // 2 + 1, device=pcm.device)
    return torch.fft.irfft(
        torch.fft.rfft(pcm) * torch.sigmoid((top - hertz) / 200), samples
    )


@torch.no_grad()
def semantic(codec: Codec, pcm: Tensor) -> Tensor:
    """Semantic codes (batch, frames)."""
    return codec.encode(pcm)[:, 0].to(torch.uint8).cpu()


def variants(codec: Codec, bank: dict, clips: list[dict], level: int) -> list[dict]:
    """Clips of about one length, each at a random level and offset within a frame."""
    where = bank["pcm"].device
    frames = max(c["frames"] for c in clips) + LEAD + TAIL + 1
    voice = torch.zeros(len(clips), frames * FRAME_SIZE, device=where)
    offsets = torch.randint(FRAME_SIZE, (len(clips),)).tolist()
    for row, clip, offset in zip(voice, clips, offsets, strict=True):
        sound = clip_pcm(bank, clip)
        row[LEAD * FRAME_SIZE + offset :][: len(sound)] = sound
    gain = 10 ** (torch.rand(len(clips), 1, device=where) * 0.95 - 0.7)
    pcm = narrow(gain * voice) + noise(len(clips), voice.shape[1], level, where)
    codes = semantic(codec, pcm.clamp(-1, 1))
    made = []
    for row, clip, offset in zip(codes, clips, offsets, strict=True):
        first, last = clip["speech"]
        made.append(
            {
                "text": clip["text"],
                "voice": clip["voice"],
                "kind": clip["kind"],
                "speech": (first + offset, last + offset),
                "level": level,
                "codes": row[LEAD : LEAD + clip["frames"] + TAIL + 1].clone(),
            }
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    seed(11)
    torch.set_float32_matmul_precision("highest")
    bank = torch.load(work / "bank.pt", weights_only=False)
    bank["pcm"] = bank["pcm"].to(device())
    codec = load_codec(work / "codec_listen.pt")
    clips = [c for c in bank["clips"] if c["kind"] == "ask"]
    clips.sort(key=lambda c: c["frames"])
    made, size = [], 128
    for i in range(0, len(clips), size):
        for level in torch.randperm(len(LEVELS_DB))[:VARIANTS].tolist():
            made += variants(codec, bank, clips[i : i + size], level)
    rooms = {}
    for level in range(len(LEVELS_DB)):
        pcm = noise(ROOMS, ROOM_FRAMES * FRAME_SIZE, level, device())
        rooms[level] = torch.cat([semantic(codec, part) for part in pcm.split(4)])
    codes, start = torch.cat([clip["codes"] for clip in made]), 0
    for clip in made:
        length = len(clip.pop("codes"))
        clip["codes_at"] = (start, start + length)
        start += length
    torch.save({"clips": made, "codes": codes, "rooms": rooms}, work / "users.pt")
    print(f"users: {len(made)} clips encoded")


if __name__ == "__main__":
    main()
