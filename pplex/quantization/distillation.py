"""Codes, scales and biases learned from what the unquantized model chooses.

All matrices at once, by gradients through the whole model: the least mean divergence,
over text and the agent's codebooks alike, of the rounded model's choices from its own
in conversations that it had. So mlx-lm's DWQ learns scales and biases; here codes move
too: what a code was rounded from is learned as if nothing were rounded, and where it
comes nearer to another code, that one is taken. The rate falls to zero. Text counts
once more, softened: a model that is nearly always sure of it shows seldom what it would
choose next, and learned by those few frames its rarer choices get worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.optimizers import Adam
from mlx.utils import tree_map

from pplex.checkpoint.layouts import Quantization
from pplex.engine.device import available_gb, on_cpu
from pplex.errors import PplexError
from pplex.model.cache import KvCache, Mask
from pplex.model.config import LmConfig
from pplex.model.depformer import Depformer
from pplex.model.embedding import embed
from pplex.model.lm import Lm
from pplex.model.transformer import RMS_NORM_EPS
from pplex.quantization.calibration import Conversation
from pplex.quantization.products import product
from pplex.quantization.quantize import STORED, Parts, pack

_Dense = Mapping[str, mx.array]
Modules = Mapping[str, Sequence[str]]
_Learned = dict[str, dict[str, mx.array]]

# Of the rate, at most so many codes a step, scales and biases take these parts: of the
# scale itself. In all its steps a value may go about half a code.
_RATE, _SCALES, _BIASES = 1e-3, 0.3, 1.2
_BETAS, _WARM_STEPS = [0.9, 0.98], 30
_SOFT = 3.0  # what text logits are divided by
_NEAR = 0.48  # of a code: how far from it a value begins at most
# Of a value: the model's, the rounded one's and its gradient, what that was rounded
# from, its gradient, the mean and the square of that, and what lies between.
_VALUE_BYTES = 56
# Of what a position computes, with its gradient: NumPy's products keep it twice, and a
# GPU has two steps at once.
_READ_BYTES = 8


def _step_positions() -> int:
    """About how many positions a step reads: more on a GPU, which has many launches."""
    return 2048 if on_cpu() else 8192


def check_memory(config: LmConfig, num_values: int, longest: int) -> int:
    """About how many bytes gradients take; more than there are is refused.

    Its conversations have up to ``longest`` positions. `mini`: 2.2 GB, measured on a
    CPU 2.6 to 3.0; 8 GB on a GPU, of which an H100 said 9, with the freed memory that
    is kept (up to half as much again). Of a model five times as large 20 and 36.
    """
    c = config
    layers = 12 * c.dim + 6 * c.hidden_dim + 6 * c.num_heads * longest
    steps = 12 * c.depformer_dim + 6 * c.depformer_hidden_dim
    values = c.num_layers * layers + 2 * c.n_q * c.dim
    values += c.num_codebooks * c.depformer_num_layers * steps
    values += 6 * (c.text_card + c.num_codebooks * c.card)
    read = max(_step_positions(), longest) * values
    needed = num_values * _VALUE_BYTES + read * _READ_BYTES
    free = available_gb()
    if free is not None and needed > free * 1e9:
        raise PplexError(
            f"--distill takes about {needed / 1e9:.0f} GB of memory for a model of "
            f"{num_values / 1e6:.0f} million values, and {free:.0f} GB are free; leave "
            "it out: --calibration alone takes a layer at a time"
        )
    return needed


def distill(
    config: LmConfig,
    modules: Modules,
    dense: _Dense,
    rounded: Mapping[str, tuple[Quantization, Parts]],
    conversations: Sequence[Conversation],
    rounds: float,
    advance: Callable[[float], object],
) -> dict[str, Parts]:
    """Better codes, scales and biases of the ``rounded`` targets, with their forms.

    ``modules`` are the targets of each module in order of rows, ``dense`` their values
    in float32. Every conversation is gone through in ``rounds``; ``advance`` is told
    how much more is done, of 1.
    """
    teacher = trainable_lm(config)
    put(teacher, modules, dense)
    student = _Student(config, modules, dense, rounded)
    size = max(1, _step_positions() // max(c.columns.shape[1] for c in conversations))
    size = min(size, len(conversations))
    steps = max(1, round(rounds * len(conversations) / size))
    optimizer = Adam(_falling(steps), betas=_BETAS, eps=1e-12, bias_correction=True)
    learned = student.start

    def loss(learned: _Learned, batch: Batch, wanted: tuple[mx.array, ...]) -> mx.array:
        found = student.logits(learned, batch)
        soft = _divergence(wanted[0] / _SOFT, found[0] / _SOFT).mean() * _SOFT**2
        streams = _divergences(wanted, found)
        return (streams.sum() + soft) / len(streams)

    step = mx.grad(loss)
    random, order = np.random.default_rng(0), np.zeros(0, int)
    for _ in range(steps):
        if len(order) < size:
            order = random.permutation(len(conversations))
        now, order = order[:size], order[size:]
        batch = make_batch([conversations[idx] for idx in now], config)
        gradients = step(learned, batch, logits(teacher, batch))
        before = learned
        learned = student.bound(optimizer.apply_gradients(gradients, learned))
        # A GPU computes a step while the next one is written down.
        mx.async_eval(learned, optimizer.state)
        mx.eval(before)
        advance(1 / steps)
    return student.parts(learned)


def _falling(steps: int) -> Callable[[mx.array], mx.array]:
    """The rate of a step: after some small ones down to nothing in half a cosine."""
    highest = min(_RATE, 1 / steps)

    def at(step: mx.array) -> mx.array:
        share = mx.minimum((step + 1) / min(_WARM_STEPS, steps), 1.0)
        return highest * share * 0.5 * (1 + mx.cos(math.pi * step / steps))

    return at


class _Group:
    """All matrices of one form: their groups (groups, group_size) in one array."""

    def __init__(
        self, form: Quantization, dense: _Dense, rounded: Mapping[str, Parts]
    ) -> None:
        self._form = form
        self._top = 2**form.bits - 1
        self._shapes = {name: dense[name].shape for name in rounded}
        sizes = [math.prod(s) // form.group_size for s in self._shapes.values()]
        self._ends = np.cumsum(sizes)[:-1].tolist()
        columns = zip(*(self._flat(parts) for parts in rounded.values()), strict=True)
        codes, self._scales, self._biases = (mx.concatenate(list(c)) for c in columns)
        self._unit = mx.abs(self._scales)
        wanted = [dense[name].reshape(-1, form.group_size) for name in rounded]
        inverse = mx.where(self._unit == 0, 0, 1 / (self._scales + (self._unit == 0)))
        values = (mx.concatenate(wanted) - self._biases) * inverse
        # On the side of what they were rounded from.
        values = mx.clip(values, codes - _NEAR, codes + _NEAR)
        none = mx.zeros_like(self._scales)
        self.start = {"values": values, "scales": none, "biases": none}
        mx.eval(self.start, self._scales, self._biases, self._unit)

    def _flat(self, parts: Parts) -> Parts:
        packed, scales, biases = parts
        one, size, bits = mx.ones(scales.shape), self._form.group_size, self._form.bits
        codes = mx.dequantize(packed, one, 0 * one, group_size=size, bits=bits)
        s, b = (part.astype(mx.float32).reshape(-1, 1) for part in (scales, biases))
        return codes.reshape(-1, size), s, b

    def _parts(self, learned: _Dense) -> Parts:
        """Codes, scales and biases of the groups; gradients pass through rounding."""
        values = learned["values"]
        scales = self._scales + learned["scales"] * (_SCALES * self._unit)
        biases = self._biases + learned["biases"] * (_BIASES * self._unit)
        return (
            _through(values, mx.clip(mx.round(values), 0, self._top)),
            _through(scales, scales.astype(STORED).astype(mx.float32)),
            _through(biases, biases.astype(STORED).astype(mx.float32)),
        )

    def dense(self, learned: _Dense) -> dict[str, mx.array]:
        """What they stand for, by name."""
        codes, scales, biases = self._parts(learned)
        whole = mx.split(codes * scales + biases, self._ends)
        named = zip(self._shapes.items(), whole, strict=True)
        return {name: part.reshape(shape) for (name, shape), part in named}

    def parts(self, learned: _Dense) -> dict[str, Parts]:
        """Packed codes, scales and biases by name."""
        split = (mx.split(part, self._ends) for part in self._parts(learned))
        found = {}
        for (name, (rows, columns)), codes, scales, biases in zip(
            self._shapes.items(), *split, strict=True
        ):
            whole = mx.round(codes).reshape(rows, columns).astype(mx.uint32)
            s, b = (part.reshape(rows, -1).astype(STORED) for part in (scales, biases))
            found[name] = pack(whole, self._form.bits), s, b
        return found

    def bound(self, learned: _Dense) -> dict[str, mx.array]:
        """Values no further outside the codes than gradients soon bring back."""
        values = mx.clip(learned["values"], -0.5, self._top + 0.5)
        return {**learned, "values": values}


def _through(value: mx.array, rounded: mx.array) -> mx.array:
    return value + mx.stop_gradient(rounded - value)


class _Student:
    """A model whose matrices are what is learned, at ``start`` what was rounded."""

    def __init__(
        self,
        config: LmConfig,
        modules: Modules,
        dense: _Dense,
        rounded: Mapping[str, tuple[Quantization, Parts]],
    ) -> None:
        self._lm = trainable_lm(config)
        self._modules = modules
        # As they are written.
        self._fixed = {
            name: weight.astype(STORED).astype(mx.float32)
            for name, weight in dense.items()
            if name not in rounded
        }
        forms: dict[Quantization, dict[str, Parts]] = {}
        for name, (form, parts) in rounded.items():
            forms.setdefault(form, {})[name] = parts
        self._groups = {str(f): _Group(f, dense, parts) for f, parts in forms.items()}
        self.start = {key: group.start for key, group in self._groups.items()}

    def logits(self, learned: _Learned, batch: Batch) -> tuple[mx.array, mx.array]:
        """As ``logits`` of a model."""
        weights = dict(self._fixed)
        for key, group in self._groups.items():
            weights |= group.dense(learned[key])
        put(self._lm, self._modules, weights)
        return logits(self._lm, batch)

    def bound(self, learned: _Learned) -> _Learned:
        """What was learned, kept within bounds."""
        return {key: g.bound(learned[key]) for key, g in self._groups.items()}

    def parts(self, learned: _Learned) -> dict[str, Parts]:
        """Packed codes, scales and biases by target."""
        found: dict[str, Parts] = {}
        for key, group in self._groups.items():
            found |= group.parts(learned[key])
        return found


def put(lm: Lm, modules: Modules, dense: _Dense) -> None:
    """Give ``lm`` its matrices and norms, by target."""
    named = []
    for name, targets in modules.items():
        shares = [dense[target] for target in targets]
        named.append((f"{name}.weight", mx.concatenate(shares)))
    lm.load_weights(named, strict=True)


class _Linear(nn.Module):
    """``nn.Linear`` by ``product``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def __call__(self, x: mx.array) -> mx.array:
        return product(x, self.weight)


