"""``config.json``: read into a model's sizes, and written for a split folder.

Key names follow the constructor arguments of NVIDIA's PersonaPlex (nested under
``lm`` and ``mimi``) and the schema of the ``aufklarer/PersonaPlex-7B-MLX`` folders
(``temporal`` and ``depformer``).
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pplex.errors import PplexError
from pplex.files import reading
from pplex.model.config import (
    TEXT_PAD,
    CodecTransformerConfig,
    LmConfig,
    MimiConfig,
    ModelConfig,
    QuantizerConfig,
    SeanetConfig,
    gated_hidden_dim,
)
from pplex.values import read_json, shown

_BASE_MODEL = "nvidia/personaplex-7b-v1"
PERSONAPLEX = "personaplex"  # `model_type`
_MOSHI_MODEL = "kyutai/moshiko-pytorch-bf16"
_MAX_CONFIG_BYTES = 1 << 20


def load_config(path: Path) -> ModelConfig:
    """Read ``config.json`` at ``path``; the published 7B sizes if there is no file."""
    try:
        config = _parse(_read(path))
        _check(config)
    except _ConfigError as e:
        raise PplexError(f"{path}: {e}; {report_it(path)}") from e
    return config


def tells_family(path: Path) -> bool:
    """Whether ``config.json`` says if its model is a PersonaPlex or a Moshi.

    "moshi" as type says nothing: Kyutai's further trained PersonaPlex may have it too.
    """
    raw = _read(path)
    sizes = raw.get("explicit", raw)
    lm = sizes.get("lm") if isinstance(sizes, dict) else None
    is_explicit = isinstance(lm, dict) and "is_moshi" in lm
    return is_explicit or raw.get("model_type") == PERSONAPLEX


def report_it(path: Path) -> str:
    """What to do about a file of a model that should be readable."""
    return (
        f"if {path.name} is as published, report it with what `pplex models verify "
        f"{path.parent}` prints"
    )


def _read(path: Path) -> dict[str, Any]:
    """The object in ``config.json``; an empty one if there is no file."""
    if not os.path.lexists(path):
        return {}
    with reading(f"{path}:", "not readable as JSON"):
        raw = read_json(path, _MAX_CONFIG_BYTES)
    if not isinstance(raw, dict):
        raise PplexError(f"{path}: expected a JSON object at the top")
    return raw


def unknown_keys(path: Path) -> list[str]:
    """Keys of ``config.json`` that mean nothing here, as far as is known; sorted."""
    raw = _read(path)
    top = {*_TOP, *_SECTIONS}
    if "lm" not in raw and "temporal" not in raw:
        top |= _LM_KEYS
    unknown = raw.keys() - top
    for name, known in _SECTIONS.items():
        for group in (name, f"explicit.{name}"):
            section: Any = raw
            for key in group.split("."):
                section = section.get(key) if isinstance(section, dict) else None
            if isinstance(section, dict):
                unknown |= {f"{group}.{key}" for key in section.keys() - known}
    return sorted(unknown)


def split_config(
    config: ModelConfig, steps: int, quantization: dict[str, Any], voices: list[str]
) -> dict[str, Any]:
    """The keys of the published folders; ``explicit`` has every size that is used.

    ``steps`` is how many depformer steps the files hold.
    """
    lm = config.lm
    return {
        "model_type": "moshi" if lm.is_moshi else PERSONAPLEX,
        "version": "pplex",
        "base_model": _MOSHI_MODEL if lm.is_moshi else _BASE_MODEL,
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


class _ConfigError(ValueError):
    """What is wrong with a config, without the file's name."""


def _parse(raw: dict[str, Any]) -> ModelConfig:
    sizes = raw.get("explicit", raw)
    if not isinstance(sizes, dict):
        raise _ConfigError("`explicit` must be an object")
    if "lm" in sizes:
        lm = _parse_lm(_object(sizes, "lm"))
    elif "temporal" in raw:
        lm = _parse_split_lm(raw)
    else:  # as Kyutai's, among keys for other programs; NVIDIA's has no sizes at all
        lm = _parse_lm({key: raw[key] for key in raw.keys() & _LM_KEYS})
    # The split folders describe their codec in part: the sizes are there if seanet is.
    mimi = MimiConfig()
    if "mimi" in sizes and "seanet" in _object(sizes, "mimi"):
        mimi = _parse_mimi(_object(sizes, "mimi"))
    constants: dict[str, Any] = {
        key: _codes(raw[key], key)
        for key in ("silence_codes", "sine_codes")
        if key in raw
    }
    return ModelConfig(lm=lm, mimi=mimi, **constants)


