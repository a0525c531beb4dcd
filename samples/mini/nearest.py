"""How alike a codec's semantic codes of a sentence are in different voices.

    python nearest.py WORK CODEC...

Of each of 150 sentences the one nearest to it (dynamic time warping of codes) is looked
for among all as two voices of flite say them: the share that finds itself, by engine,
as spoken and as microphones and lines bring it. The sentences are made once
(WORK/probe.pt); every codec is WORK/CODEC.
"""

import argparse
import multiprocessing
import os
import random
from pathlib import Path

import domain
import torch
from agent import load_codec
from bank import make, save
from codes import clip_pcm, load_bank
from nets import Codec
from rooms import Room, carry
from sizes import FRAME_SIZE
from speech import Voice
from torch import Tensor
from training import seed
from users import semantic

SENTENCES = 150
ROOM = Room(-56)
AMONG = [Voice("rms", 1.0, 120, 1.05), Voice("awb")]
VOICES = {
    "festival": [
        Voice("festival:ked_diphone"),
        Voice("festival:cmu_us_slt_arctic_hts"),
    ],
    "flite": [Voice("kal16", 0.95, 110, 1.04), Voice("slt", 1.05, 175, 0.94)],
    "espeak": [Voice("en-us+m5", 1.0, 45), Voice("en-us+f5", 1.05, 50)],
    "pico": [Voice("pico:en-US"), Voice("pico:en-GB")],
    "rhvoice": [Voice("rhvoice:BDL"), Voice("rhvoice:CLB")],
}


def jobs() -> list[tuple[str, str, Voice]]:
    """What is spoken, voice after voice."""
    texts = random.Random(31).sample(domain.user_sentences("test"), SENTENCES)
    voices = [*AMONG, *(voice for many in VOICES.values() for voice in many)]
    return [("test", text, voice) for voice in voices for text in texts]


def far(codec: Codec, some: list[Tensor], others: list[Tensor]) -> Tensor:
    """Distances of series of codes (some, others), divided by their lengths."""
    table = codec.quantizer.rvq_first.codebooks()[0].table()
    between = torch.cdist(table, table)
    a, b = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).long().to(table.device)
        for rows in (some, others)
    )
    cost = between[a.T[:, None, :, None], b.T[None, :, None, :]]
    total = cost.clone()
    for i in range(a.shape[1]):
        for j in range(b.shape[1]):
            if i and j:
                straight = torch.minimum(total[i - 1, j - 1], total[i - 1, j])
                total[i, j] += torch.minimum(straight, total[i, j - 1])
            elif i or j:
                total[i, j] += total[max(i - 1, 0), max(j - 1, 0)]
    rows = torch.tensor([len(row) for row in some], device=table.device)[:, None]
    columns = torch.tensor([len(row) for row in others], device=table.device)[None]
    at = torch.arange(len(a), device=table.device)[:, None]
    to = torch.arange(len(b), device=table.device)[None]
    return total[rows - 1, columns - 1, at, to] / (rows + columns)


@torch.no_grad()
def codes(codec: Codec, bank: dict, clips: list[dict], noisy: bool) -> list[Tensor]:
    """Semantic codes of clips, as spoken or as they are brought."""
    frames = max(clip["frames"] for clip in clips) + 2
    pcm = torch.zeros(len(clips), frames * FRAME_SIZE, device=bank["pcm"].device)
    for row, clip in zip(pcm, clips, strict=True):
        sound = clip_pcm(bank, clip)
        row[700:][: len(sound)] = sound
    if noisy:
        pcm = carry(pcm, ROOM.lowest()) + ROOM.sound(*pcm.shape, pcm.device)
    found = semantic(codec, pcm.clamp(-1, 1))
    return [row[1 : clip["frames"] - 1] for row, clip in zip(found, clips, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("codecs", nargs="+")
    args = parser.parse_args()
    if not (args.work / "probe.pt").exists():
        os.environ["OMP_NUM_THREADS"] = "1"  # of each process
        with multiprocessing.get_context("spawn").Pool() as pool:
            save(pool.map(make, jobs(), chunksize=4), args.work / "probe.pt")
    bank = load_bank(args.work, "probe.pt")
    spoken = list(zip(*[iter(bank["clips"])] * SENTENCES, strict=True))
    names = [name for name, voices in VOICES.items() for _ in voices]
    for name in args.codecs:
        seed(31)
        codec = load_codec(args.work / name)
        among = [codes(codec, bank, clips, False) for clips in spoken[: len(AMONG)]]
        shares: dict[str, list[float]] = {}
        for voice, clips in zip(names, spoken[len(AMONG) :], strict=True):
            for noisy in (False, True):
                said = codes(codec, bank, clips, noisy)
                right = [
                    (far(codec, said, other).argmin(1).cpu() == torch.arange(SENTENCES))
                    for other in among
                ]
                share = torch.stack(right).float().mean().item()
                shares.setdefault(voice + " noisy" * noisy, []).append(share)
        means = {voice: sum(each) / len(each) for voice, each in shares.items()}
        mean = sum(means.values()) / len(means)
        told = ", ".join(f"{voice} {share:.0%}" for voice, share in means.items())
        print(f"{name}: {mean:.1%} ({told})", flush=True)


if __name__ == "__main__":
    main()