def trainable_lm(config: LmConfig) -> Lm:
    """A model without weights whose products have quick gradients."""
    lm = Lm(config)
    own = tree_map(
        lambda m: _Linear(m) if isinstance(m, nn.Linear) else m,
        lm.leaf_modules(),
        is_leaf=nn.Module.is_module,
    )
    lm.update_modules(own)
    return lm


class _Cache(KvCache):
    """A cache whose attention has gradients everywhere."""

    def attend(
        self, layer: int, qkv: mx.array, max_period: float, mask: Mask
    ) -> mx.array:
        """Attention of new positions (batch, 3 heads, t, head_dim), which are added."""
        if not isinstance(mask, mx.array):
            mask = mx.array(np.tri(qkv.shape[2], dtype=bool))
        q, k, v = mx.split(qkv, 3, axis=1)
        q, k = (self.rotate(x, max_period) for x in (q, k))
        return _attention(q, k, v, mask)


def _attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    scores = product(q * q.shape[-1] ** -0.5, k)
    weights = mx.softmax(mx.where(mask, scores, -1e9), axis=-1)
    return product(weights, v.swapaxes(-1, -2))


@dataclass(frozen=True)
class Batch:
    """Conversations side by side.

    ``columns`` (batch, streams, t + 1); ``saved`` (batch, t, dim) replace what is read
    where ``is_saved``; of the batch's positions ``places`` (n,) are those that are
    answered, by ``given`` (n, agent streams).
    """

    columns: mx.array
    saved: mx.array
    is_saved: mx.array
    places: mx.array
    given: mx.array


