"""A frame of the language model as one CUDA kernel, for one conversation at a time.

MLX launches a kernel for each operation, over a thousand for a frame of the 7B, which
takes longer than their work. ``frame.cu`` does the whole frame in one: its blocks stay
on the GPU and wait for each other between phases. Activations are float32; keys and
values are bfloat16, or at 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from pplex.engine.base import Start, save_place
from pplex.engine.cuda.compiler import Kernel, read_source, with_constants
from pplex.engine.cuda.driver import num_multiprocessors
from pplex.engine.cuda.rows import with_scales
from pplex.engine.cuda.weights import DENSE, form_of, stack
from pplex.engine.mlx.engine import Waiting
from pplex.engine.mlx.exchange import Exchange
from pplex.engine.mlx.saved import save_cache, to_numpy
from pplex.model.cache import GROWTH, KvCache
from pplex.model.config import LmConfig
from pplex.model.depformer import DepformerLayer
from pplex.model.lm import Lm
from pplex.model.rotary import frequencies
from pplex.model.sampling import Sampler, SamplingConfig, noise_key
from pplex.model.streams import NOT_FORCED, TEXT_ROW

THREADS = 512
NAME = "pplex_frame"
MAX_SPLITS = 8
OTHER_FLOATS = 8192  # more than all else in `Shared` of frame.cu

# The kernel's matrices: the modules each is made of, a stack where there are many, and
# the name of its input width. The order is that of `Weights` in frame.cu.
MATRICES: dict[str, tuple[Callable[[Lm], list[Any]], str]] = {
    "text": (lambda lm: [lm.text_emb], "DIM"),
    "audio": (lambda lm: [lm.audio_emb], "DIM"),
    "qkv": (lambda lm: [x.self_attn.in_proj for x in lm.layers], "DIM"),
    "out": (lambda lm: [x.self_attn.out_proj for x in lm.layers], "DIM"),
    "up": (lambda lm: [x.gating.linear_in for x in lm.layers], "DIM"),
    "down": (lambda lm: [x.gating.linear_out for x in lm.layers], "HIDDEN"),
    "head": (lambda lm: [lm.text_linear], "DIM"),
    "dep_in": (lambda lm: [lm.depformer.input], "DIM"),
    "dep_text": (lambda lm: [lm.depformer.text_emb], "DEP_DIM"),
    "dep_audio": (lambda lm: [lm.depformer.audio_emb], "DEP_DIM"),
    "dep_qkv": (lambda lm: [x.in_proj for x in _steps(lm)], "DEP_DIM"),
    "dep_out": (lambda lm: [x.out_proj for x in _steps(lm)], "DEP_DIM"),
    "dep_up": (lambda lm: [x.gating.linear_in for x in _steps(lm)], "DEP_DIM"),
    "dep_down": (lambda lm: [x.gating.linear_out for x in _steps(lm)], "DEP_HIDDEN"),
    "dep_head": (lambda lm: [x.head for x in lm.depformer.steps], "DEP_DIM"),
}
NORMS: dict[str, Callable[[Lm], list[Any]]] = {
    "norm1": lambda lm: [x.norm1 for x in lm.layers],
    "norm2": lambda lm: [x.norm2 for x in lm.layers],
    "out_norm": lambda lm: [lm.out_norm],
    "dep_norm1": lambda lm: [x.norm1 for x in _steps(lm)],
    "dep_norm2": lambda lm: [x.norm2 for x in _steps(lm)],
}


def _steps(lm: Lm) -> Iterator[DepformerLayer]:
    """Every layer of every depformer step, in the kernel's order."""
    return (layer for step in lm.depformer.steps for layer in step.layers)


