"""Train the language model on the dialogues of dialogues.py.

    python train_lm.py WORK [--seconds S]

Starts as soon as a chunk is there and takes up the others as they come; writes
WORK/lm.pt. The users' acoustic codebooks are not used: they hardly help and overfit.
"""

import argparse
import time
from pathlib import Path

import domain
import sentencepiece
import torch
import torch.nn.functional as F
from dialogues import LONG, SHORT
from nets import LanguageModel
from sizes import PAD, config
from torch import Tensor, nn
from training import Average, Clock, captured, cosine, device, optimizer, seed, set_rate

RATE = 1.5e-3


class Store:
    """Training rows on the GPU, filled as chunks appear."""

    def __init__(self, work: Path, kind: str, length: int, where: torch.device) -> None:
        self.work, self.kind, self.length, self.where = work, kind, length, where
        self.rows = torch.zeros(0, 10, length, dtype=torch.int16, device=where)
        self.prompt = torch.zeros(0, dtype=torch.long, device=where)
        self.count = torch.zeros((), device=where)
        self.seen: set[Path] = set()

    def reserve(self, size: int) -> None:
        self.rows = self.rows.new_zeros(size, 10, self.length)
        self.prompt = self.prompt.new_zeros(size)

    def refresh(self) -> int:
        """Take up new chunks; how many chunks there are."""
        for path in sorted(set(self.work.glob("chunk_*.pt")) - self.seen):
            data = torch.load(path)[self.kind]
            first = int(self.count)
            last = min(first + len(data["rows"]), len(self.rows))
            self.rows[first:last] = data["rows"][: last - first].to(self.where)
            self.prompt[first:last] = data["prompt"][: last - first].to(self.where)
            self.count.fill_(last)
            self.seen.add(path)
        return len(self.seen)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        pick = (torch.rand(size, device=self.where) * self.count).long()
        return self.rows[pick].long(), self.prompt[pick]


def widen(rows: Tensor) -> Tensor:
    """Rows (batch, 10, time) as all 17 streams, the users' acoustic ones absent."""
    absent = rows.new_full((rows.shape[0], 7, rows.shape[2]), -1)
    return torch.cat([rows, absent], 1)


def blur(rows: Tensor, prompt: Tensor, card: int) -> Tensor:
    """Wrong agent codes and lost user codes, as free running and noise bring them."""
    rows = rows.clone()
    column = torch.arange(rows.shape[2], device=rows.device)
    talking = (column[None] >= prompt[:, None])[:, None]
    agent = rows[:, 1:9]
    wrong = torch.rand(agent.shape, device=rows.device) < 0.04
    random_codes = torch.randint(card, agent.shape, device=rows.device)
    rows[:, 1:9] = torch.where(wrong & talking, random_codes, agent)
    user = rows[:, 9:]
    lost = torch.rand(user.shape, device=rows.device) < 0.03
    gap = (torch.rand(user.shape, device=rows.device) < 0.015).float()
    lost |= F.max_pool1d(F.pad(gap, (3, 0)), 4, 1) > 0
    rows[:, 9:] = torch.where(lost & talking, -1, user)
    return rows


