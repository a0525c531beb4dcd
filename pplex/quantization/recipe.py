"""Which matrix gets how many bits: uniform, mixed within a size, or rules in a file.

Matrices are named as NVIDIA's file names them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pplex.checkpoint.layouts import BITS, Matrix, Quantization
from pplex.errors import PplexError
from pplex.files import reading
from pplex.units import size
from pplex.values import read_json, shown

_GROUP_SIZES = (32, 64, 128)
_HALF_BYTES = 2  # a value that is not quantized

Form = Quantization | None
Recipe = dict[str, Form]


def num_bytes(matrix: Matrix, form: Form) -> int:
    """Bytes that a matrix takes in a form."""
    rows = matrix.shape[0] if len(matrix.shape) == 2 else 1
    columns = matrix.shape[-1]
    if form is None:
        return rows * columns * _HALF_BYTES
    groups = columns // form.group_size
    return rows * (columns * form.bits // 8 + 2 * groups * _HALF_BYTES)


def fitting(matrix: Matrix, form: Form) -> Form:
    """``form`` with the largest group up to its own that divides the matrix's columns.

    None, for 16 bits, where no group does, and for norms.
    """
    if form is None or len(matrix.shape) == 1:
        return None
    for group_size in reversed(_GROUP_SIZES):
        if group_size <= form.group_size and matrix.shape[1] % group_size == 0:
            return Quantization(form.bits, group_size)
    return None


def recipe_bytes(matrices: Iterable[Matrix], recipe: Recipe) -> int:
    """Bytes of all matrices."""
    return sum(num_bytes(matrix, recipe[matrix.name]) for matrix in matrices)


def uniform(matrices: Iterable[Matrix], form: Form) -> Recipe:
    """The published recipe: both transformers in ``form``, tables and heads 16 bits."""
    return {
        matrix.name: None
        if matrix.split_file == "embeddings"
        else fitting(matrix, form)
        for matrix in matrices
    }


def from_file(path: Path, matrices: Iterable[Matrix], default: Form) -> Recipe:
    """The recipe of a JSON file: name patterns to bits, the first that fits counts.

    A value is a number of bits, or an object of ``bits`` and ``group_size``. What no
    pattern fits is as in ``uniform``. A pattern that fits nothing is refused.
    """
    with reading(f"--recipe {path}", "is not readable as JSON"):
        rules = read_json(path)
    if not isinstance(rules, dict) or not rules:
        raise PplexError(
            f"--recipe {path}: expected an object of name patterns, such as "
            '{"transformer.layers.0.*": 8, "emb.*": {"bits": 8, "group_size": 64}}'
        )
    size = default.group_size if default else 64
    forms = {p: _form(path, p, value, size) for p, value in rules.items()}
    unused = set(forms)
    recipe: Recipe = {}
    base = uniform(matrices := list(matrices), default)
    for matrix in matrices:
        if len(matrix.shape) == 1:
            recipe[matrix.name] = None
            continue
        found = next((p for p in forms if fnmatchcase(matrix.name, p)), None)
        if found is None:
            recipe[matrix.name] = base[matrix.name]
            continue
        unused.discard(found)
        recipe[matrix.name] = fitting(matrix, forms[found])
    if unused:
        raise PplexError(
            f"--recipe {path}: {min(unused)!r} fits no matrix, or patterns above it "
            "take all that it fits; names are like "
            "transformer.layers.0.gating.linear_in.weight"
        )
    return recipe


def _form(path: Path, pattern: str, value: Any, group_size: int) -> Form:
    if isinstance(value, dict) and set(value) <= {"bits", "group_size"}:
        group_size = value.get("group_size", group_size)
        value = value.get("bits")
    if value == 16:
        return None
    if value not in BITS or group_size not in _GROUP_SIZES or isinstance(value, bool):
        raise PplexError(
            f"--recipe {path}: {pattern!r} asks for {shown(value)} bits in groups of "
            f"{shown(group_size)}; bits are one of {', '.join(map(str, BITS))} or 16, "
            f"groups one of {', '.join(map(str, _GROUP_SIZES))}"
        )
    return Quantization(value, group_size)


# What a part costs when its values are stored in a form, in units of what it costs at
# 4 bits in groups of 64: the squared rounding error of normally distributed weights,
# as `quantize` leaves it.
_ERRORS: dict[Form, float] = {
    Quantization(2, 64): 18.8,
    Quantization(3, 64): 4.39,
    Quantization(4, 128): 1.21,
    Quantization(4, 64): 1.0,
    Quantization(4, 32): 0.79,
    Quantization(5, 64): 0.236,
    Quantization(6, 64): 0.057,
    Quantization(8, 64): 0.0035,
    None: 0.0,
}


@dataclass(frozen=True)
class Part:
    """Matrices that share a form; ``cost`` is what they cost at 4 bits in 64s."""

    name: str
    matrices: tuple[Matrix, ...]
    cost: float

    def num_bytes(self, form: Form) -> int:
        """Bytes of the part in a form."""
        return sum(num_bytes(m, fitting(m, form)) for m in self.matrices)


def mixed(parts: Iterable[Part], rest: Iterable[Matrix], max_bytes: int) -> Recipe:
    """Forms that cost least within ``max_bytes``; ``rest`` stays in 16 bits.

    Starts with the fewest bits everywhere and buys, again and again, the change of
    form that lowers the cost most for its bytes.
    """
    parts, rest = list(parts), list(rest)
    chosen = {part.name: min(_ERRORS, key=part.num_bytes) for part in parts}
    used = sum(num_bytes(m, None) for m in rest)
    used += sum(part.num_bytes(chosen[part.name]) for part in parts)
    if used > max_bytes:
        raise PplexError(
            f"--max-size {size(max_bytes)} cannot be met: the least that this recipe "
            f"makes is {size(used)}, {used} bytes"
        )
    while True:
        best = _best_step(parts, chosen, max_bytes - used)
        if best is None:
            break
        part, form = best
        used += part.num_bytes(form) - part.num_bytes(chosen[part.name])
        chosen[part.name] = form
    recipe: Recipe = {m.name: None for m in rest}
    for part in parts:
        for m in part.matrices:
            recipe[m.name] = fitting(m, chosen[part.name])
    return recipe


def _best_step(
    parts: list[Part], chosen: dict[str, Form], left: int
) -> tuple[Part, Form] | None:
    best, best_rate = None, 0.0
    for part in parts:
        now = chosen[part.name]
        for form, error in _ERRORS.items():
            more = part.num_bytes(form) - part.num_bytes(now)
            gain = part.cost * (_ERRORS[now] - error)
            if gain <= 0 or more > left:
                continue
            rate = gain / more if more > 0 else float("inf")
            if rate > best_rate:
                best, best_rate = (part, form), rate
    return best


def part_of(matrix: Matrix, num_layers: int, num_codebooks: int) -> str | None:
    """The part of the model a matrix belongs to, for ``mixed``; None for norms.

    The temporal layers are the first sixth, the last sixth and those between; the
    depformer's steps are the first (whose code carries the words), the agent's others,
    and ``unused``: those that predict the user, which a conversation never runs.
    """
    name = matrix.name
    if len(matrix.shape) == 1:
        return None
    kind = re.sub(r"[._]weight$", "", name).rsplit(".", 1)[-1]
    if match := re.match(r"transformer\.layers\.(\d+)\.", name):
        edge = -(-num_layers // 6)
        layer = int(match[1])
        first, last = layer < edge, layer >= num_layers - edge
        where = "first" if first else "last" if last else "middle"
        return f"temporal.{where}.{kind}"
    if match := re.match(r"depformer\.layers\.\d+\.gating\.(\d+)\.", name):
        return f"depformer.{_step(int(match[1]), num_codebooks)}.{kind}"
    if name.startswith("depformer.layers."):
        return f"depformer.all.{kind}"
    if match := re.match(r"(linears|depformer_in|depformer_emb)\.(\d+)\.", name):
        step = int(match[2]) + (match[1] == "depformer_emb")
        if step >= num_codebooks:
            return f"depformer.unused.{match[1]}"
        first = match[1] == "linears" and step == 0
        return "linears.first" if first else match[1]
    return re.sub(r"(\.\d+)?\.weight$", "", name)


def _step(step: int, num_codebooks: int) -> str:
    if step >= num_codebooks:
        return "unused"
    return "others" if step else "first"


def make_parts(
    matrices: Iterable[Matrix],
    num_layers: int,
    num_codebooks: int,
    cost: Callable[[str], float],
) -> tuple[list[Part], list[Matrix]]:
    """The parts of a model with their costs, and the matrices that are in none."""
    groups: dict[str, list[Matrix]] = {}
    rest = []
    for matrix in matrices:
        name = part_of(matrix, num_layers, num_codebooks)
        if name is None:
            rest.append(matrix)
        else:
            groups.setdefault(name, []).append(matrix)
    parts = [Part(name, tuple(group), cost(name)) for name, group in groups.items()]
    return parts, rest