def make_batch(conversations: Sequence[Conversation], config: LmConfig) -> Batch:
    """Shorter ones end in columns that nobody looks at."""
    t = max(c.columns.shape[1] for c in conversations) - 1
    columns = np.zeros((len(conversations), config.num_streams, t + 1), np.int32)
    saved = np.zeros((len(conversations), t, config.dim), np.float32)
    is_saved = np.zeros((len(conversations), t, 1), bool)
    places, given = [], []
    for row, c in enumerate(conversations):
        length = c.columns.shape[1]
        columns[row, :, :length] = c.columns
        if count := len(c.embeddings):
            saved[row, :count] = c.embeddings
            is_saved[row, :count] = True
        places.append(row * t + np.arange(length - 1 - c.frames, length - 1))
        given.append(c.columns[: config.num_agent_streams, -c.frames :].T)
    return Batch(
        mx.array(columns),
        mx.array(saved),
        mx.array(is_saved),
        mx.array(np.concatenate(places)),
        mx.array(np.concatenate(given)),
    )


def logits(lm: Lm, batch: Batch) -> tuple[mx.array, mx.array]:
    """Text (n, text_card) and agent (codebooks, n, card) of the places answered."""
    x = mx.where(batch.is_saved, batch.saved, _inputs(lm, batch.columns[:, :, :-1]))
    x = lm.temporal(x, _Cache(lm.config.num_layers, lm.config.window))
    hidden, text = lm.head(x.reshape(-1, x.shape[-1])[batch.places])
    return text, _agent_logits(lm.depformer, lm.config, hidden, batch.given)