class Trainer:
    """The loss of one batch of a store."""

    def __init__(self, lm: LanguageModel, silence: Tensor, is_fact: Tensor) -> None:
        self.lm, self.silence, self.is_fact = lm, silence, is_fact
        self.card = lm.config["card"]

    def loss(self, store: Store, size: int) -> Tensor:
        """The sum to minimise, text, semantic and acoustic loss, accuracies."""
        lm = self.lm
        rows, prompt = store.batch(size)
        fed = widen(blur(rows[:, :, :-1], prompt, self.card))
        target = rows[:, :, 1:]
        column = torch.arange(1, rows.shape[2], device=rows.device)
        talking = column[None] >= prompt[:, None]
        with torch.autocast(rows.device.type, torch.bfloat16):
            x = F.dropout(lm.embed(fed), 0.1)
            h = lm.temporal(x)
            logits = lm.text_linear(h).float()
        text = target[:, 0]
        weight = torch.where(text == PAD, 0.3, 1.0) * talking
        weight = torch.where(self.is_fact[text], 6.0 * weight, weight)
        losses = F.cross_entropy(logits.transpose(1, 2), text, reduction="none")
        text_loss = (losses * weight).sum() / weight.sum()
        spoken = (text != PAD) & talking
        right = ((logits.argmax(-1) == text) & spoken).sum() / spoken.sum()

        quiet = (target[:, 1:9] == self.silence[None, :, None]).all(1)
        keep = torch.where(quiet, 0.08, 1.0) * talking
        draw = torch.rand(keep.shape, device=keep.device).clamp(min=1e-9).log()
        score = torch.where(keep > 0, draw / keep.clamp(min=1e-3), float("-inf"))
        count = size * rows.shape[2] // 4
        chosen = score.flatten().topk(count).indices
        valid = talking.flatten()[chosen].float()
        wanted = target[:, 1:9].transpose(1, 2).reshape(-1, 8)[chosen]
        before = torch.cat([text.flatten()[chosen, None], wanted[:, :-1]], 1)
        with torch.autocast(rows.device.type, torch.bfloat16):
            audio = lm.depformer_logits(h.flatten(0, 1)[chosen], before).float()
        losses = F.cross_entropy(
            audio.flatten(0, 1), wanted.T.flatten(), reduction="none"
        ).view(8, count)
        losses = (losses * valid).sum(1) / valid.sum()
        hit = ((audio.argmax(-1) == wanted.T) * valid).sum(1) / valid.sum()
        semantic, acoustic = losses[0], losses[1:].mean()
        total = text_loss + (2 * semantic + 3 * acoustic) / 2
        parts = [total, text_loss, semantic, acoustic, right, hit[0], hit[1:].mean()]
        return torch.stack(parts)


def initialize(lm: LanguageModel) -> None:
    """Scaled embeddings and outputs."""
    for name, p in lm.named_parameters():
        if "emb" in name:
            nn.init.normal_(p, std=0.1 if "depformer" not in name else 0.3)
        if name.endswith(("out_proj.weight", "linear_out.weight")):
            p.data.mul_(0.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    seed(7)
    work, where = args.work, device()
    stores = {
        "short": Store(work, "short", SHORT, where),
        "long": Store(work, "long", LONG, where),
    }
    for store in stores.values():
        store.reserve(150000 if store.kind == "short" else 12500)
        while store.refresh() < 1:
            time.sleep(1)
    tokenizer = sentencepiece.SentencePieceProcessor(str(work / "tokenizer.model"))
    lm = LanguageModel(config(tokenizer.vocab_size())["lm"]).to(where)
    initialize(lm)
    for layer in lm.transformer.layers:
        layer.dropout = 0.1
    saved = work / "lm.pt"
    if saved.exists():
        lm.load_state_dict(torch.load(saved, map_location=where))
    silence = torch.load(work / "agent.pt", weights_only=False)["constants"]["silence"]
    facts = [fact for values in domain.domain()["facts"].values() for fact in values]
    is_fact = torch.zeros(tokenizer.vocab_size(), dtype=torch.bool)
    is_fact[[tokenizer.encode(fact)[0] for fact in facts]] = True
    trainer = Trainer(lm, silence.to(where), is_fact.to(where))
    parameters = list(lm.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    opt = optimizer(parameters, RATE, (0.9, 0.98), 0.05)
    average = Average(lm, 0.998)

    def step(kind: str, size: int) -> Tensor:
        parts = trainer.loss(stores[kind], size)
        parts[0].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=False)
        average.update()
        return parts.detach()

    long_size = max(1, args.batch * SHORT // LONG)
    runs = {
        "short": captured(lambda: step("short", args.batch)),
        "long": captured(lambda: step("long", long_size)),
    }
    clock, count = Clock(args.seconds), 0
    while not clock.over():
        set_rate(opt, RATE * cosine(clock.fraction(), floor=0.01))
        parts = runs["long" if count % 5 == 4 else "short"]()
        count += 1
        if count % 100 == 0:
            values = " ".join(f"{v:.3f}" for v in parts.tolist())
            print(f"lm {count} {clock.elapsed():.0f} s: {values}", flush=True)
            chunks = [store.refresh() for store in stores.values()]
            if count % 1000 == 0:
                print(f"lm: {chunks[0]} chunks", flush=True)
    average.swap()
    torch.save({k: v.bfloat16() for k, v in lm.state_dict().items()}, saved)


if __name__ == "__main__":
    main()
