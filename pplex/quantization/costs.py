"""What each part of a model costs when it is rounded, and the mixed recipe from that.

``_COSTS`` was measured with `pplex models sensitivity` on an earlier training of the
built-in model. Today's weights give other figures, but mixed recipes from them came out
no better on conversations that they were not measured on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pplex.checkpoint.layouts import Matrix
from pplex.errors import PplexError
from pplex.files import reading
from pplex.model.config import LmConfig
from pplex.quantization.recipe import (
    Form,
    Recipe,
    make_parts,
    mixed,
    recipe_bytes,
    uniform,
)
from pplex.values import fit, read_json

# Mean divergence over the streams (nats) with this part alone at 4 bits in groups of
# 64. Parts that are not here cost nothing: they are never run in a conversation.
_COSTS: dict[str, float] = {
    "text_emb": 8.53e-06,
    "emb": 1.47e-05,
    "text_linear": 4.51e-06,
    "temporal.first.in_proj": 6.56e-05,
    "temporal.first.out_proj": 1.05e-05,
    "temporal.first.linear_in": 6.8e-06,
    "temporal.first.linear_out": 5.64e-06,
    "temporal.middle.in_proj": 2.59e-05,
    "temporal.middle.out_proj": 2.99e-06,
    "temporal.middle.linear_in": 7.19e-06,
    "temporal.middle.linear_out": 8.34e-06,
    "temporal.last.in_proj": 1.13e-06,
    "temporal.last.out_proj": 1.1e-06,
    "temporal.last.linear_in": 5.6e-06,
    "temporal.last.linear_out": 1.49e-06,
    "depformer_text_emb": 7.58e-07,
    "depformer_in": 5.48e-05,
    "depformer_emb": 2.28e-06,
    "linears.first": 2.17e-05,
    "linears": 2.11e-06,
    "depformer.all.in_proj": 5.86e-05,
    "depformer.all.out_proj": 4.74e-06,
    "depformer.first.linear_in": 1.12e-06,
    "depformer.first.linear_out": 1.18e-06,
    "depformer.others.linear_in": 5.01e-06,
    "depformer.others.linear_out": 5.48e-06,
}


def read_costs(path: Path | None) -> dict[str, float]:
    """Costs by part, as `pplex models sensitivity` wrote them; else ``_COSTS``."""
    if path is None:
        return _COSTS
    with reading(
        f"--sensitivity {path}", "is not a file of `pplex models sensitivity`"
    ):
        costs: dict[str, float] = fit(read_json(path), {"parts": {str: float}})["parts"]
    if not costs or not all(cost >= 0 for cost in costs.values()):
        raise PplexError(f"--sensitivity {path}: costs must be numbers from 0")
    return costs


def mixed_recipe(
    config: LmConfig,
    matrices: list[Matrix],
    form: Form,
    max_bytes: int | None,
    costs: Mapping[str, float],
) -> Recipe:
    """The recipe of least cost within ``max_bytes``, else within ``uniform``'s size."""
    if max_bytes is None:
        max_bytes = recipe_bytes(matrices, uniform(matrices, form))
    parts, rest = make_parts(
        matrices, config.num_layers, config.num_codebooks, lambda p: costs.get(p, 0.0)
    )
    return mixed(parts, rest, max_bytes)