# Arguments of the reference's language model that this port supports with one value.
_LM_FIXED = {
    "existing_text_padding_id": TEXT_PAD,
    "causal": True,
    "layer_scale": None,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_causal": True,
    "depformer_layer_scale": None,
    "depformer_multi_linear": True,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "norm_emb": False,
    "bias_proj": False,
    "text_card_out": None,
    "demux_second_stream": False,
    "cross_attention": False,
    "kv_repeat": 1,
    "depformer_kv_repeat": 1,
    "depformer_low_rank_embeddings": None,
    "depformer_weights_per_step_schedule": None,
}
# Read by the reference, without effect on what it computes.
_LM_IGNORED = {"depformer_context", "depformer_max_period", "depformer_norm"}
_LM_KEYS = {
    *(field.name for field in fields(LmConfig)),
    *_LM_FIXED,
    *_LM_IGNORED,
    *("hidden_scale", "dim_feedforward", "depformer_dim_feedforward"),
} - {"hidden_dim", "depformer_hidden_dim"}


def _parse_lm(raw: dict[str, Any]) -> LmConfig:
    values = dict(raw)
    _take_fixed(values, _LM_FIXED, "lm")
    for key in _LM_IGNORED:
        values.pop(key, None)
    scale = _number(values.pop("hidden_scale", 4.125), "lm.hidden_scale", 0, 64)
    nominal = {}
    for key in ("dim_feedforward", "depformer_dim_feedforward"):
        if (found := values.pop(key, None)) is not None:
            nominal[key] = int(_number(found, f"lm.{key}", 1, _MAX_HIDDEN))
    config = _build(LmConfig, values, "lm")
    dim, depformer_dim = config.dim, config.depformer_dim
    hidden = nominal.get("dim_feedforward", int(scale * dim))
    depformer = nominal.get("depformer_dim_feedforward", int(scale * depformer_dim))
    return replace(
        config,
        hidden_dim=_swiglu_dim(dim, hidden),
        depformer_hidden_dim=_swiglu_dim(depformer_dim, depformer),
    )


def _swiglu_dim(dim: int, feed_forward: int) -> int:
    if feed_forward == 4 * dim:  # the reference's other rule for this one size
        return 21 * dim // 8
    return gated_hidden_dim(feed_forward)


def _parse_split_lm(raw: dict[str, Any]) -> LmConfig:
    temporal, depformer = _object(raw, "temporal"), _object(raw, "depformer")
    base = LmConfig()
    values = {
        "dim": temporal.get("dim", base.dim),
        "num_heads": temporal.get("num_heads", base.num_heads),
        "num_layers": temporal.get("num_layers", base.num_layers),
        "hidden_scale": temporal.get("hidden_scale", 4.125),
        "context": temporal.get("context", base.context),
        "max_period": temporal.get("max_period", base.max_period),
        "text_card": temporal.get("text_card", base.text_card),
        "card": temporal.get("card", base.card),
        "dep_q": depformer.get("num_steps", base.dep_q),
        "depformer_dim": depformer.get("dim", base.depformer_dim),
        "depformer_num_heads": depformer.get("num_heads", base.depformer_num_heads),
        "depformer_num_layers": depformer.get("num_layers", base.depformer_num_layers),
    }
    per_side = temporal.get("n_q", base.num_codebooks)
    hidden = depformer.get("dim_feedforward", base.depformer_hidden_dim)
    most = _LIMITS["lm.n_q"] // 2
    values["n_q"] = 2 * _size(per_side, "temporal.n_q", most)
    hidden = _size(hidden, "depformer.dim_feedforward", _MAX_HIDDEN)
    if "delays" in raw:
        values["delays"] = raw["delays"]
    # This schema gives the depformer's gated width itself.
    return replace(_parse_lm(values), depformer_hidden_dim=hidden)


_MIMI_FIXED = {
    "channels": 1,
    "causal": True,
    "resample_method": "conv",
    "upsample_channel_wise_bug": True,
}
_SEANET_FIXED = {
    "channels": 1,
    "causal": True,
    "n_residual_layers": 1,
    "activation": "ELU",
    "disable_norm_outer_blocks": 0,
    "norm": "none",
    "pad_mode": "constant",
    "true_skip": True,
}
_TRANSFORMER_FIXED = {
    "causal": True,
    "conv_layout": True,
    "gating": "none",
    "norm": "layer_norm",
    "positional_embedding": "rope",
}


