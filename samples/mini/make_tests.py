"""Make the dialogues to be evaluated on, from audio as a user would send it.

    python make_tests.py WORK [--size N]

Needs WORK/bank.pt, WORK/codec_ear.pt, WORK/tokenizer.model and WORK/agent.pt; writes
WORK/test.pt. Phrasings are not trained ones; most user voices are not either. `--kinds`
has other clips asked, where there are such: test_engine (an engine that was not
trained), test_neural (voices of Kokoro that were not) or test_people (questions put
together from people's words).
"""

import argparse
import random
from pathlib import Path

import domain
import sentencepiece
import torch
from agent import load_codec
from codes import Agent, clip_pcm, load_bank
from plan import Grid, Plan, Planner
from rooms import roughen
from sizes import FRAME_SIZE, config
from torch import Tensor
from training import seed

FRAMES = 225


def mix(bank: dict, plan: Plan) -> Tensor:
    """The user's audio of a dialogue."""
    pcm = torch.zeros(plan.frames * FRAME_SIZE, device=bank["pcm"].device)
    for clip, sample in plan.user:
        sound = clip_pcm(bank, clip)
        room = pcm[sample : sample + len(sound)]
        room += sound[: len(room)]
    return roughen(pcm[None], random.random() < 0.3)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--kinds", nargs="*", default=("test", "test_known"))
    parser.add_argument("--name", default="test.pt")
    args = parser.parse_args()
    seed(5)
    random.seed(5)
    work, rng = args.work, random.Random(5)
    bank = load_bank(work, "bank.pt", "held*.pt")
    codec = load_codec(work / "codec_ear.pt")
    agent = Agent.load(work / "agent.pt")
    tokenizer = sentencepiece.SentencePieceProcessor(str(work / "tokenizer.model"))
    lm = config(tokenizer.vocab_size())["lm"]
    grid = Grid(agent, tokenizer, lm["text_card"], lm["card"])
    clips = [c for c in bank["clips"] if c["kind"] in args.kinds]
    texts = {c["text"] for c in clips}
    clips += [
        c for c in bank["clips"] if c["kind"] == "test" and c["text"] not in texts
    ]
    planner = Planner(clips, agent)
    made = []
    for _ in range(args.size):
        voice = rng.choice(tuple(agent.voices))
        talk = domain.dialogue(rng, "test", 2)
        plan = planner.plan(rng, talk, voice, FRAMES)
        texts, codes = grid.prompt(agent.voices[voice][0][:, :37], talk.prompt)
        spoken_texts, spoken = grid.speech(plan, voice)
        with torch.no_grad():
            user = codec.encode(mix(bank, plan)[None])[0, 0].cpu()
        sine = agent.constants.sine[0].expand(len(texts))
        rows = grid.rows(
            torch.cat([texts, spoken_texts]),
            torch.cat([codes, spoken], 1),
            torch.cat([sine, user]),
        )
        made.append(
            {
                "rows": rows,
                "prompt": len(texts),
                "turns": plan.turns,
                "role": talk.role,
                "prompt_text": talk.prompt,
                "voice": voice,
            }
        )
    torch.save(made, work / args.name)
    print(f"tests: {len(made)} dialogues")


if __name__ == "__main__":
    main()
