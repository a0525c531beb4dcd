"""Train the codec on the bank.

    python train_codec.py WORK [--listen SECONDS] [--speak SECONDS]

Two stages. `listen` trains everything, on the agent's clips and on the users' with
noise; phone labels on the semantic codebook make it hear words. Then encoder and
codebooks are frozen (WORK/codec_listen.pt), and `speak` goes on with the decoder alone
against discriminators, on the codes of the agent's clips (WORK/codec.pt). A stage whose
file is there is not trained again.
"""

import argparse
import random
from pathlib import Path

import domain
import torch
import torch.nn.functional as F
from bank import NO_LABEL
from codes import TAIL, Agent, agent_codes, clip_pcm, constants, splice
from nets import Codec, Quantizer
from sizes import FRAME_SIZE, config
from speech import PHONES
from torch import Tensor, nn
from training import Average, Clock, captured, cosine, device, optimizer, seed, set_rate

FRAMES = 30
SLOT = FRAME_SIZE // 3
SCALES = ((2048, 80), (1024, 80), (512, 64), (256, 40), (128, 20))


def mel_bank(n_fft: int, bands: int) -> Tensor:
    """Triangular mel filters (n_fft / 2 + 1, bands) up to 8.5 kHz."""
    top = 2595 * torch.log10(torch.tensor(1 + 8500 / 700))
    edges = 700 * (10 ** (torch.linspace(0, 1, bands + 2) * top / 2595) - 1)
    hertz = torch.linspace(0, 12000, n_fft // 2 + 1)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rise, fall = (hertz - low) / (middle - low), (high - hertz) / (high - middle)
    bank = torch.minimum(rise, fall).clamp(min=0)
    return bank / bank.sum(0).clamp(min=1e-3)


class SpectralLoss(nn.Module):
    """Distance of two signals over several short-time spectra, per example."""

    def __init__(self) -> None:
        super().__init__()
        for n_fft, bands in SCALES:
            self.register_buffer(f"window{n_fft}", torch.hann_window(n_fft))
            self.register_buffer(f"mel{n_fft}", mel_bank(n_fft, bands))

    def spectrum(self, x: Tensor, n_fft: int) -> Tensor:
        window = getattr(self, f"window{n_fft}")
        s = torch.stft(x, n_fft, n_fft // 4, window=window, return_complex=True)
        return (s.real.square() + s.imag.square() + 1e-9).sqrt() / window.sum().sqrt()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = 0.0
        for n_fft, _ in SCALES:
            a, b = self.spectrum(x, n_fft), self.spectrum(y, n_fft)
            mel = getattr(self, f"mel{n_fft}").T
            log_a, log_b = (torch.log((mel @ m).clamp(min=1e-4)) for m in (a, b))
            total = total + (log_a - log_b).abs().mean((1, 2))
            total = total + 2.0 * (a.sqrt() - b.sqrt()).abs().mean((1, 2))
        return total


class Discriminator(nn.Module):
    """Convolutions over complex short-time spectra of one size."""

    def __init__(self, n_fft: int, width: int = 24) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft))
        self.layers = nn.ModuleList([nn.Conv2d(2, width, (3, 9), padding=(1, 4))])
        for dilation in (1, 2, 4):
            self.layers.append(
                nn.Conv2d(
                    width, width, (3, 9), (1, 2), (dilation, 4), (dilation, 1)
                )  # fmt: skip
            )
        self.last = nn.Conv2d(width, 1, (3, 3), padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Score map and the features of all layers."""
        with torch.autocast(x.device.type, enabled=False):
            hop = self.n_fft // 4
            s = torch.stft(x, self.n_fft, hop, window=self.window, return_complex=True)
            s = torch.view_as_real(s).permute(0, 3, 2, 1)[..., : self.n_fft // 3]
            s = s / self.window.sum().sqrt()
        features = []
        for layer in self.layers:
            s = F.leaky_relu(layer(s), 0.2)
            features.append(s)
        return self.last(s), features


def straight_through(
    q: Quantizer, z: Tensor, learn: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codeword sums with the gradient of the latents; commitment loss; the sums."""
    r = q.project(z)
    _, total = q.encode(r, learn)
    commitment = (r - total.detach()).square().mean()
    return r + (total - r).detach(), commitment, total


class Data:
    """Random crops of the bank, made where the bank lies."""

    def __init__(self, bank: dict, agents: int, users: int) -> None:
        self.bank, self.agents, self.users = bank, agents, users
        where = bank["pcm"].device
        rng = random.Random(1)
        clips = [c for c in bank["clips"] if c["kind"] in ("agent", "voice")]
        pcm, labels = [], []
        for clip in rng.sample(clips * 2, 2 * len(clips)):
            gap = rng.randint(2, 8)
            pcm += [torch.zeros(gap * FRAME_SIZE, device=where), clip_pcm(bank, clip)]
            first = clip["start"] // SLOT
            labels.append(torch.zeros(3 * gap, dtype=torch.uint8, device=where))
            labels.append(bank["labels"][first : first + 3 * clip["frames"]])
        self.tape, self.tape_labels = torch.cat(pcm), torch.cat(labels)
        spans = [
            (c["start"] // SLOT, c["start"] // SLOT + 3 * c["frames"])
            for c in bank["clips"]
            if c["kind"] in ("ask", "stranger")
        ]
        self.first, self.last = spans[0][0], spans[-1][1]
        self.where = where

    def crop(self, first: Tensor, pcm: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        samples = torch.arange(FRAMES * FRAME_SIZE, device=self.where)
        slots = torch.arange(3 * FRAMES, device=self.where)
        return pcm[first[:, None] * SLOT + samples], labels[
            first[:, None] + slots
        ].long()

    def clean(self) -> tuple[Tensor, Tensor]:
        """PCM of agents first and users after, as spoken, and phone labels."""
        where = self.where
        frames = len(self.tape) // FRAME_SIZE - FRAMES
        first = 3 * torch.randint(frames, (self.agents,), device=where)
        agent, agent_labels = self.crop(first, self.tape, self.tape_labels)
        last = self.last - 3 * FRAMES
        first = torch.randint(self.first, last, (self.users,), device=where)
        user, user_labels = self.crop(first, self.bank["pcm"], self.bank["labels"])
        user = user.float() / 32768
        return torch.cat([agent, user]), torch.cat([agent_labels, user_labels])

    def batch(self) -> tuple[Tensor, Tensor]:
        """The same, the users amid noise."""
        where = self.where
        pcm, labels = self.clean()
        agent, user = pcm[: self.agents], pcm[self.agents :]
        user = user * 10 ** (torch.rand(self.users, 1, device=where) * 1.0 - 0.8)
        level = 10 ** (-1.8 - 3 * torch.rand(self.users, 1, device=where))
        noise = torch.randn_like(user)
        brown = noise + 0.95 * F.pad(noise, (1, 0))[:, :-1]
        brown = brown + 0.9 * F.pad(brown, (2, 0))[:, :-2]
        colour = torch.rand(self.users, 1, device=where)
        user = user + level * (colour * noise + (1 - colour) * brown)
        user = torch.cat(
            [user[: self.users // 2], user[self.users // 2 :].clamp(-1, 1)]
        )
        return torch.cat([agent, user]), labels


@torch.no_grad()
def initialize(quantizer: Quantizer, r: Tensor) -> None:
    """Set the codebooks by k-means on projected latents (n, dim)."""
    for book in quantizer.codebooks():
        bins = len(book.cluster_usage)
        table = r[torch.randperm(len(r), device=r.device)[:bins]].clone()
        for _ in range(12):
            idx = torch.cdist(r, table).argmin(-1)
            chosen = (idx[:, None] == torch.arange(bins, device=r.device)).to(r.dtype)
            count = chosen.sum(0)
            mean = chosen.T @ r / count.clamp(min=1)[:, None]
            spare = r[torch.randint(len(r), (bins,), device=r.device)]
            table = torch.where(count[:, None] > 0, mean, spare)
        usage = (count * 768 / len(r)).clamp(min=0.5)
        book.embedding_sum.copy_(table * usage[:, None])
        book.cluster_usage.copy_(usage)
        r = r - table[idx]


def half(module: nn.Module) -> dict[str, Tensor]:
    """State in float16, as it will be shipped; the module itself is rounded too."""
    state = {}
    for name, value in module.state_dict().items():
        if name.endswith("embedding_sum"):
            usage = module.get_buffer(name.replace("embedding_sum", "cluster_usage"))
            value.copy_(value / usage.clamp(min=1e-5)[:, None])
            usage.fill_(1)
    for name, value in module.state_dict().items():
        value.copy_(value.half().float())
        state[name] = value.half().cpu()
    return state


def train_listen(codec: Codec, bank: dict, budget_s: float, batch: int) -> None:
    """Train encoder, codebooks and decoder."""
    where = device()
    data = Data(bank, batch // 2, batch - batch // 2)
    spectral = SpectralLoss().to(where)
    width = config(1)["mimi"]["quantizer"]["dimension"]
    phones = nn.Linear(width, 3 * len(PHONES)).to(where)
    parameters = [*codec.parameters(), *phones.parameters()]
    opt = optimizer(parameters, 8e-4, (0.8, 0.99))
    weight = torch.ones(batch, device=where)
    weight[batch // 2 :] = 0.2
    first, rest = codec.quantizer.rvq_first, codec.quantizer.rvq_rest

    def step(quantize: bool) -> Tensor:
        pcm, labels = data.batch()
        with torch.autocast(where.type, torch.bfloat16):
            z = codec.latents(pcm)
        z = z.float()
        if quantize:
            semantic, loss_a, heard = straight_through(first, z, True)
            acoustic, loss_b, _ = straight_through(rest, z, True)
        else:
            semantic, acoustic = first.project(z), rest.project(z)
            loss_a = loss_b = z.new_zeros(())
        logits = phones(semantic).unflatten(-1, (3, -1)).flatten(0, 2)
        phone_loss = F.cross_entropy(
            logits, labels.flatten(), ignore_index=NO_LABEL, label_smoothing=0.05
        )
        right = (logits.argmax(-1) == labels.flatten()).float().mean()
        with torch.autocast(where.type, torch.bfloat16):
            out = codec.synthesize(first.expand(semantic) + rest.expand(acoustic))
        distance = (spectral(out, pcm) * weight).mean()
        wave = ((out - pcm).abs().mean(1) * weight).mean()
        loss = distance + wave + 0.25 * (loss_a + loss_b) + 0.6 * phone_loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 3.0)
        opt.step()
        opt.zero_grad(set_to_none=False)
        return torch.stack([distance, loss_a, loss_b, phone_loss, right]).detach()

    for p in parameters:
        p.grad = torch.zeros_like(p)
    run = captured(lambda: step(False))
    clock, count, stats = Clock(budget_s), 0, run()
    while clock.fraction() < 0.08:
        set_rate(opt, 8e-4 * cosine(clock.fraction()))
        stats = run()
        count += 1
        if count % 50 == 0:
            stats.tolist()
    print(f"unquantized: {count} steps, {stats.tolist()}, {clock.elapsed():.0f} s")
    with torch.no_grad():
        z = torch.cat([codec.latents(data.batch()[0]).flatten(0, 1) for _ in range(16)])
        initialize(first, first.project(z))
        initialize(rest, rest.project(z))
    run = captured(lambda: step(True))
    while not clock.over():
        set_rate(opt, 8e-4 * cosine(clock.fraction()))
        stats = run()
        count += 1
        if count % 200 == 0:
            values = " ".join(f"{v:.3f}" for v in stats.tolist())
            print(f"listen {count} {clock.elapsed():.0f} s: {values}", flush=True)


def train_speak(
    codec: Codec, bank: dict, budget_s: float, batch: int, path: Path
) -> None:
    """Train the decoder on the codes of the agent's clips."""
    where = device()
    silence = constants(codec).silence
    codes, pcm = agent_tape(codec, bank, silence)
    speaker = nn.ModuleList([codec.upsample, codec.decoder_transformer, codec.decoder])
    parameters = list(speaker.parameters())
    critics = nn.ModuleList(Discriminator(n) for n in (1024, 512, 256)).to(where)
    spectral = SpectralLoss().to(where)
    opt = optimizer(parameters, 6e-4, (0.8, 0.99))
    opt_critic = optimizer(list(critics.parameters()), 3e-4, (0.8, 0.99))
    average = Average(speaker, 0.998)
    warm = 6
    frame = torch.arange(FRAMES, device=where)
    sample = torch.arange(FRAMES * FRAME_SIZE, device=where)

    def step(adversarial: bool) -> Tensor:
        first = torch.randint(codes.shape[1] - FRAMES, (batch, 1), device=where)
        with torch.no_grad():
            z = codec.embed_codes(codes[:, first + frame].transpose(0, 1))
        real = pcm[first * FRAME_SIZE + sample][:, warm * FRAME_SIZE :]
        with torch.autocast(where.type, torch.bfloat16):
            out = codec.synthesize(z)[:, warm * FRAME_SIZE :]
        distance = spectral(out, real).mean()
        loss = distance + 3.0 * (out - real).abs().mean()
        critic_loss = distance.new_zeros(())
        if adversarial:
            with torch.autocast(where.type, torch.bfloat16):
                for critic in critics:
                    score, features = critic(out)
                    with torch.no_grad():
                        _, wanted = critic(real)
                    match = sum(
                        (a - b).abs().mean() / b.abs().mean().clamp(min=1e-3)
                        for a, b in zip(features, wanted, strict=True)
                    )
                    loss = loss + 0.1 * F.relu(1 - score.float()).mean()
                    loss = loss + 0.2 * match.float()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 3.0)
        opt.step()
        opt.zero_grad(set_to_none=False)
        if adversarial:
            for p in critics.parameters():
                p.grad.zero_()
            with torch.autocast(where.type, torch.bfloat16):
                for critic in critics:
                    fake, true = critic(out.detach())[0], critic(real)[0]
                    critic_loss = critic_loss + F.relu(1 + fake.float()).mean()
                    critic_loss = critic_loss + F.relu(1 - true.float()).mean()
            critic_loss.backward()
            opt_critic.step()
        average.update()
        return torch.stack([distance, critic_loss]).detach()

    for p in [*parameters, *critics.parameters()]:
        p.grad = torch.zeros_like(p)
    clock, count, saved = Clock(budget_s), 0, 0.0
    for adversarial, until in ((False, 0.45), (True, 1.0)):
        run = captured(lambda now=adversarial: step(now))
        while clock.fraction() < until:
            set_rate(opt, 6e-4 * cosine(clock.fraction()))
            stats = run()
            count += 1
            if count % 200 == 0:
                values = " ".join(f"{v:.3f}" for v in stats.tolist())
                print(f"speak {count} {clock.elapsed():.0f} s: {values}", flush=True)
                if clock.elapsed() - saved > 60:
                    saved = clock.elapsed()
                    average.swap()
                    torch.save(
                        {k: v.half() for k, v in codec.state_dict().items()}, path
                    )
                    average.swap()
    average.swap()


def agent_tape(codec: Codec, bank: dict, silence: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (8, frames) and PCM of all agent clips with silences between.

    Replies with a fact are there as spoken and as `splice` puts them together.
    """
    rng = random.Random(2)
    where = bank["pcm"].device
    sound, words = {}, {}
    for clip in bank["clips"]:
        if clip["kind"] == "agent":
            key = clip["text"], clip["voice"]
            sound[key], words[key] = clip_pcm(bank, clip), clip["words"]
    found = agent_codes(codec, bank, silence)
    clips = [(found[key], sound[key]) for key in found]
    voices: dict = {voice: [] for _, voice in found}
    agent = Agent(constants(codec), dict(found), voices, words)
    for key, (model, head, cut) in splice(agent, domain.families()).items():
        beginning = sound[model, key[1]][: head * FRAME_SIZE]
        wave = torch.cat([beginning, sound[key][cut * FRAME_SIZE :]])
        clips += [(agent.codes[key], wave)] * 2
    codes, pcm = [], []
    for row, wave in rng.sample(clips * 3, 3 * len(clips)):
        if rng.random() < 0.15:
            cut = rng.randint(5, row.shape[1] - TAIL)
            row, wave = row[:, :cut], wave[: cut * FRAME_SIZE]
        gap = rng.randint(3, 12)
        codes += [row, silence[:, None].expand(-1, gap)]
        spare = (row.shape[1] + gap) * FRAME_SIZE - len(wave)
        pcm += [wave, torch.zeros(spare, device=where)]
    return torch.cat(codes, 1).to(where), torch.cat(pcm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--listen", type=float, default=170, help="seconds")
    parser.add_argument("--speak", type=float, default=420, help="seconds")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    seed(0)
    where = device()
    bank = torch.load(args.work / "bank.pt", weights_only=False)
    bank["pcm"], bank["labels"] = bank["pcm"].to(where), bank["labels"].to(where)
    codec = Codec(config(1)["mimi"]).to(where)
    listen, speak = args.work / "codec_listen.pt", args.work / "codec.pt"
    if not listen.exists():
        train_listen(codec, bank, args.listen, args.batch)
        state = half(codec)
        torch.save(state, listen.with_suffix(".part"))
        listen.with_suffix(".part").rename(listen)
    if speak.exists():
        return
    codec.load_state_dict(torch.load(listen, map_location=where))
    train_speak(codec, bank, args.speak, args.batch, speak)
    torch.save(half(codec), speak)


if __name__ == "__main__":
    main()
