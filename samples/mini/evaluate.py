"""Measure an exported checkpoint: what it answers, when, in which voice, how clearly.

    python evaluate.py WORK FOLDER [--talks N] [--bits 8 4]

Needs WORK/test.pt and WORK/agent.pt of the recipe and pocketsphinx. `--bits` adds runs
with the linear layers of the language model rounded as an affine quantizer does.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from codes import Agent
from converse import Sampler, Spoken, converse, greedy, sampling, words
from nets import Codec, LanguageModel
from recognizer import Recognizer, errors, plain
from safetensors.torch import load_file
from score import Score, score, spoken_frames
from sizes import FRAME_SIZE
from torch import Tensor

GROUPS = {8: 64, 4: 32}


def load(folder: Path) -> tuple[LanguageModel, Codec, dict]:
    """The two networks and the configuration of a checkpoint folder."""
    sizes = json.loads((folder / "config.json").read_text())
    lm, codec = LanguageModel(sizes["lm"]).eval(), Codec(sizes["mimi"]).eval()
    for model, name in ((lm, sizes["moshi_name"]), (codec, sizes["mimi_name"])):
        state = load_file(folder / name)
        model.load_state_dict({k: v.float() for k, v in state.items()})
    return lm, codec, sizes


def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    """A matrix after affine quantizing in groups along its rows."""
    w = weight.unflatten(-1, (-1, group))
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    return (((w - low) / scale).round() * scale + low).flatten(-2)


@torch.no_grad()
def quantize(lm: LanguageModel, bits: int) -> None:
    """Round all matrices of the layers and depformer_in, as the published files do."""
    for name, p in lm.named_parameters():
        if p.dim() == 2 and ("layers" in name or "depformer_in" in name):
            p.copy_(rounded(p, bits, GROUPS[bits]))


@torch.no_grad()
def heard(
    codec: Codec, talks: list[dict], spoken: list[Spoken], tokenizer, recognizer
) -> tuple[int, int]:
    """Word errors of the agent's audio against its own text, and words."""
    wrong = total = 0
    for talk, said in zip(talks, spoken, strict=True):
        pcm = codec.decode(said.codes[None].long())[0].numpy()
        pieces = spoken_frames(said.texts)
        for i, turn in enumerate(talk["turns"]):
            later = talk["turns"][i + 1 : i + 2]
            stop = int(later[0]["start"]) if later else len(said.texts)
            inside = [f for f in pieces if int(turn["end"]) <= f < stop]
            if not inside or turn["interrupted"]:
                continue
            first = inside[0]
            wanted = plain(words(said.texts[first:stop], tokenizer))
            last = min(inside[-1] + 14, stop)
            sound = pcm[max(first - 2, 0) * FRAME_SIZE : last * FRAME_SIZE]
            wrong += errors(wanted, recognizer.hear(sound))
            total += len(wanted)
    return wrong, total


@torch.no_grad()
def round_trip(codec: Codec, agent: Agent, recognizer: Recognizer, voice: str) -> float:
    """Word errors of every sixth reply, through the codec alone."""
    wrong = total = 0
    keys = sorted(key for key in agent.codes if key[1] == voice)[::6]
    for key in keys:
        quiet = agent.constants.silence[:, None]
        codes = torch.cat(
            [quiet.expand(-1, 6), agent.codes[key], quiet.expand(-1, 3)], 1
        )
        sound = codec.decode(codes[None])[0].numpy()
        wrong += errors(plain(key[0]), recognizer.hear(sound))
        total += len(plain(key[0]))
    return wrong / total


