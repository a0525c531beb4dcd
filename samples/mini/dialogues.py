"""Put training dialogues together from codes.

    python dialogues.py WORK [--chunks N] [--size N]

Needs WORK/tokenizer.model, WORK/agent.pt and WORK/users.pt; writes WORK/chunk_000.pt
and so on, which train_lm.py reads as they come. All on the CPU: only codes are moved.
"""

import argparse
import multiprocessing
import random
from pathlib import Path

import domain
import sentencepiece
import torch
from codes import Agent
from plan import Grid, Plan, Planner
from rooms import ROOMS, Room
from sizes import FRAME_SIZE, config
from torch import Tensor

SHORT, LONG = 288, 704
HEARD = 24
ENDS, LONGEST_REST = 0.5, 12  # recordings that end, at most so many frames later


def sentences(users: dict) -> list[str]:
    """All sentences of users.pt, in the order of the indices in `heard`."""
    return sorted({clip["text"] for clip in users["clips"]})


class Writer:
    """Writes dialogues of one random seed after the other."""

    def __init__(self, work: Path) -> None:
        torch.set_num_threads(1)
        tokenizer = sentencepiece.SentencePieceProcessor(str(work / "tokenizer.model"))
        self.work, self.agent = work, Agent.load(work / "agent.pt")
        users = torch.load(work / "users.pt", weights_only=False)
        self.rooms, self.codes = users["rooms"], users["codes"]
        self.index = {text: i for i, text in enumerate(sentences(users))}
        # What digital silence is heard as, from the end of a sound on.
        self.hush = self.rooms[ROOMS.index(Room())][0]
        self.sizes = config(tokenizer.vocab_size())["lm"]
        text_card, card = self.sizes["text_card"], self.sizes["card"]
        self.grid = Grid(self.agent, tokenizer, text_card, card)
        self.planners = []
        for level in self.rooms:
            fitting = [c for c in users["clips"] if c["level"] == level]
            texts = {c["text"] for c in fitting}
            fitting += [c for c in users["clips"] if c["text"] not in texts]
            self.planners.append(Planner(fitting, self.agent, FRAME_SIZE))

    def user(self, rng: random.Random, plan: Plan, level: int) -> Tensor:
        """The user's semantic codes: a room with the clips in it.

        Some of the recordings end after the last clip; then there is digital silence.
        """
        codes = rng.choice(self.rooms[level])[: plan.frames].clone()
        digital = ROOMS[level].digital()
        for clip, sample in plan.user:
            first = sample // FRAME_SIZE
            spoken = self.codes[slice(*clip["codes_at"])]
            end = (sample + clip["speech"][1]) // FRAME_SIZE
            if digital:
                codes[end:] = self.hush[: max(0, len(codes) - end)]
            room = codes[first : first + len(spoken)]
            room[:] = spoken[: len(room)]
        if plan.user and not digital and rng.random() < ENDS:
            end = first + len(spoken) + rng.randrange(LONGEST_REST)
            codes[end:] = self.hush[: max(0, len(codes) - end)]
        return codes

    def dialogue(self, rng: random.Random, length: int) -> tuple[Tensor, int, Tensor]:
        """A dialogue of as many turns as fit, sometimes of none."""
        silent = rng.random() < 0.04
        return self.lay_out(
            rng, domain.dialogue(rng, "ask", 0 if silent else length // 60), length
        )

    def lay_out(
        self, rng: random.Random, talk: domain.Dialogue, length: int
    ) -> tuple[Tensor, int, Tensor]:
        """Rows (10, length), how many columns are prompt, and what is heard.

        The last are (HEARD, 2): the column in which a sentence of the user ends and its
        index; column 0 where there are fewer sentences.
        """
        voice = rng.choice(tuple(self.agent.voices))
        codes = rng.choice(self.agent.voices[voice][1:])[:, : rng.randint(24, 44)]
        texts, agent = self.grid.prompt(codes, talk.prompt)
        level = rng.randrange(len(ROOMS))
        plan = self.planners[level].plan(rng, talk, voice, length - len(texts))
        spoken_texts, spoken = self.grid.speech(plan, voice)
        sine = self.agent.constants.sine[0].expand(len(texts))
        rows = self.grid.rows(
            torch.cat([texts, spoken_texts]),
            torch.cat([agent, spoken], 1),
            torch.cat([sine, self.user(rng, plan, level).long()]),
        )
        heard = torch.zeros(HEARD, 2, dtype=torch.int32)
        for place, (clip, sample) in zip(heard, plan.user, strict=False):
            end = len(texts) + (sample + clip["speech"][1]) // FRAME_SIZE
            if end + 3 < length:
                place[0], place[1] = end, self.index[clip["text"]]
        return rows, len(texts), heard

    def write(self, number: int, size: int) -> None:
        """One file of `size` short dialogues and a twelfth as many long ones."""
        rng, chunk = random.Random(100 + number), {}
        for kind, length, count in (("short", SHORT, size), ("long", LONG, size // 12)):
            made = [self.dialogue(rng, length) for _ in range(count)]
            chunk[kind] = {
                "rows": torch.stack([rows for rows, _, _ in made]),
                "prompt": torch.tensor([prompt for _, prompt, _ in made]),
                "heard": torch.stack([heard for _, _, heard in made]),
            }
        path = self.work / f"chunk_{number:03d}.pt"
        torch.save(chunk, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)


def work_off(work: Path, numbers: list[int], size: int) -> None:
    """What one process does."""
    writer = Writer(work)
    for number in numbers:
        writer.write(number, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--chunks", type=int, default=400)
    parser.add_argument("--size", type=int, default=1200)
    parser.add_argument("--processes", type=int, default=12)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    numbers = range(args.chunks)
    workers = [
        context.Process(
            target=work_off, args=(args.work, numbers[i :: args.processes], args.size)
        )
        for i in range(args.processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
