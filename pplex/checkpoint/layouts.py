"""Published checkpoint layouts of the language model, mapped to our names.

Each layout is a table: the name a matrix has in the file, its shape, and where its rows
go in ``model.lm.Lm``. The layouts are NVIDIA's PyTorch names, the folders of
``aufklarer/PersonaPlex-7B-MLX`` (split into three files), and the single files of
``moshi_mlx`` (a depformer slice for each step).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from pplex.checkpoint.config import report_it
from pplex.errors import PplexError
from pplex.model.config import LmConfig

PARTS = ("weight", "scales", "biases")
BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Matrix:
    """One matrix of a file.

    ``name`` is what the weight is called there; ``shape`` (rows, columns), or
    (columns,) for a norm; ``targets`` the modules of ours that get its rows in equal
    shares, None for a share that is not needed.
    """

    name: str
    shape: tuple[int, ...]
    targets: tuple[str | None, ...]

    def part(self, part: str) -> str:
        """The name of this matrix's ``weight``, ``scales`` or ``biases``."""
        if self.name.endswith("in_proj_weight"):
            return self.name.removesuffix("weight") + part
        return f"{self.name.rsplit('.', 1)[0]}.{part}"

    def in_split_file(self) -> Matrix:
        """The same matrix as the split folders name it."""
        prefix = r"^(transformer|depformer)\."
        return replace(self, name=re.sub(prefix, "", self.name))

    @property
    def split_file(self) -> str:
        """The file of the split folders that holds this matrix."""
        if self.name.startswith(("transformer.", "out_norm.")):
            return "temporal"
        if self.name.startswith(("depformer.", "depformer_in.")):
            return "depformer"
        return "embeddings"


def published_matrices(config: LmConfig, steps: int, kept: int) -> Iterator[Matrix]:
    """NVIDIA's names, for a file of ``steps`` depformer steps; ``kept`` stay."""
    c = config

    def stay(step: int, target: str) -> tuple[str | None]:
        return (target if step < kept else None,)

    yield Matrix("text_emb.weight", (c.text_card + 1, c.dim), ("text_emb",))
    for i in range(c.n_q):
        yield Matrix(f"emb.{i}.weight", (c.card + 1, c.dim), (f"audio_emb[{i}]",))
    yield Matrix("text_linear.weight", (c.text_card, c.dim), ("text_linear",))
    for i in range(c.num_layers):
        theirs, layer = f"transformer.layers.{i}", f"layers.{i}"
        yield from _attention(theirs, c.dim, 1, [f"{layer}.self_attn"])
        for norm in ("norm1", "norm2"):
            yield Matrix(f"{theirs}.{norm}.alpha", (c.dim,), (f"{layer}.{norm}",))
        yield from _gating(
            f"{theirs}.gating", c.dim, c.hidden_dim, f"{layer}.gating", True
        )
    yield Matrix("out_norm.alpha", (c.dim,), ("out_norm",))
    d = c.depformer_dim
    yield Matrix(
        "depformer_text_emb.weight", (c.text_card + 1, d), ("depformer.text_emb",)
    )
    for s in range(steps):
        yield Matrix(
            f"depformer_in.{s}.weight", (d, c.dim), stay(s, f"depformer.input[{s}]")
        )
        if s < steps - 1:
            target = stay(s + 1, f"depformer.audio_emb[{s}]")
            yield Matrix(f"depformer_emb.{s}.weight", (c.card + 1, d), target)
        target = stay(s, f"depformer.steps.{s}.head")
        yield Matrix(f"linears.{s}.weight", (c.card, d), target)
    for m in range(c.depformer_num_layers):
        theirs = f"depformer.layers.{m}"
        ours = [
            f"depformer.steps.{s}.layers.{m}" if s < kept else None
            for s in range(steps)
        ]
        yield from _attention(theirs, d, steps, ours)
        for norm in ("norm1", "norm2"):
            # One norm for all steps: every step of ours gets the whole of it.
            targets = tuple(f"{o}.{norm}" for o in ours if o)
            yield Matrix(f"{theirs}.{norm}.alpha", (d,), targets)
        for s in range(steps):
            yield from _gating(
                f"{theirs}.gating.{s}",
                d,
                c.depformer_hidden_dim,
                f"{ours[s]}.gating",
                s < kept,
            )


