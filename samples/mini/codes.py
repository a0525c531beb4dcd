"""The agent's side as codes: its clips, its voices, its constants."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from nets import Codec
from prompts import loudness
from sizes import FRAME_SIZE
from torch import Tensor
from training import device

LEAD = 30
TAIL = 2


@dataclass(frozen=True)
class Constants:
    """Eight codes each for a silent agent and for the user's tone while prompting."""

    silence: Tensor
    sine: Tensor


@torch.no_grad()
def constants(codec: Codec) -> Constants:
    """The steady codes of digital silence and of 440 Hz at amplitude 0.5."""
    where = next(codec.parameters()).device
    t = torch.arange(100 * FRAME_SIZE, device=where) / 24000
    tone = 0.5 * torch.sin(2 * math.pi * 440 * t)
    codes = codec.encode(torch.stack([torch.zeros_like(tone), tone]))
    silence, sine = codes[:, :, 40:].mode(-1).values
    steady = [(c[:, 40:] == v[:, None]).float().mean().item() for c, v in
              zip(codes, (silence, sine), strict=True)]  # fmt: skip
    print(f"constants: silence {steady[0]:.0%} steady, sine {steady[1]:.0%}")
    return Constants(silence.cpu(), sine.cpu())


def load_bank(work: Path, *names: str) -> dict:
    """Banks of WORK as one, those of training or `names`, samples on the device."""
    patterns = names or ("neural*.pt", "bank.pt")
    files = [file for pattern in patterns for file in sorted(work.glob(pattern))]
    banks = [torch.load(file, weights_only=False) for file in files]
    start = 0
    for bank in banks:
        for clip in bank["clips"]:
            clip["start"] += start
        start += len(bank["pcm"])
    return {
        "pcm": torch.cat([bank["pcm"] for bank in banks]).to(device()),
        "labels": torch.cat([bank["labels"] for bank in banks]).to(device()),
        "clips": [clip for bank in banks for clip in bank["clips"]],
    }


def clip_pcm(bank: dict, clip: dict) -> Tensor:
    """A clip of the bank as float32."""
    start = clip["start"]
    return bank["pcm"][start : start + clip["frames"] * FRAME_SIZE].float() / 32768


@torch.no_grad()
def agent_codes(codec: Codec, bank: dict, silence: Tensor) -> dict[tuple, Tensor]:
    """Codes (8, frames + TAIL) of every agent clip after silence, by (text, voice)."""
    clips = [c for c in bank["clips"] if c["kind"] == "agent"]
    longest = max(c["frames"] for c in clips) + LEAD + TAIL
    result = {}
    for i in range(0, len(clips), 32):
        group = clips[i : i + 32]
        pcm = torch.zeros(len(group), longest * FRAME_SIZE, device=bank["pcm"].device)
        for row, clip in zip(pcm, group, strict=True):
            sound = clip_pcm(bank, clip)
            row[LEAD * FRAME_SIZE :][: len(sound)] = sound
        codes = codec.encode(pcm).cpu()
        for row, clip in zip(codes, group, strict=True):
            key = (clip["text"], clip["voice"])
            result[key] = row[:, LEAD : LEAD + clip["frames"] + TAIL].clone()
    return result


@dataclass
class Agent:
    """What the agent's side is made of."""

    constants: Constants
    codes: dict[tuple[str, str], Tensor]
    voices: dict[str, list[Tensor]]
    words: dict[tuple[str, str], list[tuple[float, str]]]

    def save(self, path: Path) -> None:
        torch.save(asdict(self), path)

    @staticmethod
    def load(path: Path) -> "Agent":
        stored = torch.load(path, weights_only=False)
        return Agent(**stored | {"constants": Constants(**stored["constants"])})


@torch.no_grad()
def make_agent(codec: Codec, bank: dict) -> Agent:
    """Encode the agent's clips and the voice prompts."""
    fixed = constants(codec)
    voices: dict[str, list[Tensor]] = {"slt": [], "rms": []}
    words = {}
    for clip in bank["clips"]:
        if clip["kind"] == "voice":
            pcm = clip_pcm(bank, clip)
            gain = 10 ** ((-24 - loudness(pcm.cpu().numpy())) / 20)
            voices[clip["voice"]].append(codec.encode(gain * pcm[None])[0].cpu())
        elif clip["kind"] == "agent":
            words[clip["text"], clip["voice"]] = clip["words"]
    return Agent(fixed, agent_codes(codec, bank, fixed.silence), voices, words)


def splice(agent: Agent, families: list[list[tuple[str, int]]]) -> dict[tuple, tuple]:
    """Let replies that differ in one word begin with the same codes.

    A family holds (reply, index of the word that differs). Each voice's clips get the
    beginning of the family's first one: otherwise the codes of the first frames would
    already tell the word, and the model would choose it before it looks at the prompt.
    Returns what was done: of each such (text, voice) the text whose beginning it has,
    that beginning's frames, and the frame from which on it is itself.
    """
    done = {}
    for voice in agent.voices:
        for family in families:
            model, index = family[0]
            head = int(agent.words[model, voice][index][0] * 12.5)
            beginning = agent.codes[model, voice][:, :head]
            times = agent.words[model, voice][:index]
            for text, _ in family[1:]:
                words = agent.words[text, voice]
                cut = int(words[index][0] * 12.5)
                shift = (head - cut) / 12.5
                rest = agent.codes[text, voice][:, cut:]
                agent.codes[text, voice] = torch.cat([beginning, rest], 1)
                moved = [(time + shift, word) for time, word in words[index:]]
                agent.words[text, voice] = times + moved
                done[text, voice] = (model, head, cut)
    return done