def _parse_mimi(raw: dict[str, Any]) -> MimiConfig:
    values = dict(raw)
    _take_fixed(values, _MIMI_FIXED, "mimi")
    encoder_frame_rate = values.pop("encoder_frame_rate", None)
    seanet_raw = dict(_object(values, "seanet"))
    _take_fixed(seanet_raw, _SEANET_FIXED, "mimi.seanet")
    seanet_raw.pop("dilation_base", None)  # one residual layer: dilation 1
    transformer_raw = dict(_object(values, "transformer"))
    _take_fixed(transformer_raw, _TRANSFORMER_FIXED, "mimi.transformer")
    transformer_raw.pop("layer_scale", None)  # the value to initialise with
    quantizer_raw = dict(_object(values, "quantizer"))
    seanet = _build(SeanetConfig, seanet_raw, "mimi.seanet")
    width = seanet.dimension
    for group, name, keys in (
        (transformer_raw, "mimi.transformer", ("input_dimension",)),
        (quantizer_raw, "mimi.quantizer", ("input_dimension", "output_dimension")),
    ):
        _take_fixed(group, dict.fromkeys(keys, width), name)
    _take_fixed(transformer_raw, {"output_dimensions": [width]}, "mimi.transformer")
    for key in ("seanet", "transformer", "quantizer"):
        values.pop(key, None)
    config = replace(
        _build(MimiConfig, values, "mimi"),
        seanet=seanet,
        transformer=_build(CodecTransformerConfig, transformer_raw, "mimi.transformer"),
        quantizer=_build(QuantizerConfig, quantizer_raw, "mimi.quantizer"),
    )
    expected = config.sample_rate / max(1, math.prod(seanet.ratios))
    if encoder_frame_rate not in (None, expected):
        raise _ConfigError(
            f"`mimi.encoder_frame_rate` is {shown(encoder_frame_rate)}, the ratios "
            f"give {expected:g}"
        )
    return config


# Keys at the top that are for people, for other programs, or for choosing files.
_TOP = {
    *("model_type", "version", "base_model", "model_id", "architectures"),
    *("moshi_name", "mimi_name", "tokenizer_name", "voices_name", "voices"),
    *("sample_rate", "frame_rate", "sampling", "lm_gen_config", "quantization"),
    *("conditioners", "fuser", "lora", "lora_name", "tts_config", "stt_config"),
    *("delays", "silence_codes", "sine_codes", "explicit"),
}


def _names(section: type) -> set[str]:
    return {field.name for field in fields(section)}


_SECTIONS = {
    "lm": _LM_KEYS,
    "temporal": {
        *("dim", "num_layers", "num_heads", "hidden_scale", "n_q", "card"),
        *("text_card", "context", "max_period"),
    },
    "depformer": {
        *("dim", "num_layers", "num_heads", "dim_feedforward", "num_steps", "card"),
        *("text_card", "context", "weights_per_step", "multi_linear"),
    },
    "mimi": {
        *_names(MimiConfig),
        *_MIMI_FIXED,
        "encoder_frame_rate",
        *("codebook_size", "codebook_dim", "dimension"),  # in part, as published
        *("seanet_ratios", "transformer_layers"),
    },
    "mimi.seanet": {*_names(SeanetConfig), *_SEANET_FIXED, "dilation_base"},
    "mimi.transformer": {
        *_names(CodecTransformerConfig),
        *_TRANSFORMER_FIXED,
        *("input_dimension", "output_dimensions", "layer_scale"),
    },
    "mimi.quantizer": {
        *_names(QuantizerConfig),
        *("input_dimension", "output_dimension"),
    },
}

# No number may ask for more work or memory than any model of this kind would: what a
# file holds is compared with these sizes, but not all of them show in its tensors.
_MAX_SIZE = 1 << 16
_MAX_HIDDEN = 1 << 20
_LIMITS = {
    "lm.num_layers": 256,
    "lm.depformer_num_layers": 256,
    "lm.text_card": 1 << 20,
    "lm.n_q": 128,
    "lm.dep_q": 128,
    "mimi.sample_rate": 192_000,
    "mimi.num_codebooks": 128,
    "mimi.seanet.ratios": 64,
    "mimi.transformer.num_layers": 256,
    "mimi.transformer.context": 1 << 12,
    "mimi.quantizer.n_q": 1 << 10,
}
# Angles that turn by less than this would be no positions.
_LEAST_PERIOD, _MOST_PERIOD = 10.0, 1e9
_RANGES = {
    "lm.max_period": (_LEAST_PERIOD, _MOST_PERIOD),
    "mimi.transformer.max_period": (_LEAST_PERIOD, _MOST_PERIOD),
    "mimi.frame_rate": (1.0, 1000.0),
}

_Section = TypeVar("_Section")