def sliced_matrices(config: LmConfig, steps: int, kept: int) -> Iterator[Matrix]:
    """The names of ``moshi_mlx``: a depformer slice for each step."""
    c, d = config, config.depformer_dim
    for matrix in published_matrices(replace(c, depformer_num_layers=0), 0, 0):
        name = re.sub(r"^emb\.", "audio_embs.", matrix.name)
        name = name.replace(".alpha", ".weight")
        name = name.replace("in_proj_weight", "in_proj.weight")
        if not name.startswith("depformer"):
            yield replace(matrix, name=name)
    for s in range(steps):
        theirs, ours = f"depformer.slices.{s}", f"depformer.steps.{s}"

        def stay(target: str, step: int = s) -> tuple[str | None]:
            return (target if step < kept else None,)

        emb = "depformer.text_emb" if s == 0 else f"depformer.audio_emb[{s - 1}]"
        rows = c.text_card + 1 if s == 0 else c.card + 1
        yield Matrix(f"{theirs}.emb.weight", (rows, d), stay(emb))
        yield Matrix(
            f"{theirs}.linear_in.weight", (d, c.dim), stay(f"depformer.input[{s}]")
        )
        yield Matrix(f"{theirs}.linear_out.weight", (c.card, d), stay(f"{ours}.head"))
        for m in range(c.depformer_num_layers):
            layer, mine = f"{theirs}.transformer.layers.{m}", f"{ours}.layers.{m}"
            for matrix in _attention(layer, d, 1, [mine]):
                name = matrix.name.replace("in_proj_weight", "in_proj.weight")
                yield replace(matrix, name=name, targets=stay(matrix.targets[0] or ""))
            for norm in ("norm1", "norm2"):
                yield Matrix(f"{layer}.{norm}.weight", (d,), stay(f"{mine}.{norm}"))
            yield from _gating(
                f"{layer}.gating", d, c.depformer_hidden_dim, f"{mine}.gating", s < kept
            )


def _attention(
    theirs: str, dim: int, steps: int, ours: Sequence[str | None]
) -> Iterator[Matrix]:
    for name, rows, target in (
        ("in_proj_weight", 3 * dim, "in_proj"),
        ("out_proj.weight", dim, "out_proj"),
    ):
        targets = tuple(o and f"{o}.{target}" for o in ours)
        yield Matrix(f"{theirs}.self_attn.{name}", (steps * rows, dim), targets)


def _gating(
    theirs: str, dim: int, hidden: int, ours: str, stays: bool
) -> Iterator[Matrix]:
    for name, shape in (
        ("linear_in", (2 * hidden, dim)),
        ("linear_out", (dim, hidden)),
    ):
        target = f"{ours}.{name}" if stays else None
        yield Matrix(f"{theirs}.{name}.weight", shape, (target,))


@dataclass(frozen=True)
class Layout:
    """A published way to name a language model's matrices.

    ``mark`` is a tensor that files of this layout have and others do not; ``steps``
    a pattern of names, with the number of a depformer step; ``matrices`` its table.
    """

    name: str
    mark: str
    steps: str
    matrices: Callable[[LmConfig, int, int], Iterator[Matrix]]
    is_split: bool = False

    def num_steps(self, names: Iterable[str]) -> int:
        """Depformer steps of a file with these names: one more than the last."""
        found = (re.match(self.steps, name) for name in names)
        return max((int(match[1]) + 1 for match in found if match), default=0)


