"""``config.json`` of a split folder, as the published ones and complete besides."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pplex.config import LmConfig, ModelConfig, gated_hidden_dim

BASE_MODEL = "nvidia/personaplex-7b-v1"


def split_config(
    config: ModelConfig, steps: int, quantization: dict[str, Any], voices: list[str]
) -> dict[str, Any]:
    """The keys of the published folders; ``explicit`` has every size that is used.

    ``steps`` is how many depformer steps the files hold.
    """
    lm = config.lm
    return {
        "model_type": "personaplex",
        "version": "pplex",
        "base_model": BASE_MODEL,
        "temporal": {
            "dim": lm.dim,
            "num_layers": lm.num_layers,
            "num_heads": lm.num_heads,
            "hidden_scale": 1.5 * lm.hidden_dim / lm.dim,
            "n_q": lm.num_codebooks,  # of one side, as published
            "card": lm.card,
            "text_card": lm.text_card,
            "context": lm.context,
            "max_period": lm.max_period,
        },
        "depformer": {
            "dim": lm.depformer_dim,
            "num_layers": lm.depformer_num_layers,
            "num_heads": lm.depformer_num_heads,
            "dim_feedforward": lm.depformer_hidden_dim,
            "num_steps": steps,
            "context": lm.num_codebooks,
            "weights_per_step": True,
            "multi_linear": True,
        },
        "mimi": {
            "sample_rate": config.sample_rate,
            "frame_rate": config.frame_rate,
            "num_codebooks": lm.n_q,  # of both sides, as published
        },
        "delays": list(lm.delays),
        "quantization": quantization,
        "voices": voices,
        "silence_codes": list(config.silence_codes),
        "sine_codes": list(config.sine_codes),
        "explicit": {"lm": _explicit_lm(lm), "mimi": asdict(config.mimi)},
    }


def _explicit_lm(lm: LmConfig) -> dict[str, Any]:
    sizes = asdict(lm)
    hidden = sizes.pop("hidden_dim"), sizes.pop("depformer_hidden_dim")
    sizes["dim_feedforward"] = _nominal(hidden[0], lm.dim)
    sizes["depformer_dim_feedforward"] = _nominal(hidden[1], lm.depformer_dim)
    return sizes


def _nominal(hidden: int, dim: int) -> int:
    """The feed-forward width that stands for the gated width ``hidden``."""
    nominal = (3 * hidden + 1) // 2
    if nominal == 4 * dim:  # the reference has another rule for this one
        nominal += 1
    assert gated_hidden_dim(nominal) == hidden
    return nominal
