"""Figures of conversations: right answers, timing, interruptions."""

from dataclasses import dataclass, field
from statistics import median

import torch
from converse import Spoken, words
from sizes import EPAD, FRAME_RATE, PAD
from torch import Tensor

LAG = 1


@dataclass
class Score:
    """Counts and lists over many conversations; times in seconds."""

    turns: int = 0
    right: int = 0
    missing: int = 0
    talked_over: int = 0
    delays: list[float] = field(default_factory=list)
    stops: list[float] = field(default_factory=list)
    backchannels: list[bool] = field(default_factory=list)
    wrong: list[tuple[str, str, str]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The figures, one a line."""
        n = max(1, self.turns)
        lines = [
            f"right answers      {self.right}/{self.turns} = {self.right / n:.1%}",
            f"no answer          {self.missing}",
            f"talked over        {self.talked_over / n:.1%} of turns",
        ]
        if self.delays:
            low, high = min(self.delays), max(self.delays)
            middle = median(self.delays)
            lines.append(f"reply delay        {middle:.2f} s ({low:.2f} to {high:.2f})")
        if self.stops:
            soon = sum(s <= 0.8 for s in self.stops)
            lines.append(
                f"interrupted        stops in 0.8 s {soon}/{len(self.stops)}, "
                f"median {median(self.stops):.2f} s"
            )
        if self.backchannels:
            said, asked = sum(self.backchannels), len(self.backchannels)
            lines.append(f"backchannels       {said}/{asked} long turns")
        return lines


def spoken_frames(texts: Tensor) -> list[int]:
    """Frames in which a piece of a word stands."""
    return torch.nonzero((texts != PAD) & (texts != EPAD))[:, 0].tolist()


def score(talks: list[dict], spoken: list[Spoken], tokenizer, silence: Tensor) -> Score:
    """Compare what was said with what should have been."""
    total = Score()
    for talk, said in zip(talks, spoken, strict=True):
        turns = talk["turns"]
        pieces = spoken_frames(said.texts)
        loud = (said.codes != silence[:, None]).any(0)
        for i, turn in enumerate(turns):
            following = turns[i + 1]["start"] if i + 1 < len(turns) else len(said.texts)
            after = int(turn["end"]) - 2
            begin = int(turn["question_start"])
            stop = int(following) + (12 if turn["interrupted"] else 0)
            total.turns += 1
            answer = words(said.texts[after:stop], tokenizer)
            if turn["interrupted"]:
                good = bool(answer) and turn["answer"].startswith(answer.rstrip("."))
                rest = loud[int(following) :].tolist()
                quiet = rest.index(False) if False in rest else len(rest)
                total.stops.append((quiet + LAG) / FRAME_RATE)
            else:
                good = answer == turn["answer"]
            total.right += good
            total.missing += not answer
            if not good:
                total.wrong.append((turn["question"], turn["answer"], answer))
            previous = turns[i - 1]["interrupted"] if i else False
            total.talked_over += (
                any(begin + 1 < f < after for f in pieces) and not previous
            )
            replies = [f for f in pieces if after <= f < stop]
            if replies:
                total.delays.append((replies[0] + LAG - turn["end"]) / FRAME_RATE)
            if turn["backchannels"]:
                start = int(turn["start"])
                total.backchannels.append(any(start < f < begin for f in pieces))
    return total