_STEPS = r"(?:linears|depformer_in)\.(\d+)\."
_SLICES = r"depformer\.slices\.(\d+)\."
_IN_PROJ = "layers.0.self_attn.in_proj"
LAYOUTS = (
    Layout("pytorch", f"transformer.{_IN_PROJ}_weight", _STEPS, published_matrices),
    Layout("mlx", f"transformer.{_IN_PROJ}.weight", _SLICES, sliced_matrices),
    Layout("mlx-split", f"{_IN_PROJ}_weight", _STEPS, published_matrices, True),
)


@dataclass(frozen=True)
class Quantization:
    """How a matrix is stored."""

    bits: int
    group_size: int


def form_name(form: Quantization | None) -> str:
    """A form as text: ``4/64``, or ``16``."""
    return "16" if form is None else f"{form.bits}/{form.group_size}"


def stored_form(
    matrix: Matrix, shapes: dict[str, tuple[int, ...]], is_packed: bool, path: Path
) -> Quantization | None:
    """How a matrix with parts of these shapes is stored; None if it is not quantized.

    ``is_packed``: the weight is of uint32. Shapes that do not fit raise.
    """
    weight, scales = shapes["weight"], shapes.get("scales")
    if len(matrix.shape) == 1:
        if math.prod(weight) != matrix.shape[0] or weight[-1:] != matrix.shape:
            raise wrong_shape(path, matrix.name, weight, matrix.shape)
        return None
    if scales is None:
        if weight != matrix.shape:
            raise wrong_shape(path, matrix.name, weight, matrix.shape)
        return None
    rows, columns = matrix.shape
    groups = scales[-1] if len(scales) == 2 else 0
    packed = weight[-1] if len(weight) == 2 else 0
    quantization = Quantization(
        32 * packed // columns, columns // groups if groups else 0
    )
    fits = (
        is_packed
        and weight == (rows, columns * quantization.bits // 32)
        and quantization.bits in BITS
        and scales == (rows, groups)
        and groups * quantization.group_size == columns
        and quantization.group_size in (32, 64, 128)
    )
    if not fits:
        raise wrong_shape(path, matrix.name, weight, matrix.shape)
    if shapes["biases"] != scales:
        name = matrix.part("biases")
        raise wrong_shape(path, name, shapes["biases"], scales)
    return quantization


def missing(path: Path, name: str) -> PplexError:
    """The error for a tensor that a file lacks."""
    return PplexError(
        f"{path}: the tensor `{name}` is missing; get the file again, or "
        f"{report_it(path)}"
    )


def unneeded(names: Iterable[str], ours: Iterable[str]) -> list[str]:
    """The ``names`` of tensors that belong to no part of a model with tensors ``ours``.

    As what Kyutai's fine-tunings add: ``condition_provider``, ``extra_heads``.
    """
    parts = {name.split(".")[0] for name in ours}
    return sorted(name for name in names if name.split(".")[0] not in parts)


def check_left(path: Path, left: Iterable[str], ours: Iterable[str]) -> None:
    """Refuse tensors of the model's own parts that its sizes have no place for."""
    if extra := sorted({*left} - {*unneeded(left, ours)}):
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise PplexError(
            f"{path}: has the tensor `{extra[0]}`, which these sizes do not have"
            f"{more}; {_sizes(path)}"
        )


def _sizes(path: Path) -> str:
    known = (path.parent / "config.json").is_file()
    sizes = "config.json is" if known else "the 7B's sizes, without a config.json, are"
    return f"see whether {sizes} right for it, or {report_it(path)}"


def check_floating(path: Path, name: str, array: mx.array) -> None:
    """Refuse whole numbers where there should be weights."""
    if not mx.issubdtype(array.dtype, mx.floating):
        kind = str(array.dtype).removeprefix("mlx.core.")
        raise PplexError(f"{path}: the tensor `{name}` is {kind}, not floating point")


def wrong_shape(
    path: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...]
) -> PplexError:
    """The error for a tensor of another shape than the sizes of the model give."""
    return PplexError(
        f"{path}: the tensor `{name}` has shape {list(found)}, expected "
        f"{list(expected)} or its quantized form; {_sizes(path)}"
    )
