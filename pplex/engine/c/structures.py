"""The structures of ``lm.c``."""

from __future__ import annotations

import ctypes

LANES = 16
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2  # types of floats in memory

_int, _float, _pointer = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


_FORM = [(name, _int) for name in ("rows", "columns", "bits", "group", "type")]


class Matrix(ctypes.Structure):
    """A matrix in blocks of ``LANES`` outputs; ``bits`` 0 for one of floats."""

    _fields_ = [("data", _pointer), *_FORM]


class Table(ctypes.Structure):
    """A table row after row, as it is stored."""

    _fields_ = [*((name, _pointer) for name in ("words", "scales", "biases")), *_FORM]


class Layer(ctypes.Structure):
    """A layer of the temporal transformer, or of a depformer step."""

    _fields_ = [
        *((name, _pointer) for name in ("norm1", "norm2")),
        *(
            (name, Matrix)
            for name in ("in_proj", "out_proj", "linear_in", "linear_out")
        ),
    ]


_SIZES = (
    *("dim", "heads", "layers", "hidden", "window", "text_card", "card", "streams"),
    *("steps", "hiding_step", "dep_dim", "dep_heads", "dep_layers", "dep_hidden"),
    *("threads", "kv_bits"),
)


class Model(ctypes.Structure):
    """Sizes and weights of a language model."""

    _fields_ = [
        *((name, _int) for name in _SIZES),
        *(
            (name, Table)
            for name in ("text_emb", "audio_emb", "dep_text_emb", "dep_audio_emb")
        ),
        ("temporal", ctypes.POINTER(Layer)),
        ("out_norm", _pointer),
        ("text_linear", Matrix),
        ("dep_input", Matrix),
        ("depformer", ctypes.POINTER(Layer)),
        ("dep_heads_out", ctypes.POINTER(Matrix)),
    ]


class Sampling(ctypes.Structure):
    """How tokens are drawn; see ``Sampler.layout``."""

    _fields_ = [
        *((name, _float) for name in ("text_temp", "temp")),
        *(
            (name, _int)
            for name in ("text_top_k", "top_k", "text_noise", "noise_width")
        ),
    ]


class Row(ctypes.Structure):
    """A row of a step: its keys and values, and where it stands."""

    _fields_ = [
        *((name, _pointer) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("slots", "end")),
        *((name, _pointer) for name in ("first_keys", "first_values")),
        *((name, ctypes.c_int64) for name in ("first_slots", "num_first")),
        *((name, _pointer) for name in ("cosines", "sines")),
        ("key", ctypes.c_uint32 * 2),
        ("others", _pointer),
        ("num_others", ctypes.c_int64),
    ]