def _inputs(lm: Lm, columns: mx.array) -> mx.array:
    """As ``lm.embed``, added in one operation: gradients of slices are whole arrays."""
    config = lm.config
    offsets = np.arange(config.n_q, dtype=np.int32)[:, None] * (config.card + 1)
    audio = embed(lm.audio_emb, columns[:, 1:], mx.array(offsets)).sum(axis=1)
    return audio + embed(lm.text_emb, columns[:, 0])


def _agent_logits(
    depformer: Depformer, config: LmConfig, hidden: mx.array, given: mx.array
) -> mx.array:
    """All steps at once, since the tokens are known: (codebooks, n, card)."""
    steps, heads = config.num_codebooks, config.depformer_num_heads
    n = len(hidden)

    def stacked(name: str) -> mx.array:
        found = []
        for step in depformer.steps:
            module = step
            for part in name.split("."):
                module = module[int(part)] if part.isdigit() else module[part]
            found.append(module.weight)
        return mx.stack(found)

    def normed(x: mx.array, name: str) -> mx.array:
        return mx.fast.rms_norm(x, None, RMS_NORM_EPS) * stacked(name)[:, None]

    offsets = mx.array(np.arange(steps - 1, dtype=np.int32) * (config.card + 1))
    before = mx.concatenate(
        [
            embed(depformer.text_emb, given[:, :1]),
            embed(depformer.audio_emb, given[:, 1:steps], offsets),
        ],
        axis=1,
    )
    inputs = product(hidden, depformer.input.weight).reshape(n, steps, -1)
    x = (inputs + before).swapaxes(0, 1)
    visible = np.tri(steps, dtype=bool)
    if 0 <= config.hiding_step < steps:
        visible[config.hiding_step, 0] = False
    mask = mx.array(visible)
    for number in range(config.depformer_num_layers):
        layer = f"layers.{number}."
        qkv = product(normed(x, layer + "norm1"), stacked(layer + "in_proj"))
        q, k, v = (
            part.reshape(steps, n, heads, -1).transpose(1, 2, 0, 3)
            for part in mx.split(qkv, 3, axis=-1)
        )
        y = _attention(q, k, v, mask).transpose(2, 0, 1, 3).reshape(x.shape)
        x = x + product(y, stacked(layer + "out_proj"))
        wide = product(normed(x, layer + "norm2"), stacked(layer + "gating.linear_in"))
        gate, value = mx.split(wide, 2, axis=-1)
        x = x + product(nn.silu(gate) * value, stacked(layer + "gating.linear_out"))
    return product(x, stacked("head"))


def _divergences(ours: tuple[mx.array, ...], other: tuple[mx.array, ...]) -> mx.array:
    """The mean divergence of ``other`` from ``ours``: (1 + codebooks,)."""
    text, agent = (_divergence(a, b) for a, b in zip(ours, other, strict=True))
    return mx.concatenate([text.mean(keepdims=True), agent.mean(axis=1)])


def _divergence(a: mx.array, b: mx.array) -> mx.array:
    log_a, log_b = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (a, b))
    return (mx.exp(log_a) * (log_a - log_b)).sum(axis=-1)
