"""Train the language model on the dialogues of dialogues.py.

    python train_lm.py WORK [--seconds S] [--seed N]

Starts as soon as a chunk is there and takes up the others as they come; writes
WORK/lm_begin.pt after the first round, from which another seed goes on, and
WORK/lm_N.pt, of all of which export.py takes the mean. The users' acoustic codebooks
are not used: they hardly help and overfit.

Two losses help to learn and are not needed afterwards: where a sentence of the user has
ended, its words must be readable from the hidden vector (a layer that is thrown away);
and where a fact of the role prompt is said, one head of the last layer must look at it.
"""

import argparse
import time
from pathlib import Path

import domain
import sentencepiece
import torch
import torch.nn.functional as F
from agent import load_codec
from dialogues import HEARD, LONG, SHORT, sentences
from nets import LanguageModel
from sizes import PAD, config
from torch import Tensor, nn
from training import Average, captured, device, optimizer, seed, set_rate

RATE = 1.5e-3
COPY_HEAD = 0
WRONG, SIMILAR = 0.02, 0.08  # of the user's codes: any other, one of NEAR like it
NEAR = 8


class Store:
    """Training rows on the GPU, filled as chunks appear."""

    def __init__(self, work: Path, kind: str, length: int, where: torch.device) -> None:
        self.work, self.kind, self.length, self.where = work, kind, length, where
        self.rows = torch.zeros(0, 10, length, dtype=torch.int16, device=where)
        self.prompt = torch.zeros(0, dtype=torch.long, device=where)
        self.heard = torch.zeros(0, HEARD, 2, dtype=torch.int32, device=where)
        self.count = torch.zeros((), device=where)
        self.seen: set[Path] = set()

    def reserve(self, size: int) -> None:
        self.rows = self.rows.new_zeros(size, 10, self.length)
        self.prompt = self.prompt.new_zeros(size)
        self.heard = self.heard.new_zeros(size, HEARD, 2)

    def refresh(self) -> int:
        """Take up new chunks; how many chunks there are."""
        for path in sorted(set(self.work.glob("chunk_*.pt")) - self.seen):
            data = torch.load(path)[self.kind]
            first = int(self.count)
            last = min(first + len(data["rows"]), len(self.rows))
            self.rows[first:last] = data["rows"][: last - first].to(self.where)
            self.prompt[first:last] = data["prompt"][: last - first].to(self.where)
            self.heard[first:last] = data["heard"][: last - first].to(self.where)
            self.count.fill_(last)
            self.seen.add(path)
        return len(self.seen)

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        pick = (torch.rand(size, device=self.where) * self.count).long()
        return self.rows[pick].long(), self.prompt[pick], self.heard[pick].long()


def widen(rows: Tensor) -> Tensor:
    """Rows (batch, 10, time) as all 17 streams, the users' acoustic ones absent."""
    absent = rows.new_full((rows.shape[0], 7, rows.shape[2]), -1)
    return torch.cat([rows, absent], 1)


def blur(rows: Tensor, prompt: Tensor, near: Tensor) -> Tensor:
    """Wrong agent codes, lost and similar user codes, as noise and frames bring them.

    `near` (card, n) are the codes most like each one: another offset within the frame
    changes a third of them, mostly to such.
    """
    card = len(near)
    rows = rows.clone()
    column = torch.arange(rows.shape[2], device=rows.device)
    talking = (column[None] >= prompt[:, None])[:, None]
    agent = rows[:, 1:9]
    wrong = torch.rand(agent.shape, device=rows.device) < 0.04
    random_codes = torch.randint(card, agent.shape, device=rows.device)
    rows[:, 1:9] = torch.where(wrong & talking, random_codes, agent)
    user = rows[:, 9:]
    misheard = torch.randint(card, user.shape, device=rows.device)
    some = torch.randint(near.shape[1], user.shape, device=rows.device)
    similar = near[user.clamp(max=card - 1), some]
    draw = torch.rand(user.shape, device=rows.device)
    misheard = torch.where(draw < WRONG, misheard, similar)
    user = torch.where((draw < WRONG + SIMILAR) & talking, misheard, user)
    lost = torch.rand(user.shape, device=rows.device) < 0.03
    gap = (torch.rand(user.shape, device=rows.device) < 0.015).float()
    lost |= F.max_pool1d(F.pad(gap, (3, 0)), 4, 1) > 0
    rows[:, 9:] = torch.where(lost & talking, -1, user)
    return rows


class Ear(nn.Module):
    """Reads the words of a sentence from a hidden vector; only used in training."""

    def __init__(self, texts: list[str], dim: int) -> None:
        super().__init__()
        spoken = [set(domain.spoken_as(text)) for text in texts]
        vocabulary = {w: i for i, w in enumerate(sorted(set().union(*spoken)))}
        words = torch.zeros(len(texts), len(vocabulary))
        for row, said in zip(words, spoken, strict=True):
            row[[vocabulary[w] for w in said]] = 1
        self.register_buffer("words", words)
        self.linear = nn.Linear(dim, len(vocabulary))
        nn.init.constant_(self.linear.bias, -5.0)

    def forward(self, h: Tensor, heard: Tensor) -> Tensor:
        """Loss of hidden vectors (batch, time, dim) at the ends in `heard`."""
        column, sentence = heard.unbind(-1)
        for_each = (column + 2).clamp(max=h.shape[1] - 1)[..., None]
        h = torch.gather(h, 1, for_each.expand(-1, -1, h.shape[2]))
        losses = F.binary_cross_entropy_with_logits(
            self.linear(h.float()), self.words[sentence], reduction="none"
        ).sum(-1)
        valid = (column > 0).float()
        return (losses * valid).sum() / valid.sum().clamp(min=1)


