"""Teach the codec's encoder to hear the same words whatever carries them.

    python train_ear.py WORK [--seconds S]

Needs WORK/bank.pt and WORK/codec_listen.pt; writes WORK/codec_ear.pt. Codebooks and
decoder stay as they are. The old encoder is the teacher: of the agent's clips, in all
codebooks, and of the users', in the semantic codes of the clip as spoken; the new one
hears it through a microphone, in a room, at any level. Phone labels keep it at the
words. Its first filters cannot hear a constant offset.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from agent import load_codec
from bank import NO_LABEL
from codes import load_bank
from nets import HEARS, Codebook, Codec
from rooms import LOWEST_DB, ROOMS, babble, carry, tract
from sizes import config
from speech import PHONES
from torch import Tensor, nn
from train_codec import Data, half
from training import Average, captured, device, optimizer, seed, set_rate

RATE = 6e-4
LOUD = 0.25  # the loudest sample of what the teacher hears
SHARPNESS = 8.0
PHONE = 1.0
GAINS = (2.0, 32.0)
SIZES = 1.25  # formants up to so many times higher or lower


def place(z: Tensor, book: Codebook, chosen: Tensor) -> Tensor:
    """How surely latents (..., dim) have the codes `chosen` (...): cross-entropy."""
    table = book.table()
    scale = table.var(0).sum().clamp(min=1e-6)
    far = torch.cdist(z.flatten(0, -2), table).square()
    return F.cross_entropy(-SHARPNESS * far / scale, chosen.flatten())


@torch.no_grad()
def centre(conv: nn.Conv1d) -> None:
    """Kernels that sum to nothing: a constant offset of the samples is not heard."""
    conv.weight.sub_(conv.weight.mean(2, keepdim=True))


@torch.no_grad()
def spread(conv: nn.Conv1d) -> None:
    """Filters for loud and for quiet sounds, where all were for one loudness."""
    centre(conv)
    low, high = (math.log10(gain) for gain in GAINS)
    gains = torch.logspace(low, high, len(conv.weight), device=conv.weight.device)
    conv.weight.mul_(gains[:, None, None])


@torch.no_grad()
def round_centred(conv: nn.Conv1d) -> None:
    """Such kernels in numbers that float16 has, so that they still sum to nothing."""
    centre(conv)
    top = conv.weight.abs().amax(2, keepdim=True)
    unit = 2.0 ** (top.log2().ceil() - 10)
    steps = (conv.weight / unit).round()
    steps[:, :, 3] -= steps.sum(2)
    conv.weight.copy_(steps * unit)


class Ear:
    """The loss of one batch."""

    def __init__(
        self, codec: Codec, teacher: Codec, data: Data, where: torch.device
    ) -> None:
        self.codec, self.teacher, self.data = codec, teacher, data
        width = config(1)["mimi"]["quantizer"]["dimension"]
        self.phones = nn.Linear(width, 3 * len(PHONES)).to(where)

    def distort(self, pcm: Tensor) -> Tensor:
        """Users as they are heard: each row in a room of its own."""
        rows, samples = pcm.shape
        half_rows = rows // 2
        size = torch.rand(rows, 1, device=pcm.device) * 2 - 1
        pcm = tract(pcm, SIZES**size)
        pcm = torch.cat([pcm[:half_rows], babble(pcm[half_rows:], -24.0)])
        heard = carry(pcm, LOWEST_DB)
        loud = heard.abs().amax(1, keepdim=True)
        sounds = torch.cat([room.sound(1, samples, pcm.device) for room in ROOMS])
        noise = sounds[torch.randint(len(ROOMS), (rows,), device=pcm.device)]
        # Never so loud that a person would not hear the voice.
        most = 0.2 * loud / noise.abs().amax(1, keepdim=True).clamp(min=1e-6)
        return (heard + noise * most.clamp(max=1)).clamp(-1, 1)

    def loss(self) -> Tensor:
        """The sum to minimise; agreement of codes: agents', users'."""
        pcm, labels = self.data.clean()
        agents = self.data.agents
        agent, user = pcm[:agents], pcm[agents:]
        loud = user.abs().amax(1, keepdim=True).clamp(min=1e-4)
        user = user / loud * LOUD
        first, rest = self.codec.quantizer.rvq_first, self.codec.quantizer.rvq_rest
        with torch.no_grad():
            z = self.teacher.latents(torch.cat([agent, user]))
            taught = first.encode(first.project(z))[0][..., 0]
            wanted = rest.project(z[:agents])
        with torch.autocast(pcm.device.type, torch.bfloat16):
            z = self.codec.latents(torch.cat([agent, self.distort(user)]))
        z = z.float()
        heard = first.project(z)
        book = first.codebooks()[0]
        same = book.nearest(heard) == taught
        ours = place(heard[:agents], book, taught[:agents])
        theirs = place(heard[agents:], book, taught[agents:])
        acoustic = (rest.project(z[:agents]) - wanted).square().mean() / wanted.var()
        logits = self.phones(heard).unflatten(-1, (3, -1)).flatten(0, 2)
        phone = F.cross_entropy(
            logits, labels.flatten(), ignore_index=NO_LABEL, label_smoothing=0.05
        )
        total = ours + 2 * theirs + 4 * acoustic + PHONE * phone
        parts = [total, ours, theirs, acoustic, phone]
        parts += [same[:agents].float().mean(), same[agents:].float().mean()]
        return torch.stack(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seconds", type=float, default=230)
    parser.add_argument("--batch", type=int, default=96)
    args = parser.parse_args()
    seed(3)
    where = device()
    bank = load_bank(args.work)
    codec = load_codec(args.work / "codec_listen.pt")
    codec.requires_grad_(False)
    agents = args.batch // 4
    teacher = load_codec(args.work / "codec_listen.pt").requires_grad_(False)
    ear = Ear(codec, teacher, Data(bank, agents, args.batch - agents), where)
    first_conv = codec.encoder.model[0].conv.conv
    spread(first_conv)
    parameters = [*ear.phones.parameters()]
    hearing = [getattr(codec, name) for name in HEARS]
    for module in hearing:
        module.requires_grad_(True)
        parameters += module.parameters()
    for p in parameters:
        p.grad = torch.zeros_like(p)
    opt = optimizer(parameters, RATE)
    average = Average(nn.ModuleList(hearing), 0.998)

    def step() -> Tensor:
        parts = ear.loss()
        parts[0].backward()
        nn.utils.clip_grad_norm_(parameters, 3.0)
        opt.step()
        opt.zero_grad(set_to_none=False)
        centre(first_conv)
        average.update()
        return parts.detach()

    run = captured(step)
    for count, factor in enumerate(average.rounds(args.seconds), 1):
        set_rate(opt, RATE * factor)
        parts = run()
        if count % 100 == 0:
            values = " ".join(f"{v:.3f}" for v in parts.tolist())
            print(f"ear {count}: {values}", flush=True)
    average.settle()
    round_centred(first_conv)
    torch.save(half(codec), args.work / "codec_ear.pt")


if __name__ == "__main__":
    main()
