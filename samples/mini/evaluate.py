"""Measure an exported checkpoint: what it answers, when, in which voice, how clearly.

    python evaluate.py WORK FOLDER [--talks N] [--bits 8 4]

Needs WORK/test.pt and WORK/agent.pt of the recipe and pocketsphinx. `--bits` adds runs
with the linear layers of the language model rounded as an affine quantizer does.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import domain
import numpy as np
import sentencepiece
import torch
from codes import Agent
from converse import Sampler, Spoken, converse, greedy, sampling, words
from nets import Codec, LanguageModel
from plan import Grid
from recognizer import Recognizer, errors, plain
from safetensors.torch import load_file
from score import score, spoken_frames
from sizes import FRAME_SIZE, PAD
from torch import Tensor

GROUPS = {8: 64, 4: 32}
BETWEEN_VOICES = 130.0  # Hz: slt speaks at about 170, rms at about 100


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


def by_subject(talks: list[dict], spoken: list[Spoken], tokenizer, silence) -> str:
    """Right answers that need a fact of the prompt, to unknown questions, to others."""
    right, asked = Counter(), Counter()
    for talk, said in zip(talks, spoken, strict=True):
        missed = {(q, a) for q, a, _ in score([talk], [said], tokenizer, silence).wrong}
        for turn in talk["turns"]:
            asked[turn["subject"]] += 1
            good = (turn["question"], turn["answer"]) not in missed
            right[turn["subject"]] += good
    found = (f"{kind} {right[kind]}/{asked[kind]}" for kind in sorted(asked))
    return f"by subject         {', '.join(found)}"


def of_two_roles(talks: list[dict], agent: Agent, grid: Grid) -> list[dict]:
    """First questions that several roles answer, each put to two roles without facts.

    Two talks follow one another for each such question; only the prompts differ.
    """
    intents = {}
    for intent in domain.domain()["intent"]:
        intents |= {text: intent for text in domain.questions(intent, "test")}
    made = []
    for i, talk in enumerate(talks):
        turn = talk["turns"][0]
        intent = intents.get(turn["question"])
        if intent is None or turn["interrupted"] or turn["backchannels"]:
            continue
        answers = {role: domain.reply(intent, role, {}) for role in domain.ROLES}
        roles = [r for r, a in answers.items() if a != domain.domain()["unknown"]]
        two = [roles[i % len(roles)], roles[(i + 1) % len(roles)]] if roles else []
        if len({answers[role] for role in two}) < 2:
            continue
        codes = agent.voices[talk["voice"]][0][:, :37]
        user = talk["rows"][9, talk["prompt"] :].long()
        for role in two:
            prompts = domain.domain()["roles"][role]
            prompt = next(p for p in prompts if not domain.slots(p))
            texts, spoken = grid.prompt(codes, prompt)
            sine = agent.constants.sine[0].expand(len(texts))
            blank = torch.zeros(8, len(user), dtype=torch.long)
            rows = grid.rows(
                torch.cat([texts, torch.full_like(user, PAD)]),
                torch.cat([spoken, blank], 1),
                torch.cat([sine, user]),
            )
            asked = turn | {"answer": answers[role]}
            made.append(talk | {"rows": rows, "prompt": len(texts), "turns": [asked]})
    return made


def both_right(lm: LanguageModel, talks: list[dict], tokenizer) -> int:
    """In how many pairs both roles give their own answer to the one question."""
    right = []
    for talk, said in zip(talks, converse(lm, talks, greedy, greedy), strict=True):
        turn = talk["turns"][0]
        first = int(turn["end"]) - 2
        answer = words(said.texts[first : first + 50], tokenizer)
        right.append(answer.startswith(turn["answer"]))
    return sum(a and b for a, b in zip(right[::2], right[1::2], strict=True))


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
    parser.add_argument("--talks", type=int, default=320)
    parser.add_argument(
        "--bits", type=int, nargs="*", default=[], choices=tuple(GROUPS)
    )
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_flush_denormal(True)
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
    grid = Grid(agent, tokenizer, sizes["lm"]["text_card"], sizes["lm"]["card"])
    pairs = of_two_roles(talks, agent, grid)
    right = both_right(lm, pairs, tokenizer)
    print(f"one question to two roles: both right {right} of {len(pairs) // 2}")

    def run(name: str, text: Sampler, audio: Sampler) -> None:
        start = time.monotonic()
        spoken = converse(lm, talks, text, audio)
        result = score(talks, spoken, tokenizer, silence)
        print(f"\n{name} ({time.monotonic() - start:.0f} s)")
        for line in result.lines():
            print(f"  {line}")
        print(f"  {by_subject(talks, spoken, tokenizer, silence)}")
        wrong, total = heard(codec, talks[:60], spoken[:60], tokenizer, recognizer)
        print(f"  audio against text {wrong}/{total} = {wrong / total:.1%} word errors")
        if name == "greedy":
            for voice, hertz in voice_check(codec, talks, spoken).items():
                low, high = min(hertz), max(hertz)
                own = sum((h > BETWEEN_VOICES) == (voice == "slt") for h in hertz)
                print(
                    f"  pitch, prompt {voice}: {low:.0f} to {high:.0f} Hz, "
                    f"its own in {own} of {len(hertz)}"
                )
            for wrong_answer in result.wrong:
                print(f"    {wrong_answer}")
        print(end="", flush=True)

    run("greedy", greedy, greedy)
    run("sampled", sampling(0.7, 25), sampling(0.8, 250))
    for bits in args.bits:
        lm, _, _ = load(args.folder)
        quantize(lm, bits)
        run(f"{bits}-bit, groups of {GROUPS[bits]}, greedy", greedy, greedy)


if __name__ == "__main__":
    main()