class Trainer:
    """The loss of one batch of a store."""

    def __init__(
        self,
        lm: LanguageModel,
        ear: Ear,
        silence: Tensor,
        is_fact: Tensor,
        near: Tensor,
    ) -> None:
        self.lm, self.ear, self.silence, self.is_fact = lm, ear, silence, is_fact
        self.near = near

    def looking(self, x: Tensor, rows: Tensor, prompt: Tensor) -> Tensor:
        """How far the copying head is from looking at the facts that are said next."""
        before, said = rows[:, 0, :-1], rows[:, 0, 1:]
        column = torch.arange(before.shape[1], device=rows.device)
        prompted = column[None] < prompt[:, None]
        same = (said[:, :, None] == before[:, None]) & prompted[:, None]
        wanted = self.is_fact[said] & ~prompted & same.any(2)
        scores = self.lm.transformer.layers[-1].scores(x, COPY_HEAD)
        found = scores.masked_fill(~same, -30.0).logsumexp(2).clamp(min=-30.0)
        return -(found * wanted).sum() / wanted.sum().clamp(min=1)

    def loss(self, store: Store, size: int) -> Tensor:
        """The sum to minimise; text, semantic, acoustic loss; accuracies; helpers."""
        lm = self.lm
        rows, prompt, heard = store.batch(size)
        fed = widen(blur(rows[:, :, :-1], prompt, self.near))
        target = rows[:, :, 1:]
        column = torch.arange(1, rows.shape[2], device=rows.device)
        talking = column[None] >= prompt[:, None]
        with torch.autocast(rows.device.type, torch.bfloat16):
            x = F.dropout(lm.embed(fed), 0.1)
            for layer in lm.transformer.layers[:-1]:
                x = layer(x)
            copying = self.looking(x, rows, prompt)
            h = lm.out_norm(lm.transformer.layers[-1](x))
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
        hearing = self.ear(h, heard)
        total = text_loss + (2 * semantic + 3 * acoustic) / 2
        total = total + 0.05 * hearing + 0.2 * copying
        parts = [total, text_loss, semantic, acoustic, right, hit[0], hit[1:].mean()]
        fact = self.is_fact[text] & talking
        parts.append(((logits.argmax(-1) == text) & fact).sum() / fact.sum())
        parts += [hearing, copying]
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
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    seed(args.seed)
    work, where = args.work, device()
    stores = {
        "short": Store(work, "short", SHORT, where),
        "long": Store(work, "long", LONG, where),
    }
    for store in stores.values():
        store.reserve(500000 if store.kind == "short" else 42000)
        while store.refresh() < 1:
            time.sleep(1)
    tokenizer = sentencepiece.SentencePieceProcessor(str(work / "tokenizer.model"))
    lm = LanguageModel(config(tokenizer.vocab_size())["lm"]).to(where)
    initialize(lm)
    begin = work / "lm_begin.pt"
    begun = begin.exists()
    if begun:
        lm.load_state_dict(torch.load(begin, map_location=where))
    for layer in lm.transformer.layers:
        layer.dropout = 0.1
    silence = torch.load(work / "agent.pt", weights_only=False)["constants"]["silence"]
    facts = [fact for values in domain.domain()["facts"].values() for fact in values]
    is_fact = torch.zeros(tokenizer.vocab_size(), dtype=torch.bool)
    is_fact[[tokenizer.encode(fact)[0] for fact in facts]] = True
    texts = sentences(torch.load(work / "users.pt", weights_only=False))
    ear = Ear(texts, lm.config["dim"]).to(where)
    codec = load_codec(work / "codec_ear.pt")
    near = codec.quantizer.rvq_first.codebooks()[0].near(NEAR)
    trainer = Trainer(lm, ear, silence.to(where), is_fact.to(where), near.to(where))
    parameters = [*lm.parameters(), *ear.parameters()]
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

    def save(path: Path) -> None:
        state = {k: v.bfloat16() for k, v in lm.state_dict().items()}
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    def after() -> None:
        if not begin.exists():
            average.swap()
            save(begin)
            average.swap()

    long_size = max(1, args.batch * SHORT // LONG)
    runs = {
        "short": captured(lambda: step("short", args.batch)),
        "long": captured(lambda: step("long", long_size)),
    }
    rounds = average.rounds(args.seconds, int(begun), after)
    for count, factor in enumerate(rounds, 1):
        set_rate(opt, RATE * factor)
        parts = runs["short" if count % 5 else "long"]()
        if count % 100 == 0:
            values = " ".join(f"{v:.3f}" for v in parts.tolist())
            print(f"lm {count}: {values}", flush=True)
            chunks = [store.refresh() for store in stores.values()]
            if count % 1000 == 0:
                print(f"lm: {chunks[0]} chunks", flush=True)
    average.settle()
    save(work / f"lm_{args.seed}.pt")


if __name__ == "__main__":
    main()
