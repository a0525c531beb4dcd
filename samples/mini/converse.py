"""Let the language model talk: many conversations at once, as the engine would."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from nets import LanguageModel
from sizes import EPAD, PAD
from torch import Tensor
from train_lm import widen

Sampler = Callable[[Tensor], Tensor]


def greedy(logits: Tensor) -> Tensor:
    """The likeliest id."""
    return logits.argmax(-1)


def sampling(temperature: float, top_k: int) -> Sampler:
    """A draw among the k likeliest ids."""

    def sample(logits: Tensor) -> Tensor:
        values, ids = (logits.float() / temperature).topk(min(top_k, logits.shape[-1]))
        draw = torch.multinomial(values.softmax(-1), 1)
        return ids.gather(-1, draw)[..., 0]

    return sample


@dataclass(frozen=True)
class Spoken:
    """What the agent said in one conversation: text ids (n) and codes (8, n)."""

    texts: Tensor
    codes: Tensor


@torch.no_grad()
def converse(
    lm: LanguageModel, talks: list[dict], text: Sampler, audio: Sampler
) -> list[Spoken]:
    """Answer the users of `talks` (rows and prompt length of tokens.py)."""
    where = next(lm.parameters()).device
    config = lm.config
    lengths = [t["rows"].shape[1] for t in talks]
    length, n = max(lengths), len(talks)
    grid = torch.zeros(n, 10, length + 1, dtype=torch.long)
    for row, talk in zip(grid, talks, strict=True):
        size = talk["rows"].shape[1]
        row[:, :size] = talk["rows"].long()
        row[9, size:] = row[9, size - 1]
    grid = grid.to(where)
    prompt = torch.tensor([t["prompt"] for t in talks], device=where)
    heads = config["num_heads"]
    shape = (2, n, heads, length + 1, config["dim"] // heads)
    caches = [torch.zeros(shape, device=where) for _ in lm.transformer.layers]
    first = int(prompt.min())
    h = lm.temporal_step(lm.embed(widen(grid[:, :, : first - 1])), 0, caches)
    for s in range(first, length + 1):
        h = lm.temporal_step(lm.embed(widen(grid[:, :, s - 1 : s])), s - 1, caches)[
            :, 0
        ]
        free = s >= prompt
        token = torch.where(free, text(lm.text_linear(h)), grid[:, 0, s])
        grid[:, 0, s] = token
        past: list[list[Tensor]] = [[] for _ in lm.depformer.layers]
        for c in range(8):
            drawn = audio(lm.depformer_step(h, token, c, past))
            token = torch.where(
                free if c == 0 else s > prompt, drawn, grid[:, 1 + c, s]
            )
            grid[:, 1 + c, s] = token
    spoken = []
    for i, size in enumerate(lengths):
        p = int(prompt[i])
        codes = torch.cat([grid[i, 1:2, p:size], grid[i, 2:9, p + 1 : size + 1]])
        spoken.append(Spoken(grid[i, 0, p:size].cpu(), codes.cpu()))
    return spoken


def words(texts: Tensor, tokenizer) -> str:
    """Text ids as a sentence."""
    return tokenizer.decode([int(i) for i in texts if i not in (PAD, EPAD)])
