"""All depformer steps of a batch of rows as one CUDA kernel.

MLX takes over four hundred kernels for them, whose launching takes the host longer than
their work takes the GPU.
"""

from __future__ import annotations

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
TILE_FLOATS = 64 * (48 + 8) * THREADS // 32  # the largest tile's sums
OTHER_FLOATS = 1024  # more than all else in its `Shared`
SHARED_MEMORY = 4 * (TILE_FLOATS + OTHER_FLOATS)
MAX_STEPS = 16

ENTRY = f"""
extern "C" __global__ __launch_bounds__({THREADS}, 1) void {NAME}(
    const bf16* qkv, const bf16* out, const bf16* up, const bf16* down,
    const bf16* head, const bf16* table, const float* norm1, const float* norm2,
    const bf16* inputs, const bf16* text_table, const int* column,
    const unsigned* keys, const int* given, unsigned* counters, int* next_column,
    bf16* work, float* ssq, int rows, int has_keys, int has_given, int first,
    int width, float temperature, int top_k) {{
  Weights weights{{qkv, out, up, down, head, table, norm1, norm2}};
  bf16* past = work + (size_t)rows * DIM;
  bf16* y = past + (size_t)rows * LAYERS * STEPS * WIDTH;
  bf16* hidden = y + (size_t)rows * DIM;
  Work all{{work, ssq, past, y, hidden, hidden + (size_t)rows * HIDDEN}};
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
        # The kernel leaves zeros in the two it uses. MLX puts arrays as small as two
        # where the host can reach them, and gives others memory that the host has
        # read if it has kept some: a barrier there takes a hundred times as long.
        mx.synchronize()
        mx.clear_cache()
        self._counters = mx.zeros(64, mx.uint32)
        mx.eval(self._weights, self._counters)
        self._sizes = _sizes(config)
        self._kernel = Kernel.of(NAME, source(config), THREADS, SHARED_MEMORY)
        self._blocks = num_multiprocessors()

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
            s["DIM"] * (2 + 3 * s["LAYERS"] * s["STEPS"]) + s["HIDDEN"] + s["CARD"]
        )
        config = sampler.config
        next_column, _, _ = self._kernel(
            [*self._weights, inputs, self._text_table, column]
            + [column if keys is None else keys, column if given is None else given]
            + [self._counters],
            [
                (column.shape, mx.int32),
                ((rows * per_row,), mx.bfloat16),
                ((rows * -(-s["DIM"] // 32),), mx.float32),
            ],
            [rows, int(keys is not None), int(given is not None), sampler.text_noise]
            + [sampler.noise_width, 0.0 if keys is None else float(config.temp)]
            + [sampler.top_k],
            blocks=(self._blocks, 1),
        )
        return next_column


def source(config: LmConfig) -> str:
    """The kernel's text for a model of these sizes."""
    texts = [read_source("common.cu"), read_source("grid.cu")]
    texts.append(read_source("depformer.cu"))
    return with_constants(_sizes(config), *texts, ENTRY)


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
        "TILE_FLOATS": TILE_FLOATS,
    }


def supports(lm: Lm) -> bool:
    """Whether the kernel can run ``lm``: all in bfloat16, of sizes it knows."""
    config, depformer = lm.config, lm.depformer
    if shared_memory() < SHARED_MEMORY:
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
        and config.depformer_dim % (2 * config.depformer_num_heads) == 0
        and config.card % 8 == 0
        and config.num_codebooks <= MAX_STEPS
    )
