"""The codec and the language model in PyTorch, with the published parameter names.

Audio and latents are channels-last, (batch, time, channels). Convolutions are written
as matrix products over the frames they read: fast on a GPU for these narrow layers, and
exactly what streaming one frame after the other gives.
"""

import math

import torch
import torch.nn.functional as F
from sizes import STEPS
from torch import Tensor, nn

INITIAL_POSITION = 10000.0


class Conv(nn.Module):
    """A causal convolution, zero (or edge) padded on the left."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int = 1, **kw
    ) -> None:
        super().__init__()
        self.stride, self.edge = stride, kw.get("edge", False)
        inner = nn.Conv1d(c_in, c_out, kernel, stride, bias=kw.get("bias", True))
        self.conv = nn.Module()
        self.conv.conv = inner

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, c_in) to (batch, time / stride, c_out)."""
        weight, bias = self.conv.conv.weight, self.conv.conv.bias
        c_out, c_in, kernel = weight.shape
        b, t, _ = x.shape
        weight = weight.permute(0, 2, 1).reshape(c_out, kernel * c_in)
        if kernel == 1:
            return F.linear(x, weight, bias)
        pad = kernel - self.stride
        left = x[:, :1].expand(-1, pad, -1) if self.edge else x.new_zeros(b, pad, c_in)
        x = torch.cat([left, x], 1)
        if self.stride == 1:
            x = torch.cat([x[:, i : i + t] for i in range(kernel)], -1)
        else:
            blocks = x.reshape(b, t // self.stride + 1, self.stride * c_in)
            x = torch.cat([blocks[:, :-1], blocks[:, 1:]], -1)
        return F.linear(x, weight, bias)


class ConvTranspose(nn.Module):
    """A causal transposed convolution with kernel 2 x stride."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.convtr = nn.Module()
        self.convtr.convtr = nn.ConvTranspose1d(c_in, c_out, 2 * stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, c_in) to (batch, time * stride, c_out)."""
        weight, bias = self.convtr.convtr.weight, self.convtr.convtr.bias
        b, t, c_in = x.shape
        c_out = weight.shape[1]
        s = self.stride
        weight = torch.cat([weight[:, :, :s], weight[:, :, s:]], 0)
        weight = weight.permute(2, 1, 0).reshape(s * c_out, 2 * c_in)
        x = torch.cat([x, F.pad(x, (0, 0, 1, 0))[:, :-1]], -1)
        return F.linear(x, weight, bias.repeat(s)).reshape(b, t * s, c_out)


class Residual(nn.Module):
    """ELU, conv 3, ELU, conv 1, added to the input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            [nn.ELU(), Conv(dim, dim // 2, 3), nn.ELU(), Conv(dim // 2, dim, 1)]
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.block:
            y = layer(y)
        return x + y


class Seanet(nn.Module):
    """A list of layers under the name `model`."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.model = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model:
            x = layer(x)
        return x


def seanet_encoder(config: dict) -> Seanet:
    """PCM (batch, 1920 n, 1) to latents (batch, 2 n, dimension)."""
    width = config["n_filters"]
    layers: list[nn.Module] = [Conv(1, width, config["kernel_size"])]
    for ratio in reversed(config["ratios"]):
        layers += [Residual(width), nn.ELU()]
        layers.append(Conv(width, 2 * width, 2 * ratio, ratio))
        width *= 2
    layers += [nn.ELU(), Conv(width, config["dimension"], config["last_kernel_size"])]
    return Seanet(layers)


def seanet_decoder(config: dict) -> Seanet:
    """Latents (batch, 2 n, dimension) to PCM (batch, 1920 n, 1)."""
    width = config["n_filters"] * 2 ** len(config["ratios"])
    layers: list[nn.Module] = [Conv(config["dimension"], width, config["kernel_size"])]
    for ratio in config["ratios"]:
        layers += [nn.ELU(), ConvTranspose(width, width // 2, ratio)]
        width //= 2
        layers.append(Residual(width))
    layers += [nn.ELU(), Conv(width, 1, config["last_kernel_size"])]
    return Seanet(layers)


def rotate(x: Tensor, positions: Tensor, period: float = INITIAL_POSITION) -> Tensor:
    """Rotary embedding, interleaved pairs, of (..., time, head_dim)."""
    half = x.shape[-1] // 2
    exponent = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angle = positions.float()[:, None] * period**-exponent
    a, b = x.float().unflatten(-1, (half, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    y = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    return y.flatten(-2).to(x.dtype)


def codec_mask(length: int, context: int, device: torch.device) -> Tensor:
    """Which latents (columns) a latent (row) sees, as in streaming by two."""
    p = torch.arange(length, device=device)
    end = 2 * (p // 2) + 2
    first = torch.where(end < context, 0, end - context + 1)
    return (p[None] <= p[:, None]) & (p[None] >= first[:, None])


class CodecAttention(nn.Module):
    """Self-attention of the codec's transformers."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim) / math.sqrt(dim))
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            F.linear(x, self.in_proj_weight)
            .reshape(b, t, 3, self.heads, d // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        positions = torch.arange(t, device=x.device)
        q, k = rotate(q, positions), rotate(k, positions)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(y.transpose(1, 2).reshape(b, t, d))


class LayerScale(nn.Module):
    """A learnt factor per channel."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class CodecLayer(nn.Module):
    """A pre-norm transformer layer with layer scales and exact GELU."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        dim, hidden = config["d_model"], config["dim_feedforward"]
        self.self_attn = CodecAttention(dim, config["num_heads"])
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, hidden, bias=False)
        self.linear2 = nn.Linear(hidden, dim, bias=False)
        self.layer_scale_1 = LayerScale(dim, config["layer_scale"])
        self.layer_scale_2 = LayerScale(dim, config["layer_scale"])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.layer_scale_1(self.self_attn(self.norm1(x), mask))
        return x + self.layer_scale_2(self.linear2(F.gelu(self.linear1(self.norm2(x)))))


class CodecTransformer(nn.Module):
    """The stack of layers under the name `transformer`."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.context = config["context"]
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(
            CodecLayer(config) for _ in range(config["num_layers"])
        )

    def forward(self, x: Tensor) -> Tensor:
        mask = codec_mask(x.shape[1], self.context, x.device)
        for layer in self.transformer.layers:
            x = layer(x, mask)
        return x


class Codebook(nn.Module):
    """A table of codewords, kept as sums over usage and learnt by moving averages."""

    def __init__(self, bins: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("_initialized", torch.ones(1))
        self.register_buffer("cluster_usage", torch.ones(bins))
        self.register_buffer("embedding_sum", torch.randn(bins, dim))

    def table(self) -> Tensor:
        return self.embedding_sum / self.cluster_usage.clamp(min=1e-5)[:, None]

    def nearest(self, x: Tensor) -> Tensor:
        table = self.table()
        return (table.square().sum(-1) / 2 - x @ table.T).argmin(-1)

    def near(self, count: int) -> Tensor:
        """The codes most like each one, (bins, count), itself not among them."""
        table = self.table()
        return torch.cdist(table, table).argsort(1)[:, 1 : count + 1]

    @torch.no_grad()
    def learn(self, x: Tensor, idx: Tensor, decay: float = 0.99) -> None:
        """Move the codewords towards the vectors (n, dim) that chose them."""
        bins = torch.arange(len(self.cluster_usage), device=x.device)
        chosen = (idx[:, None] == bins).to(x.dtype)
        self.cluster_usage.lerp_(chosen.sum(0), 1 - decay)
        self.embedding_sum.lerp_(chosen.T @ x, 1 - decay)
        rows = torch.randint(len(x), self.cluster_usage.shape, device=x.device)
        dead = self.cluster_usage < 0.1
        self.embedding_sum.copy_(
            torch.where(dead[:, None], x[rows], self.embedding_sum)
        )
        self.cluster_usage.copy_(torch.where(dead, 1.0, self.cluster_usage))


class Quantizer(nn.Module):
    """A residual vector quantizer between two projections."""

    def __init__(self, config: dict, levels: int) -> None:
        super().__init__()
        dim, bins = config["dimension"], config["bins"]
        self.input_proj = nn.Conv1d(config["input_dimension"], dim, 1, bias=False)
        self.output_proj = nn.Conv1d(dim, config["output_dimension"], 1, bias=False)
        self.vq = nn.Module()
        self.vq.layers = nn.ModuleList(nn.Module() for _ in range(levels))
        for layer in self.vq.layers:
            layer._codebook = Codebook(bins, dim)

    def codebooks(self) -> list[Codebook]:
        return [layer._codebook for layer in self.vq.layers]

    def project(self, z: Tensor) -> Tensor:
        return F.linear(z, self.input_proj.weight[:, :, 0])

    def encode(self, r: Tensor, learn: bool = False) -> tuple[Tensor, Tensor]:
        """Codes (batch, time, levels) and their sum for projected latents."""
        total, codes = torch.zeros_like(r), []
        for book in self.codebooks():
            rest = (r - total).detach()
            idx = book.nearest(rest)
            if learn:
                book.learn(rest.flatten(0, 1), idx.flatten())
            codes.append(idx)
            total = total + F.embedding(idx, book.table())
        return torch.stack(codes, -1), total

    def lookup(self, codes: Tensor) -> Tensor:
        books = self.codebooks()
        return sum(F.embedding(codes[..., i], b.table()) for i, b in enumerate(books))

    def expand(self, q: Tensor) -> Tensor:
        return F.linear(q, self.output_proj.weight[:, :, 0])


HEARS = ("encoder", "encoder_transformer", "downsample")  # parts of a codec


class Codec(nn.Module):
    """Mimi: PCM to codes to PCM."""

    def __init__(self, config: dict, levels: int | None = None) -> None:
        super().__init__()
        self.encoder = seanet_encoder(config["seanet"])
        self.decoder = seanet_decoder(config["seanet"])
        self.encoder_transformer = CodecTransformer(config["transformer"])
        self.decoder_transformer = CodecTransformer(config["transformer"])
        dim = config["seanet"]["dimension"]
        self.downsample = nn.Module()
        self.downsample.conv = Conv(dim, dim, 4, 2, edge=True, bias=False)
        self.upsample = nn.Module()
        self.upsample.convtr = nn.Module()
        self.upsample.convtr.convtr = nn.Module()
        self.upsample.convtr.convtr.convtr = nn.ConvTranspose1d(
            dim, dim, 4, 2, groups=dim, bias=False
        )
        quantizer = config["quantizer"]
        levels = levels or quantizer["n_q"]
        self.quantizer = nn.Module()
        self.quantizer.rvq_first = Quantizer(quantizer, 1)
        self.quantizer.rvq_rest = Quantizer(quantizer, levels - 1)

    def latents(self, pcm: Tensor) -> Tensor:
        """PCM (batch, 1920 n) to latents (batch, n, dimension)."""
        x = self.encoder(pcm[..., None])
        return self.downsample.conv(self.encoder_transformer(x))

    def synthesize(self, z: Tensor) -> Tensor:
        """Latents (batch, n, dimension) to PCM (batch, 1920 n)."""
        w = self.upsample.convtr.convtr.convtr.weight[:, 0].T.to(z.dtype)
        before = F.pad(z, (0, 0, 1, 0))[:, :-1]
        x = torch.stack([z * w[0] + before * w[2], z * w[1] + before * w[3]], 2)
        x = self.decoder_transformer(x.flatten(1, 2))
        for layer in self.decoder.model[:-1]:
            x = layer(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.decoder.model[-1](x.float())[..., 0]

    @torch.no_grad()
    def encode(self, pcm: Tensor) -> Tensor:
        """PCM (batch, 1920 n) to codes (batch, 8, n)."""
        z = self.latents(pcm)
        first, rest = self.quantizer.rvq_first, self.quantizer.rvq_rest
        codes = [q.encode(q.project(z))[0] for q in (first, rest)]
        return torch.cat(codes, -1)[..., :8].transpose(1, 2)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes (batch, 8, n) to latents (batch, n, dimension)."""
        first, rest = self.quantizer.rvq_first, self.quantizer.rvq_rest
        codes = codes.transpose(1, 2)
        books = rest.codebooks()[:7]
        acoustic = sum(
            F.embedding(codes[..., i + 1], b.table()) for i, b in enumerate(books)
        )
        return first.expand(first.lookup(codes)) + rest.expand(acoustic)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (batch, 8, n) to PCM (batch, 1920 n)."""
        return self.synthesize(self.embed_codes(codes))


class RmsNorm(nn.Module):
    """Root mean square norm, in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-8)
        return (y * (self.alpha.view(-1).float() * scale)).to(x.dtype)


class Gating(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(dim, 2 * hidden, bias=False)
        self.linear_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.linear_in(x).chunk(2, -1)
        return self.linear_out(F.silu(a) * b)


class StackedAttention(nn.Module):
    """The attention weights of a layer, those of several steps stacked."""

    def __init__(self, dim: int, steps: int = 1) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(
            torch.randn(3 * dim * steps, dim) / math.sqrt(dim)
        )
        self.out_proj = nn.Linear(dim, dim * steps, bias=False)


class TemporalLayer(nn.Module):
    """One layer of the temporal transformer."""

    def __init__(self, dim: int, heads: int, hidden: int, period: float) -> None:
        super().__init__()
        self.heads, self.period, self.dropout = heads, period, 0.0
        self.self_attn = StackedAttention(dim)
        self.norm1, self.norm2 = RmsNorm(dim), RmsNorm(dim)
        self.gating = Gating(dim, hidden)

    def forward(
        self, x: Tensor, start: int = 0, cache: Tensor | None = None, context: int = 0
    ) -> Tensor:
        """(batch, time, dim); with a cache (2, batch, heads, max, d) from `start`."""
        b, t, d = x.shape
        q, k, v = (
            F.linear(self.norm1(x), self.self_attn.in_proj_weight)
            .reshape(b, t, 3, self.heads, d // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        positions = torch.arange(start, start + t, device=x.device)
        q, k = rotate(q, positions, self.period), rotate(k, positions, self.period)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            cache[0][:, :, start : start + t] = k
            cache[1][:, :, start : start + t] = v
            keys = torch.arange(start + t, device=x.device)
            mask = keys[None] <= positions[:, None]
            full = positions[:, None] + 1 >= context
            mask &= ~full | (keys[None] >= positions[:, None] - context + 2)
            k, v = cache[:, :, :, : start + t]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.drop(self.self_attn.out_proj(y.transpose(1, 2).reshape(b, t, d)))
        return x + self.drop(self.gating(self.norm2(x)))

    def scores(self, x: Tensor, head: int) -> Tensor:
        """Log of what one head gives each position (batch, to, from)."""
        size = x.shape[2] // self.heads
        own = slice(head * size, (head + 1) * size)
        q, k, _ = self.self_attn.in_proj_weight.chunk(3)
        y, positions = self.norm1(x), torch.arange(x.shape[1], device=x.device)
        q = rotate(F.linear(y, q[own]), positions, self.period)
        k = rotate(F.linear(y, k[own]), positions, self.period)
        scores = (q @ k.transpose(1, 2)).float() / math.sqrt(size)
        later = positions[None] > positions[:, None]
        return scores.masked_fill(later, float("-inf")).log_softmax(-1)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class DepformerLayer(nn.Module):
    """One layer of the depformer, every step with its own weights."""

    def __init__(self, dim: int, heads: int, hidden: int, steps: int) -> None:
        super().__init__()
        self.heads, self.steps = heads, steps
        self.self_attn = StackedAttention(dim, steps)
        self.norm1, self.norm2 = RmsNorm(dim), RmsNorm(dim)
        self.gating = nn.ModuleList(Gating(dim, hidden) for _ in range(steps))

    def forward(
        self, x: Tensor, step: int = 0, past: list[Tensor] | None = None
    ) -> Tensor:
        """(steps, n, dim), all steps or, with the keys and values past, step `step`."""
        s, n, d = x.shape
        weight = self.self_attn.in_proj_weight.view(self.steps, 3 * d, d)
        out = self.self_attn.out_proj.weight.view(self.steps, d, d)
        sets = slice(step, step + s)
        y = torch.bmm(self.norm1(x), weight[sets].transpose(1, 2).to(x.dtype))
        y = y.view(s, n, 3, self.heads, d // self.heads).permute(2, 1, 3, 0, 4)
        q, k, v = y
        if past is not None:
            past.append(y[1:])
            k, v = torch.cat(past, -2)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if past is None:
            hidden = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        y = (scores.softmax(-1).to(v.dtype) @ v).permute(2, 0, 1, 3).reshape(s, n, d)
        x = x + torch.bmm(y, out[sets].transpose(1, 2).to(y.dtype))
        gates = self.gating[step : step + s]
        w_in = torch.stack([g.linear_in.weight for g in gates]).transpose(1, 2)
        w_out = torch.stack([g.linear_out.weight for g in gates]).transpose(1, 2)
        a, b = torch.bmm(self.norm2(x), w_in.to(x.dtype)).chunk(2, -1)
        return x + torch.bmm(F.silu(a) * b, w_out.to(x.dtype))


def hidden_size(feed_forward: int) -> int:
    """Width of a gated feed-forward from its nominal size."""
    return 2 * feed_forward // 3


class LanguageModel(nn.Module):
    """17 streams of tokens in, text and agent audio out."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = config
        dim, depth = config["dim"], config["depformer_dim"]
        steps, card, text = STEPS, config["card"], config["text_card"]
        self.steps = steps
        self.text_emb = nn.Embedding(text + 1, dim)
        self.emb = nn.ModuleList(
            nn.Embedding(card + 1, dim) for _ in range(config["n_q"])
        )
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(
            TemporalLayer(
                dim,
                config["num_heads"],
                hidden_size(int(config["hidden_scale"] * dim)),
                config["max_period"],
            )
            for _ in range(config["num_layers"])
        )
        self.out_norm = RmsNorm(dim)
        self.text_linear = nn.Linear(dim, text, bias=False)
        self.depformer_in = nn.ModuleList(
            nn.Linear(dim, depth, bias=False) for _ in range(steps)
        )
        self.depformer_text_emb = nn.Embedding(text + 1, depth)
        self.depformer_emb = nn.ModuleList(
            nn.Embedding(card + 1, depth) for _ in range(steps - 1)
        )
        self.depformer = nn.Module()
        self.depformer.layers = nn.ModuleList(
            DepformerLayer(
                depth,
                config["depformer_num_heads"],
                hidden_size(config["depformer_dim_feedforward"]),
                steps,
            )
            for _ in range(config["depformer_num_layers"])
        )
        self.linears = nn.ModuleList(
            nn.Linear(depth, card, bias=False) for _ in range(steps)
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (batch, 17, time) to (batch, time, dim); -1 adds nothing."""
        tables = [*self.emb, self.text_emb]
        total = 0
        for table, row in zip(tables, [*range(1, 17), 0], strict=True):
            ids = tokens[:, row]
            vectors = table(ids.clamp(min=0))
            total = total + vectors * (ids >= 0)[..., None]
        return total

    def temporal(self, x: Tensor) -> Tensor:
        """Embedded tokens (batch, time, dim) to the vectors the heads read."""
        for layer in self.transformer.layers:
            x = layer(x)
        return self.out_norm(x)

    def temporal_step(self, x: Tensor, start: int, caches: list[Tensor]) -> Tensor:
        """The same for positions from `start` on, with caches."""
        context = self.config["context"]
        for layer, cache in zip(self.transformer.layers, caches, strict=True):
            x = layer(x, start, cache, context)
        return self.out_norm(x)

    def depformer_logits(self, h: Tensor, before: Tensor) -> Tensor:
        """Logits (steps, n, card) for vectors (n, dim) and tokens before (n, steps)."""
        weight = torch.stack([m.weight for m in self.depformer_in])
        x = torch.matmul(h, weight.transpose(1, 2).to(h.dtype))
        tables = [self.depformer_text_emb, *self.depformer_emb]
        embedded = []
        for s, table in enumerate(tables):
            ids = before[:, s]
            embedded.append(table(ids.clamp(min=0)) * (ids >= 0)[:, None])
        x = x + torch.stack(embedded)
        for layer in self.depformer.layers:
            x = layer(x)
        weight = torch.stack([m.weight for m in self.linears])
        return torch.bmm(x, weight.transpose(1, 2).to(x.dtype))

    def depformer_step(
        self, h: Tensor, before: Tensor, step: int, past: list[list[Tensor]]
    ) -> Tensor:
        """Logits (n, card) of one step; `past` has a list per layer."""
        table = self.depformer_emb[step - 1] if step else self.depformer_text_emb
        x = (self.depformer_in[step](h) + table(before))[None]
        for layer, seen in zip(self.depformer.layers, past, strict=True):
            x = layer(x, step, seen)
        return self.linears[step](x[0])