def _build(cls: type[_Section], values: dict[str, Any], where: str) -> _Section:
    """Make a config section of checked numbers; see ``unknown_keys`` for others."""
    defaults = cls()
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            continue
        default, name = getattr(defaults, key), f"{where}.{key}"
        most = _LIMITS.get(name, _MAX_SIZE)
        if isinstance(default, tuple):
            least = min(default)
            if not isinstance(value, list | tuple) or not all(
                type(v) is int and min(least, 1) <= v <= most for v in value
            ):
                raise _ConfigError(
                    f"`{name}` must be a list of whole numbers, {most} at most"
                )
            value = tuple(value)
        elif isinstance(default, bool):
            if type(value) is not bool:
                raise _ConfigError(f"`{name}` must be true or false")
        elif isinstance(default, float):
            value = _number(value, name, *_RANGES[name])
        else:
            value = _size(value, name, most)
        checked[key] = value
    return cls(**checked)


def _size(value: Any, name: str, most: int) -> int:
    if type(value) is not int or not 0 < value <= most:
        raise _ConfigError(
            f"`{name}` must be a whole number above 0, {most} at most, and is "
            f"{shown(value)}"
        )
    return value


def _number(value: Any, name: str, least: float, most: float) -> float:
    if type(value) not in (int, float) or not least <= value <= most or not value:
        raise _ConfigError(
            f"`{name}` must be a number above 0, {least:g} to {most:g}, and is "
            f"{shown(value)}"
        )
    return float(value)


def _take_fixed(values: dict[str, Any], fixed: dict[str, Any], where: str) -> None:
    """Remove keys with only one supported value from ``values``; others raise."""
    for key, supported in fixed.items():
        found = values.pop(key, supported)
        if found != supported:
            raise _ConfigError(
                f"`{where}.{key}` is {shown(found)}; only {supported!r} is supported"
            )


def _object(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key, {})
    if not isinstance(value, dict):
        raise _ConfigError(f"`{key}` must be an object")
    return value


def _codes(value: Any, key: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(v) is int for v in value):
        raise _ConfigError(f"`{key}` must be a list of whole numbers")
    return tuple(value)


def _check(config: ModelConfig) -> None:
    lm, mimi = config.lm, config.mimi
    codec = mimi.transformer
    per_latent = math.prod(mimi.seanet.ratios) * mimi.latents_per_frame
    problems = {
        "`lm.dim` must be a multiple of 2 x `lm.num_heads`": lm.dim
        % (2 * lm.num_heads),
        "`lm.depformer_dim` must be a multiple of `lm.depformer_num_heads`": (
            lm.depformer_dim % lm.depformer_num_heads
        ),
        "`lm.n_q` must be even: agent and user codebooks": lm.n_q % 2,
        f"`lm.delays` must have {lm.num_streams} entries": (
            len(lm.delays) != lm.num_streams
        ),
        f"`lm.delays` go up to {max(lm.delays, default=0)}; supported are 0 and 1, and "
        "0 for the text": max(lm.delays, default=0) > 1 or lm.delays[:1] != (0,),
        "`lm.context` must be at least 2": lm.context < 2,
        "the feed-forward layers of `lm` must have a width": (
            min(lm.hidden_dim, lm.depformer_hidden_dim) < 1
        ),
        f"`lm.dep_q` must be at least {lm.num_codebooks}": lm.dep_q < lm.num_codebooks,
        f"`lm.card` is {lm.card}, the codec has {mimi.quantizer.bins} bins": (
            lm.card != mimi.quantizer.bins
        ),
        f"the codec gives {mimi.num_codebooks} codebooks, the model needs "
        f"{lm.num_codebooks}": mimi.num_codebooks != lm.num_codebooks,
        "`mimi.quantizer.n_q` is below the number of codebooks used": (
            mimi.quantizer.n_q < mimi.num_codebooks
        ),
        "`mimi.transformer.d_model` must equal `mimi.seanet.dimension`": (
            codec.d_model != mimi.seanet.dimension
        ),
        "`mimi.transformer.d_model` must be a multiple of 2 x `num_heads`": (
            codec.d_model % (2 * codec.num_heads)
        ),
        "a frame must be two latents of the codec": (
            mimi.latents_per_frame != 2 or per_latent != mimi.frame_size
        ),
        f"`mimi.transformer.context` must be over {mimi.latents_per_frame}": (
            codec.window < mimi.latents_per_frame
        ),
        f"`silence_codes` and `sine_codes` must be {lm.num_codebooks} codes below "
        f"{lm.card}": not all(
            len(codes) == lm.num_codebooks and all(0 <= c < lm.card for c in codes)
            for codes in (config.silence_codes, config.sine_codes)
        ),
    }
    for message, wrong in problems.items():
        if wrong:
            raise _ConfigError(message)


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
