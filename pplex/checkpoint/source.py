"""A language model's matrices on disk, in any published layout, read one at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from pplex.checkpoint.config import report_it
from pplex.checkpoint.folder import SPLIT_PARTS, CheckpointFolder
from pplex.checkpoint.layouts import (
    LAYOUTS,
    PARTS,
    Layout,
    Matrix,
    Quantization,
    check_left,
    missing,
    stored_form,
)
from pplex.checkpoint.safetensors import (
    TensorSpec,
    load_tensors,
    read_specs,
    read_values,
)
from pplex.errors import PplexError
from pplex.model.config import LmConfig


@dataclass(frozen=True)
class Stored:
    """A matrix of a file: how its table describes it and how it is stored there.

    ``specs`` has its tensors by part: ``weight``, and ``scales`` and ``biases`` where
    ``form`` is not None.
    """

    matrix: Matrix
    path: Path
    specs: dict[str, TensorSpec]
    form: Quantization | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all its parts."""
        return sum(spec.num_bytes for spec in self.specs.values())

    @property
    def num_values(self) -> int:
        """Values of the matrix, quantized or not."""
        return math.prod(self.matrix.shape)


class Source:
    """The checked headers of a language model's files; values are read when asked for.

    ``layout`` is the name of one of ``LAYOUTS``, ``steps`` the depformer steps in the
    file, ``matrices`` what it holds in the order of its table, ``unneeded`` the names
    of each file's tensors that nothing here needs.
    """

    def __init__(self, folder: CheckpointFolder, config: LmConfig) -> None:
        """Read the headers of the language model and check every tensor."""
        self.config = config
        self.files = folder.lm_files
        specs = {file: read_specs(file) for file in self.files}
        names = [name for file in self.files for name in specs[file]]
        self._layout = tell_layout(self.files[0], names, len(self.files) > 1)
        self.layout, self.steps = self._layout.name, self._layout.num_steps(names)
        self.check_steps(config.num_codebooks)
        self.matrices = [
            _stored(matrix, file, specs[file])
            for file, matrix in self._table(self.steps)
        ]
        ours = [stored.matrix.name for stored in self.matrices]
        # NVIDIA's loader wants a table for the last step's token, which nothing reads.
        unread = f"depformer_emb.{self.steps - 1}."
        self.unneeded: dict[Path, list[str]] = {}
        for file, unused in specs.items():
            left = sorted(name for name in unused if not name.startswith(unread))
            check_left(file, left, ours)
            self.unneeded[file] = left
        self._places = dict(_places(self.matrices))
        self._read: dict[Path, dict[str, mx.array]] = {}

    def check_steps(self, least: int) -> None:
        """Refuse a depformer of fewer steps, or of more than there are streams."""
        if not least <= self.steps <= self.config.n_q:
            raise PplexError(
                f"{self.files[0]}: the depformer has {self.steps} steps, {least} to "
                f"{self.config.n_q} are expected"
            )

    def _table(self, kept: int) -> Iterator[tuple[Path, Matrix]]:
        """The layout's matrices and their files; ``kept`` steps have targets."""
        for matrix in self._layout.matrices(self.config, self.steps, kept):
            if self._layout.is_split:
                file = self.files[SPLIT_PARTS.index(matrix.split_file)]
                yield file, matrix.in_split_file()
            else:
                yield self.files[0], matrix

    def modules(self, num_steps: int) -> dict[str, list[str]]:
        """Our modules for ``num_steps`` depformer steps: targets, in order of rows."""
        self.check_steps(num_steps)
        found: dict[str, list[str]] = {}
        for _, matrix in self._table(num_steps):
            for target in matrix.targets:
                if target is not None:
                    found.setdefault(target.split("[")[0], []).append(target)
        for targets in found.values():
            targets.sort(key=lambda t: int(re.findall(r"\[(\d+)\]|$", t)[0] or 0))
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.num_bytes for stored in self.matrices)

    def form(self, target: str) -> Quantization | None:
        """How the rows of our module ``target`` are stored."""
        return self._places[target][0].form

    def dtype(self, target: str) -> str:
        """The type of the weight, or of scales and biases, of our module ``target``."""
        specs = self._places[target][0].specs
        types = {spec.dtype for spec in specs.values()} - {"U32"}
        return types.pop() if len(types) == 1 else "F32"

    def whole(self, target: str) -> dict[str, mx.array]:
        """The tensors, by part, of the file's matrix that ``target`` is a share of."""
        stored = self._places[target][0]
        arrays = self._read.get(stored.path, {})
        if any(spec.name not in arrays for spec in stored.specs.values()):
            arrays = self._read[stored.path] = load_tensors(stored.path)
        return {part: arrays[spec.name] for part, spec in stored.specs.items()}

    def parts(self, target: str) -> dict[str, mx.array]:
        """The tensors of our module ``target`` as stored: its rows of each part.

        Scales and biases of different types come in float32.
        """
        stored, idx, num = self._places[target]
        parts = self.whole(target)
        if len(stored.matrix.shape) == 1:
            return {"weight": parts["weight"].reshape(-1)}
        if num > 1:
            rows = stored.matrix.shape[0] // num
            parts = {p: a[idx * rows : (idx + 1) * rows] for p, a in parts.items()}
        if stored.form is not None and parts["scales"].dtype != parts["biases"].dtype:
            parts |= {p: parts[p].astype(mx.float32) for p in PARTS[1:]}
        return parts

    def dense(self, target: str) -> mx.array:
        """The rows of our module ``target``; float32 where they were quantized."""
        parts, form = self.parts(target), self.form(target)
        if form is None:
            return parts["weight"]
        return dequantize(parts, form)

    def rows(self, target: str, ids: list[int]) -> mx.array:
        """Some rows of our module ``target``; float32 where they were quantized."""
        form, places = self.form(target), mx.array(ids)
        parts = {part: array[places] for part, array in self.parts(target).items()}
        return parts["weight"] if form is None else dequantize(parts, form)

    def blocks(self, target: str, num_values: int) -> Iterator[mx.array]:
        """The rows of ``dense``, some at a time: about ``num_values``.

        What is not quantized is read from the file as it is asked for, past MLX, which
        reads a tensor whole.
        """
        stored, idx, num = self._places[target]
        rows = stored.matrix.shape[0] // num
        shape = rows, *stored.matrix.shape[1:]
        step = max(1, num_values // math.prod(shape[1:]))
        if stored.form is not None:
            whole = self.dense(target)
            yield from (whole[i : i + step] for i in range(0, rows, step))
            return
        spec = stored.specs["weight"]
        begin = spec.begin + idx * (stored.num_bytes // num)
        for i in range(0, rows, step):
            part = replace(spec, shape=(min(step, rows - i), *shape[1:]), begin=begin)
            values = mx.array(read_values(stored.path, part))
            yield values.view(mx.bfloat16) if spec.dtype == "BF16" else values
            begin += part.num_bytes

    def bytes_of(self, targets: Iterable[str]) -> int:
        """Bytes of our modules ``targets``; those that share a norm count it once."""
        sizes = {}
        for stored, idx, num in (self._places[target] for target in targets):
            sizes[stored.path, stored.matrix.name, idx] = stored.num_bytes // num
        return sum(sizes.values())

    def release(self, target: str) -> None:
        """Let go of what ``target``'s matrix holds; it can be read again."""
        stored = self._places[target][0]
        for spec in stored.specs.values():
            self._read.get(stored.path, {}).pop(spec.name, None)


def is_finite(array: mx.array) -> bool:
    """Whether every value is a finite number; a quarter of the work of mx.isfinite."""
    wide = array.astype(mx.float32)
    return math.isfinite(float(wide.min())) and math.isfinite(float(wide.max()))


def dequantize(parts: dict[str, mx.array], form: Quantization) -> mx.array:
    """A quantized matrix as the values it stands for.

    In float32: a product of 16-bit numbers would be rounded to 16 bits.
    """
    return mx.dequantize(
        parts["weight"],
        parts["scales"].astype(mx.float32),
        parts["biases"].astype(mx.float32),
        group_size=form.group_size,
        bits=form.bits,
    )


def tell_layout(path: Path, names: Collection[str], is_split: bool) -> Layout:
    """The layout of a model with tensors of these ``names``; ``path`` is for errors."""
    for layout in LAYOUTS:
        if layout.is_split == is_split and layout.mark in names:
            return layout
    hint = f"; {report_it(path)}" if path.is_file() else ""
    raise PplexError(
        f"{path}: not a PersonaPlex or Moshi language model: it has no "
        f"`transformer.layers.0.self_attn.in_proj` weight{hint}"
    )


def _stored(matrix: Matrix, path: Path, left: dict[str, TensorSpec]) -> Stored:
    """Take the tensors of ``matrix`` out of ``left`` and check them."""
    linear = len(matrix.shape) == 2
    wanted = ["weight"]
    if linear and matrix.part("scales") in left:
        wanted += ["scales", "biases"]
    specs = {}
    for part in wanted:
        name = matrix.part(part) if linear else matrix.name
        if name not in left:
            raise missing(path, name)
        specs[part] = left.pop(name)
    shapes = {part: spec.shape for part, spec in specs.items()}
    is_packed = specs["weight"].dtype == "U32"
    form = stored_form(matrix, shapes, is_packed, path)
    for spec in specs.values():
        floating = ("BF16", "F16", "F32")
        packed = spec is specs["weight"] and form is not None
        if spec.dtype not in (("U32",) if packed else floating):
            raise PplexError(
                f"{path}: the tensor `{spec.name}` is {spec.dtype}, expected "
                f"{'U32' if packed else ' or '.join(floating)}; {report_it(path)}"
            )
    return Stored(matrix, path, specs, form)


def _places(matrices: list[Stored]) -> Iterator[tuple[str, tuple[Stored, int, int]]]:
    """For each module of ours: its matrix, which share of the rows, of how many."""
    for stored in matrices:
        norm = len(stored.matrix.shape) == 1
        num = 1 if norm else len(stored.matrix.targets)
        for idx, target in enumerate(stored.matrix.targets):
            assert target is not None  # every step is kept
            yield target, (stored, 0 if norm else idx, num)