def pitch(pcm: np.ndarray) -> float:
    """Median pitch in Hz of the voiced frames."""
    found = []
    for start in range(0, len(pcm) - 1920, 960):
        x = pcm[start : start + 1920]
        if np.square(x).mean() < 1e-3:
            continue
        x = x - x.mean()
        spectrum = np.abs(np.fft.rfft(x, 4096)) ** 2
        correlation = np.fft.irfft(spectrum)
        lags = slice(24000 // 300, 24000 // 65)
        best = int(correlation[lags].argmax()) + lags.start
        if correlation[best] > 0.4 * correlation[0]:
            found.append(24000 / best)
    return float(np.median(found)) if found else 0.0


@torch.no_grad()
def voice_check(
    codec: Codec, talks: list[dict], spoken: list[Spoken]
) -> dict[str, list]:
    """Pitch of the agent's audio by voice prompt."""
    found: dict[str, list] = {"slt": [], "rms": []}
    for talk, said in list(zip(talks, spoken, strict=True))[:40]:
        sound = codec.decode(said.codes[None].long())[0].numpy()
        hertz = pitch(sound)
        if hertz:
            found[talk["voice"]].append(hertz)
    return found


def by_subject(talks: list[dict], result: Score) -> list[str]:
    """Right answers with a fact from the prompt, and to unknown questions."""
    marks = ("My name is ", "open at ", "close at ", "Today we have ", "really love ")
    missed = {(q, a) for q, a, _ in result.wrong}
    lines = []
    for name, chosen in (
        ("facts of the prompt", lambda a: any(m in a for m in marks)),
        ("unknown questions", lambda a: a.startswith("Sorry, I do not know")),
    ):
        turns = [t for talk in talks for t in talk["turns"] if chosen(t["answer"])]
        right = sum((t["question"], t["answer"]) not in missed for t in turns)
        lines.append(f"{name:<19}{right}/{len(turns)}")
    return lines


def silent_run(lm: LanguageModel, talks: list[dict], codec: Codec) -> list[dict]:
    """The first talks' prompts with a silent user instead, 20 seconds."""
    with torch.no_grad():
        silence = codec.encode(torch.zeros(1, 250 * FRAME_SIZE))[0, 0]
    made = []
    for talk in talks[:8]:
        prompt = talk["prompt"]
        rows = torch.full((10, prompt + 250), 3, dtype=torch.int16)
        rows[:, :prompt] = talk["rows"][:, :prompt]
        rows[2:9, prompt] = talk["rows"][2:9, prompt]
        rows[9, prompt:] = silence
        made.append(talk | {"rows": rows, "turns": []})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--talks", type=int, default=160)
    parser.add_argument(
        "--bits", type=int, nargs="*", default=[], choices=tuple(GROUPS)
    )
    args = parser.parse_args()
    torch.manual_seed(1)
    lm, codec, sizes = load(args.folder)
    path = str(args.folder / sizes["tokenizer_name"])
    tokenizer = sentencepiece.SentencePieceProcessor(path)
    agent = Agent.load(args.work / "agent.pt")
    talks = torch.load(args.work / "test.pt", weights_only=False)[: args.talks]
    recognizer = Recognizer(args.work)
    silence = torch.tensor(sizes["silence_codes"])

    for voice in agent.voices:
        wer = round_trip(codec, agent, recognizer, voice)
        print(f"codec round trip {voice}: {wer:.1%} word errors", flush=True)
    quiet = converse(lm, silent_run(lm, talks, codec), greedy, greedy)
    said = sum(bool(spoken_frames(s.texts)) for s in quiet)
    print(f"silent recording: speaks in {said} of {len(quiet)}")

    def run(name: str, text: Sampler, audio: Sampler) -> None:
        start = time.monotonic()
        spoken = converse(lm, talks, text, audio)
        result = score(talks, spoken, tokenizer, silence)
        print(f"\n{name} ({time.monotonic() - start:.0f} s)")
        for line in result.lines() + by_subject(talks, result):
            print(f"  {line}")
        wrong, total = heard(codec, talks[:60], spoken[:60], tokenizer, recognizer)
        print(f"  audio against text {wrong}/{total} = {wrong / total:.1%} word errors")
        if name == "greedy":
            for voice, hertz in voice_check(codec, talks, spoken).items():
                low, high = min(hertz), max(hertz)
                print(f"  pitch, prompt {voice}: {low:.0f} to {high:.0f} Hz")
            for wrong_answer in result.wrong:
                print(f"    {wrong_answer}")
        sys_flush()

    run("greedy", greedy, greedy)
    run("sampled", sampling(0.7, 25), sampling(0.8, 250))
    for bits in args.bits:
        lm, _, _ = load(args.folder)
        quantize(lm, bits)
        run(f"{bits}-bit, groups of {GROUPS[bits]}, greedy", greedy, greedy)


def sys_flush() -> None:
    """Show what is printed so far, also in a pipe."""
    print(end="", flush=True)


if __name__ == "__main__":
    main()