class FrameCache:
    """The ring of keys and values that the kernel writes into.

    ``arrays`` are keys and values (layers, heads, slots, head_dim) bfloat16, or words
    and scales of each; position ``p`` lies in slot ``p % window``. MLX is not told that
    the kernel writes to them: nothing else may hold these arrays.
    """

    def __init__(self, source: KvCache, room: int = 0) -> None:
        """Start from what the temporal transformer has kept of a prompt.

        There is room for ``room`` more positions, or the window.
        """
        self.window, self.end, self._bits = source.window, source.end, source.bits
        arrays, layers = [a.squeeze(0) for a in source.arrays()], source.num_layers
        if self._bits is None:
            arrays = [a.astype(mx.bfloat16) for a in arrays]
        firsts = range(0, len(arrays), layers)
        self.arrays = [mx.stack(arrays[i : i + layers]) for i in firsts]
        mx.eval(self.arrays)
        self._grow(self.end + room)

    def save(self) -> KvCache:
        """A cache from which to go on, once its arrays are copied."""
        mx.synchronize()
        cache = KvCache(len(self.arrays[0]), self.window, bits=self._bits)
        cache.end = self.end
        cache.put([layer[None] for array in self.arrays for layer in array])
        return cache

    def place(self) -> list[int]:
        """The next position, its slot, the positions then visible, the slots."""
        visible = min(self.end + 1, self.window)
        if visible > self.arrays[0].shape[2]:
            self._grow((visible // GROWTH + 1) * GROWTH)
        slots = self.arrays[0].shape[2]
        return [self.end, self.end % self.window, visible, slots]

    def _grow(self, size: int) -> None:
        if (more := min(self.window, size) - self.arrays[0].shape[2]) <= 0:
            return
        room = [(0, 0), (0, 0), (0, more), (0, 0)]
        mx.synchronize()  # frames under way still write to the old arrays
        self.arrays = [mx.pad(array, room) for array in self.arrays]
        mx.eval(self.arrays)


class FrameKernel:
    """The kernel for one model. Its matrices are stacked, the modules hold views."""

    def __init__(self, lm: Lm, kv_bits: int | None = None) -> None:
        self.config = lm.config
        self.nothing = mx.full(lm.config.num_agent_streams, NOT_FORCED, mx.int32)
        self._blocks = num_multiprocessors()
        self._splits = max(1, min(MAX_SPLITS, self._blocks // lm.config.num_heads))
        self._arrays: list[mx.array] = []
        forms = {}
        for name, (modules, _) in MATRICES.items():
            parts, bits, group = stack(modules(lm))
            self._arrays += parts
            forms[name] = bits, group
        for modules in NORMS.values():
            self._arrays.append(mx.concatenate([m.weight for m in modules(lm)]))
        head_dim = lm.config.dim // lm.config.num_heads
        angles = frequencies(head_dim, lm.config.max_period)
        self._arrays.append(mx.array(angles))
        mx.eval(self._arrays)
        self.offsets, self._work = _workspace(_sizes(lm.config, self._splits))
        text, floats = source(lm.config, forms, self._splits, kv_bits)
        self._kernel = Kernel.of(NAME, text, THREADS, 4 * floats)

    def __call__(
        self,
        tokens: mx.array,
        user: mx.array,
        cache: FrameCache,
        sampler: Sampler,
        key: tuple[int, int],
        given: mx.array | None,
    ) -> mx.array:
        """The column (streams,) after ``tokens`` (streams,).

        ``user`` (codebooks,) are the user's tokens in it; ``key`` is the noise's;
        ``given`` (agent streams,) holds ids to take instead, ``NOT_FORCED`` elsewhere.
        The cache moves on by a position.
        """
        return self.run(tokens, user, cache, sampler, key, given)[0]

    def run(
        self,
        tokens: mx.array,
        user: mx.array,
        cache: FrameCache,
        sampler: Sampler,
        key: tuple[int, int],
        given: mx.array | None,
    ) -> tuple[mx.array, mx.array]:
        """The column, and the kernel's workspace, laid out as ``offsets`` says."""
        config = sampler.config
        place = cache.place()
        given = self.nothing if given is None else given
        column, work = self._kernel(
            [*self._arrays, tokens, user, given, *with_scales(cache.arrays)],
            [((self.config.num_streams,), mx.int32), ((self._work,), mx.float32)],
            [*place, *np.array(key, np.uint32).view(np.int32).tolist()]
            + [float(config.text_temp), float(config.temp)]
            + [sampler.text_top_k, sampler.top_k]
            + [sampler.text_noise, sampler.noise_width],
            blocks=(self._blocks, 1),
            init_value=0,
        )
        cache.end += 1
        return column, work


def supports(lm: Lm) -> bool:
    """Whether the kernel can run ``lm`` on this device: how its matrices are stored."""
    config = lm.config
    widths = {"DIM": config.dim, "HIDDEN": config.hidden_dim}
    widths |= {"DEP_DIM": config.depformer_dim}
    widths |= {"DEP_HIDDEN": config.depformer_hidden_dim}
    for modules, width in MATRICES.values():
        forms = {form_of(module) for module in modules(lm)}
        if len(forms) != 1 or (form := forms.pop()) is None:
            return False
        bits, group = form
        if widths[width] % max(group, 128 // bits):
            return False
    heads = config.dim // config.num_heads, config.depformer_dim
    return heads[0] in (16, 32, 64, 128) and num_multiprocessors() >= config.num_heads


def source(
    config: LmConfig,
    forms: dict[str, tuple[int, int]],
    splits: int,
    kv_bits: int | None = None,
) -> tuple[str, int]:
    """The kernel's text, and the floats of shared memory that it needs.

    ``forms`` are bits and group size of each of ``MATRICES``; ``splits`` is how many
    blocks attend for a head.
    """
    sizes = _sizes(config, splits)
    staged = max(
        _staged(sizes[width], bits)
        for (_, width), (bits, _) in zip(MATRICES.values(), forms.values(), strict=True)
    )
    floats = staged + staged // 16 + sizes["MAX_SCORES"] + OTHER_FLOATS
    sizes |= {"STAGED": staged, "THREADS": THREADS, **_workspace(sizes)[0]}
    names = [f"#define {n.upper()} {b}, {group}" for n, (b, group) in forms.items()]
    sizes["KV_BITS"] = kv_bits or DENSE[0]
    files = "common.cu", "kept.cu", "grid.cu", "frame.cu"
    texts = [read_source(file) for file in files]
    return with_constants(sizes, *names, *texts, _entry(forms)), floats


def _staged(width: int, bits: int) -> int:
    """Words that all warps together stage of a vector: see `Product` in frame.cu."""
    chunks, warps = -(-width * bits // 512), THREADS // 32
    share = 1 << (min(warps, chunks).bit_length() - 1)
    return warps * -(-chunks // share) * 512 // bits


def _sizes(config: LmConfig, splits: int) -> dict[str, int]:
    return {
        "DIM": config.dim,
        "HEADS": config.num_heads,
        "LAYERS": config.num_layers,
        "HIDDEN": config.hidden_dim,
        "TEXT_CARD": config.text_card,
        "CARD": config.card,
        "N_Q": config.n_q,
        "HIDING_STEP": config.hiding_step,
        "STEPS": config.num_codebooks,
        "DEP_DIM": config.depformer_dim,
        "DEP_HEADS": config.depformer_num_heads,
        "DEP_LAYERS": config.depformer_num_layers,
        "DEP_HIDDEN": config.depformer_hidden_dim,
        "SPLITS": splits,
        "MAX_SCORES": -(-config.window // splits) + 1,
    }


def _workspace(sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Where the kernel's vectors lie in its workspace, and its size, in floats."""
    s = sizes
    steps, dep = s["STEPS"], s["DEP_DIM"]
    vectors = {
        "X": s["DIM"],
        "QKV": 3 * s["DIM"],
        "HIDDEN": s["HIDDEN"],
        "LOGITS": s["TEXT_CARD"],
        "PARTS": s["HEADS"] * s["SPLITS"] * (s["DIM"] // s["HEADS"] + 2),
        "DEP_IN": steps * dep,
        "DEP_X": dep,
        "DEP_QKV": s["DEP_LAYERS"] * steps * 3 * dep,
        "DEP_HIDDEN": s["DEP_HIDDEN"],
        "DEP_LOGITS": steps * s["CARD"],
    }
    offsets, end = {}, 32  # counters first
    for name, size in vectors.items():
        end = -(-end // 32) * 32
        offsets[f"WORK_{name}"] = end
        end += size
    return offsets, end


def _entry(forms: dict[str, tuple[int, int]]) -> str:
    """The kernel's own text: it gathers its parameters into structures."""
    parameters, fields = [], []
    for name, (bits, _) in forms.items():
        if bits == DENSE[0]:
            parameters.append(f"const bf16* {name}")
            fields.append(f"{{{name}, nullptr, nullptr}}")
        else:
            parts = "const void* {0}, const bf16* {0}_s, const bf16* {0}_b"
            parameters.append(parts.format(name))
            fields.append(f"{{{name}, {name}_s, {name}_b}}")
    for name in (*NORMS, "frequencies"):
        parameters.append(f"const float* {name}")
        fields.append(name)
    parameters += [
        *("const int* tokens", "const int* user", "const int* given"),
        *("void* keys", "void* key_scales", "void* values", "void* value_scales"),
        *("int* column", "float* work"),
        *(f"int {name}" for name in ("position", "slot", "visible", "capacity")),
        *("unsigned key", "unsigned frame_number"),
        *("float text_temperature", "float temperature"),
        *(f"int {name}" for name in ("text_top_k", "top_k")),
        *(f"int {name}" for name in ("text_noise", "noise_width")),
    ]
    return (
        f'extern "C" __global__ __launch_bounds__({THREADS}, 1)\n'
        f"void {NAME}({', '.join(parameters)}) {{\n"
        f"  Weights weights{{{', '.join(fields)}}};\n"
        "  Place place{position, slot, visible, capacity};\n"
        "  Ring ring{keys, key_scales, values, value_scales};\n"
        "  Sampling sampling{make_uint2(key, frame_number), text_temperature,\n"
        "    temperature, text_top_k, top_k, text_noise, noise_width};\n"
        "  frame(weights, tokens, user, given, place, sampling, ring, column, work);\n"
        "}\n"
    )


class FrameRows:
    """The one row that the kernel steps."""

    def __init__(
        self,
        kernel: FrameKernel,
        sampling: SamplingConfig,
        live: bool,
        exchange: Exchange,
    ) -> None:
        self._exchange = exchange
        self._kernel, self._num_agent = kernel, kernel.config.num_agent_streams
        self._live, self._reads_user = live, live or kernel.config.is_moshi
        self._sampler = Sampler.of(kernel.config, sampling)
        self._cache: FrameCache | None = None
        self._seed = self._frame = 0
        self._column: mx.array
        self._given: mx.array | None = None

    def join(self, start: Start, seed: int, frames: int | None = None) -> int:
        """Begin a conversation after a prompt; its place."""
        assert self._cache is None
        source = start.memory
        room = source.window if self._live else frames or 0
        self._cache = FrameCache(source, room)
        self._seed, self._frame = seed, start.steps
        self._column = mx.array(start.prompt.columns[:, -1])
        self._given = mx.array(start.prompt.pending[: self._num_agent])
        return 0

    def save(self, row: int, ahead: int = 0) -> dict[str, np.ndarray]:
        """What a conversation goes on from after the steps that were asked for."""
        assert self._cache is not None
        given = np.full(self._num_agent, NOT_FORCED, np.int32)
        if self._given is not None:
            given = to_numpy(self._given)
        place = save_place(to_numpy(self._column), given, self._frame - ahead)
        return place | save_cache(self._cache.save(), ahead)

    def leave(self, row: int) -> None:
        """End the conversation; another may begin."""
        self._cache = None

    def step(self, user: np.ndarray, text: np.ndarray | None = None) -> Waiting:
        """Make a step."""
        assert self._cache is not None
        if text is not None and text[0] != NOT_FORCED:
            given = self._kernel.nothing if self._given is None else self._given
            self._given = mx.array(given)
            self._given[TEXT_ROW] = int(text[0])
        key = noise_key(self._seed, self._frame)
        tokens, cache = self._exchange.send(user[0]), self._cache
        if self._reads_user:
            agent = self._column[: self._num_agent]
            self._column = mx.concatenate([agent, tokens])
        self._column = self._kernel(
            self._column, tokens, cache, self._sampler, key, self._given
        )
        self._given, self._frame = None, self._frame + 1
        # What the host reads is moved, and stays slow to write to: not the column.
        coming = self._exchange.bring(self._column[None, : self._num_agent] + 0)
        mx.async_eval(coming.array, self._column)
        return Waiting(coming, [0], 1)
