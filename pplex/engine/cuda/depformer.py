"""All depformer steps of a batch of rows as one CUDA kernel.

MLX takes over four hundred kernels for them, whose launching takes the host longer than
their work takes the GPU.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn

from pplex.engine.cuda.compiler import Kernel, read_source, with_constants
from pplex.engine.cuda.driver import num_multiprocessors, shared_memory
from pplex.engine.cuda.weights import DENSE, form_of, stack
from pplex.model.config import LmConfig
from pplex.model.lm import Lm
from pplex.model.sampling import Sampler

NAME = "pplex_depformer"
THREADS = 256
# Rows of a team of blocks, and how much wider tiles are than of the fewest columns, by
# how many rows there are at least. A compiled kernel each.
TILES = {1: (16, 1), 17: (64, 1), 65: (64, 4)}
LEAST_SHARED, MOST_SHARED = 162 << 10, 227 << 10
_OTHER_SHARED = 2048  # more than all but the stages in its `Shared`
MAX_STEPS = 16
HEAD_DIMS = 8, 16, 32, 64, 128, 256

ENTRY = f"""
extern "C" __global__ __launch_bounds__({THREADS}, 1) void {NAME}(
    const bf16* qkv, const bf16* out, const bf16* up, const bf16* down,
    const bf16* head, const bf16* table, const float* norm1, const float* norm2,
    const bf16* inputs, const bf16* text_table, const int* column,
    const unsigned* keys, const int* given, unsigned* counters, int* next_column,
    bf16* work, float* ssq, int rows, int has_keys, int has_given, int first,
    int width, float temperature, int top_k) {{
  Weights weights{{qkv, out, up, down, head, table, norm1, norm2}};
  bf16* normed = work + (size_t)rows * DIM;
  bf16* past = normed + (size_t)rows * DIM;
  bf16* y = past + (size_t)rows * LAYERS * STEPS * WIDTH;
  bf16* hidden = y + (size_t)rows * DIM;
  Work all{{work, normed, ssq, past, y, hidden, hidden + (size_t)rows * HIDDEN}};
  depformer(weights, all, inputs, text_table, column, has_keys ? keys : nullptr,
            has_given ? given : nullptr, counters, next_column, rows, first, width,
            temperature, top_k);
}}
"""


class DepformerKernel:
    """The kernel for one model. Its matrices are stacked, the modules hold views."""

    def __init__(self, lm: Lm) -> None:
        config, depformer = lm.config, lm.depformer
        layers = [layer for step in depformer.steps for layer in step.layers]
        stacks = [
            [layer.in_proj for layer in layers],
            [layer.out_proj for layer in layers],
            [layer.gating.linear_in for layer in layers],
            [layer.gating.linear_out for layer in layers],
            [step.head for step in depformer.steps],
        ]
        self._weights = [stack(modules)[0][0] for modules in stacks]
        self._weights.append(depformer.audio_emb.weight)
        for norms in ([x.norm1 for x in layers], [x.norm2 for x in layers]):
            weights = mx.concatenate([norm.weight for norm in norms])
            self._weights.append(weights.astype(mx.float32))
        self._text_table = depformer.text_emb.weight
        self._sizes, memory = _sizes(config), min(shared_memory(), MOST_SHARED)

        def compiled(rows: int) -> Kernel:
            return Kernel.of(NAME, source(config, rows, memory), THREADS, memory)

        with ThreadPoolExecutor(len(TILES)) as pool:  # seconds, where none is kept
            self._kernels = dict(zip(TILES, pool.map(compiled, TILES), strict=True))
        self._blocks = num_multiprocessors()
        # The kernel leaves zeros in the two of a team. MLX puts small arrays where the
        # host can reach them, and gives others memory that the host has read if it has
        # kept some: a barrier there takes a hundred times as long.
        mx.synchronize()
        mx.clear_cache()
        self._counters = mx.zeros(32 * self._blocks, mx.uint32)
        mx.eval(self._weights, self._counters)

    def __call__(
        self,
        inputs: mx.array,
        column: mx.array,
        keys: mx.array | None,
        given: mx.array | None,
        sampler: Sampler,
    ) -> mx.array:
        """``column`` int32 (rows, streams) with the codes of the agent put in.

        ``inputs`` (rows, steps * dim) bfloat16 are what the temporal transformer gives
        to each step. ``keys`` (rows, 2) are those of the noise, None to take the
        largest; ``given`` (rows, agent streams) is what is chosen already.
        """
        rows, s = len(column), self._sizes
        per_row = (
            s["DIM"] * (3 + 3 * s["LAYERS"] * s["STEPS"]) + s["HIDDEN"] + s["CARD"]
        )
        config = sampler.config
        kernel = self._kernels[max(least for least in TILES if least <= rows)]
        next_column, _, _ = kernel(
            [*self._weights, inputs, self._text_table, column]
            + [column if keys is None else keys, column if given is None else given]
            + [self._counters],
            [
                (column.shape, mx.int32),
                ((rows * per_row,), mx.bfloat16),
                ((rows * s["DIM"] // 8,), mx.float32),
            ],
            [rows, int(keys is not None), int(given is not None), sampler.text_noise]
            + [sampler.noise_width, 0.0 if keys is None else float(config.temp)]
            + [sampler.top_k],
            blocks=(self._blocks, 1),
        )
        return next_column


def source(config: LmConfig, rows: int, shared_memory: int) -> str:
    """The kernel's text for a model of these sizes; ``rows`` are a key of ``TILES``."""
    texts = [read_source("common.cu"), read_source("grid.cu")]
    texts.append(read_source("depformer.cu"))
    of_team, wider = TILES[rows]
    stages = (shared_memory - _OTHER_SHARED) // 1024 * 1024
    sizes = {"ROWS": of_team, "WIDER": wider, "STAGES_BYTES": stages}
    return with_constants(_sizes(config) | sizes, *texts, ENTRY)


def _sizes(config: LmConfig) -> dict[str, int]:
    return {
        "THREADS": THREADS,
        "DIM": config.depformer_dim,
        "HEADS": config.depformer_num_heads,
        "HIDDEN": config.depformer_hidden_dim,
        "CARD": config.card,
        "LAYERS": config.depformer_num_layers,
        "STEPS": config.num_codebooks,
        "HIDING_STEP": config.hiding_step,
        "STREAMS": config.num_streams,
    }


def supports(lm: Lm) -> bool:
    """Whether the kernel can run ``lm``: all in bfloat16, of sizes it knows."""
    config, depformer = lm.config, lm.depformer
    if shared_memory() < LEAST_SHARED:
        return False
    parts: list[nn.Module] = [depformer.text_emb, depformer.audio_emb]
    parts += [step.head for step in depformer.steps]
    for step in depformer.steps:
        for layer in step.layers:
            parts += [layer.in_proj, layer.out_proj]
            parts += [layer.gating.linear_in, layer.gating.linear_out]
    return (
        all(form_of(part) == DENSE for part in parts)
        and config.depformer_dim % 32 == config.depformer_hidden_dim % 32 == 0
        and config.depformer_dim / config.depformer_num_heads in HEAD_DIMS
        and config.card % 8 == 0
        and config.num_codebooks <= MAX_STEPS
    )
