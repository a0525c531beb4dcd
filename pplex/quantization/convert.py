"""Turn any checkpoint that can be read into a folder of the split layout.

Matrices are read, quantized and written one after another, so that the largest of them
decides how much memory is taken, not the model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import mlx.core as mx

from pplex import units
from pplex.checkpoint import hashes
from pplex.checkpoint.config import split_config
from pplex.checkpoint.folder import SPLIT_CODEC, SPLIT_PARTS, CheckpointFolder
from pplex.checkpoint.hub import LocalModel, resolve
from pplex.checkpoint.layouts import (
    PARTS,
    Matrix,
    Quantization,
    published_matrices,
)
from pplex.checkpoint.safetensors import TensorSpec, write_tensors
from pplex.checkpoint.source import Source, is_finite
from pplex.checkpoint.voices import find_voices, read_voice_file, write_voice_file
from pplex.conversation.roles import DEFAULT_SEED
from pplex.errors import PplexError
from pplex.files import check_new_folder, new_folder
from pplex.model.sampling import SamplingConfig
from pplex.quantization.activations import Activations
from pplex.quantization.calibration import Conversation, read_calibration
from pplex.quantization.card import Card, card_text
from pplex.quantization.compare_models import Settings, compare_models, read_users
from pplex.quantization.distillation import check_memory, distill
from pplex.quantization.quantize import BLOCK_VALUES, Parts, quantize_blocks
from pplex.quantization.recipe import Form, Recipe, recipe_bytes
from pplex.quantization.replies import read_questions
from pplex.quantization.rounding import round_by_inputs

_FLOAT16_BOUND = 65520  # from here on, rounding to float16 gives infinity
_HALF = "F16"  # what the published folders hold where nothing is quantized
CACHE_BYTES = 1 << 28
_SPARE_BYTES = 1 << 26
_SECONDS = 60.0  # of each recording that is measured
_DISTILLED = 10  # as much work as going through the model so often, by the bar


@dataclass(frozen=True)
class Conversion:
    """How a conversion was asked for; ``made_by`` and ``recipe_name`` in words.

    With a folder ``calibration`` matrices are rounded by what they are multiplied with,
    and then learned together in so many rounds of ``distill`` over it. The card says
    what the conversion costs on the recordings that are ``measured``, and of the table
    ``replies`` how many are right.
    """

    make_recipe: Callable[[Source, list[Matrix]], Recipe]
    recipe_name: str
    made_by: str
    refine: bool = False
    calibration: Path | None = None
    distill: float = 0
    measured: Sequence[Path] = ()
    replies: Path | None = None


@dataclass(frozen=True)
class Converted:
    """What a conversion made; ``lm_bytes`` are those of the language model."""

    folder: Path
    lm_bytes: int
    source_lm_bytes: int
    recipe: Recipe


def convert(
    local: LocalModel,
    target: Path,
    conversion: Conversion,
    start: Callable[[int], None],
    advance: Callable[[int], object],
) -> Converted:
    """Write the model ``local`` to the new folder ``target``, whole or not at all.

    ``start`` is told how many bytes of the source will be gone through, ``advance``
    how many more are done.
    """
    folder = local.folder
    config = folder.read_config()
    source = Source(local.folder, config.lm)
    matrices = list(published_matrices(config.lm, source.steps, source.steps))
    recipe = conversion.make_recipe(source, matrices)
    _check_recipe(source, matrices, recipe)
    _check_rounded(source, matrices, recipe, conversion)
    num_bytes = recipe_bytes(matrices, recipe)
    others = _other_files(folder)
    _check_target(target, num_bytes + sum(f.stat().st_size for f in others.values()))
    if conversion.measured:
        read_users(conversion.measured, config, _SECONDS)  # what cannot be read is told
    if conversion.replies is not None:
        read_questions(conversion.replies, config.sample_rate)
    rounding = _Rounding(conversion.refine, None, {})
    start(source.num_bytes * (_DISTILLED if conversion.distill else 1))
    if conversion.calibration is not None:
        talks = read_calibration(conversion.calibration, config.lm)
        rounding = replace(rounding, inputs=Activations(folder, config.lm, talks))
        if conversion.distill:
            learned = _distilled(
                source, matrices, recipe, rounding, talks, conversion.distill, advance
            )
            rounding = replace(rounding, learned=learned)
    with new_folder(target) as new, _cache_limit(CACHE_BYTES):
        sums = {}
        for file in SPLIT_PARTS:
            own = [m for m in matrices if m.split_file == file]
            path = new / f"{file}.safetensors"
            specs = [s for m in own for s in _specs(source, m, recipe[m.name])]
            arrays = _arrays(source, own, recipe, rounding, advance)
            sums[path.name] = write_tensors(path, specs, arrays, {"format": "mlx"})
        for name, path in others.items():
            sums[name] = hashes.copy(path, new / name)
        voices = _copy_voices(find_voices(local.path), new / "voices")
        sums |= voices
        names = sorted(Path(name).stem for name in voices)
        raw = split_config(config, source.steps, _quantization(recipe), names)
        (new / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
        found = None
        if conversion.measured or conversion.replies:
            settings = Settings(None, None, DEFAULT_SEED, _SECONDS, SamplingConfig())
            made = resolve(str(new), offline=True)
            found = compare_models(
                local, made, conversion.measured, settings, replies=conversion.replies
            )
        name, made_by = conversion.recipe_name, conversion.made_by
        card = Card(local, source.layout, name, made_by, found)
        text = card_text(card, matrices, recipe, source.num_bytes, names)
        (new / "README.md").write_text(text, encoding="utf-8")
        for name in ("config.json", "README.md"):
            sums[name] = hashes.sha256(new / name)
        hashes.write_sums(new / hashes.SUMS_FILE, sums)
    return Converted(target, num_bytes, source.num_bytes, recipe)


def _check_recipe(source: Source, matrices: list[Matrix], recipe: Recipe) -> None:
    """Refuse different forms of matrices that are one when they are loaded."""
    named = {target: m.name for m in matrices for target in m.targets}
    for module, targets in source.modules(source.config.num_codebooks).items():
        for target in targets[1:]:
            one, other = named[targets[0]], named[target]
            if recipe[one] != recipe[other]:
                raise PplexError(
                    f"the recipe stores `{one}` and `{other}` differently; both are in "
                    f"one matrix, `{module}`, when they are run: give them the same "
                    "bits and group size"
                )


def _check_rounded(
    source: Source, matrices: list[Matrix], recipe: Recipe, conversion: Conversion
) -> None:
    """Refuse what is asked of rounding where nothing is rounded."""
    rounded = set()
    for matrix in matrices:
        form = recipe[matrix.name]
        if form is not None and not _same(source, matrix, form):
            rounded |= set(_targets(matrix))
    if conversion.calibration is not None:
        modules = source.modules(source.config.num_codebooks)
        rounded &= {target for targets in modules.values() for target in targets}
    elif not conversion.refine:
        return
    if not rounded:
        option = "--refine" if conversion.calibration is None else "--calibration"
        raise PplexError(
            f"{option} makes no difference: no matrix that it could help is rounded; "
            "the source has these bits already, or 16 were asked for; leave it out"
        )


def _distilled(
    source: Source,
    matrices: list[Matrix],
    recipe: Recipe,
    rounding: _Rounding,
    conversations: list[Conversation],
    rounds: float,
    advance: Callable[[int], object],
) -> dict[str, Parts]:
    """All that is quantized, by target; learned where conversations run it."""
    modules = source.modules(source.config.num_codebooks)
    run = {target for targets in modules.values() for target in targets}
    longest = max(one.columns.shape[1] for one in conversations)
    num_values = sum(math.prod(matrix.shape) for matrix in matrices)
    needed = check_memory(source.config, num_values, longest)
    dense: dict[str, mx.array] = {}
    parts: dict[str, Parts] = {}
    forms: dict[str, Quantization] = {}
    for matrix in sorted(matrices, key=lambda m: SPLIT_PARTS.index(m.split_file)):
        form = recipe[matrix.name]
        targets = [target for target in matrix.targets if target is not None]
        for target in targets:
            dense[target] = _join(list(_rows(source, matrix, target)))
            if form is not None and not _same(source, matrix, form):
                parts[target] = rounding.quantize(target, iter([dense[target]]), form)
                forms[target] = form
        advance(source.bytes_of(targets))
    with _cache_limit(needed // 2):  # a GPU may have other work
        learned = distill(
            source.config,
            modules,
            {target: dense[target] for target in run},
            {target: (forms[target], parts[target]) for target in run & parts.keys()},
            conversations,
            rounds,
            lambda share: advance(int(share * source.num_bytes * (_DISTILLED - 2))),
        )
    return parts | learned


def _specs(source: Source, matrix: Matrix, form: Form) -> Iterator[TensorSpec]:
    """The tensors that a matrix becomes."""
    named = matrix.in_split_file()
    if len(matrix.shape) == 1:
        yield TensorSpec(named.name, _HALF, (1, 1, *matrix.shape))
        return
    rows, columns = matrix.shape
    if form is None:
        yield TensorSpec(named.name, _HALF, matrix.shape)
        return
    dtype = source.dtype(_targets(matrix)[0]) if _same(source, matrix, form) else _HALF
    packed = (rows, columns * form.bits // 32)
    yield TensorSpec(named.part("weight"), "U32", packed)
    for part in ("scales", "biases"):
        yield TensorSpec(named.part(part), dtype, (rows, columns // form.group_size))


def _arrays(
    source: Source,
    matrices: list[Matrix],
    recipe: Recipe,
    rounding: _Rounding,
    advance: Callable[[int], object],
) -> Iterator[mx.array]:
    """The arrays of ``_specs``, matrix after matrix."""
    for matrix in matrices:
        yield from _arrays_of(source, matrix, recipe[matrix.name], rounding)
        targets = [target for target in matrix.targets if target is not None]
        for target in targets:
            source.release(target)
        advance(source.bytes_of(targets))


def _arrays_of(
    source: Source, matrix: Matrix, form: Form, rounding: _Rounding
) -> Iterator[mx.array]:
    if form is not None and _same(source, matrix, form):
        shares = [source.parts(target) for target in _targets(matrix)]
        for part in PARTS:
            yield _join([share[part] for share in shares])
    elif form is not None:
        made = []
        for target in _targets(matrix):
            made.append(rounding.quantize(target, _rows(source, matrix, target), form))
        yield from (_join(list(parts)) for parts in zip(*made, strict=True))
    else:
        if len(matrix.shape) == 1:
            _check_one_norm(source, matrix)
        halves = []
        for block in _blocks(source, matrix):
            halves.append(block.astype(mx.float16))
            mx.eval(halves[-1])  # and let go of the block
        half = _join(halves)
        yield half[None, None] if half.ndim == 1 else half


@dataclass(frozen=True)
class _Rounding:
    """How matrices are rounded: by their values, or by ``inputs`` where there are.

    Those that are ``learned`` were rounded before.
    """

    refine: bool
    inputs: Activations | None
    learned: Mapping[str, Parts]

    def quantize(
        self, target: str, rows: Iterator[mx.array], form: Quantization
    ) -> Parts:
        """The rows of our module ``target`` as packed codes, scales and biases."""
        if target in self.learned:
            return self.learned[target]
        moment = None if self.inputs is None else self.inputs.moment(target)
        if moment is None:
            return quantize_blocks(rows, form, self.refine)
        return round_by_inputs(_join(list(rows)), moment, form)


def _targets(matrix: Matrix) -> list[str]:
    """The modules of ours whose rows make up a matrix; one of them for a norm."""
    targets = [target for target in matrix.targets if target is not None]
    return targets[:1] if len(matrix.shape) == 1 else targets


def _same(source: Source, matrix: Matrix, form: Quantization) -> bool:
    """Whether the source has the matrix in this very form: then it stays as it is."""
    return {source.form(target) for target in _targets(matrix)} == {form}


def _blocks(source: Source, matrix: Matrix) -> Iterator[mx.array]:
    """The rows of a matrix in float32, some at a time."""
    for target in _targets(matrix):
        yield from _rows(source, matrix, target)


def _rows(source: Source, matrix: Matrix, target: str) -> Iterator[mx.array]:
    """Those of one of our modules, of those of a matrix; all must fit 16 bits."""
    for block in source.blocks(target, BLOCK_VALUES):
        wide = block.astype(mx.float32)
        # What is no number fits no bounds.
        low, high = float(wide.min()), float(wide.max())
        if not (-_FLOAT16_BOUND < low and high < _FLOAT16_BOUND):
            whole = is_finite(wide)
            what = "is too large for 16 bits" if whole else "is no number"
            raise PplexError(
                f"{source.files[0].parent}: a value of `{matrix.name}` {what}; run "
                "`pplex models verify` on it"
            )
        yield wide


def _join(arrays: list[mx.array]) -> mx.array:
    whole = arrays[0] if len(arrays) == 1 else mx.concatenate(arrays)
    mx.eval(whole)
    return whole


def _check_one_norm(source: Source, matrix: Matrix) -> None:
    """Refuse norms that a file has for each depformer step, if they differ."""
    first, *others = (source.dense(target) for target in matrix.targets if target)
    if not all(mx.array_equal(first, other).item() for other in others):
        raise PplexError(
            f"{source.files[0]}: the depformer steps have norms of their own, and the "
            f"split layout has one `{matrix.name}` for all; this model cannot be "
            "converted"
        )


def _quantization(recipe: Recipe) -> dict[str, object]:
    """The published key: the form that most matrices have, and which files have it."""
    forms = [form for form in recipe.values() if form is not None]
    if not forms:
        return {"bits": 16, "quantized_components": []}
    most = max(sorted(set(forms), key=lambda f: f.bits), key=forms.count)
    return {
        "bits": most.bits,
        "group_size": most.group_size,
        "quantized_components": ["temporal", "depformer"],
        "mixed": len(set(forms)) > 1,
    }


def _other_files(folder: CheckpointFolder) -> dict[str, Path]:
    """Files to be copied, by their new names."""
    files = {SPLIT_CODEC: folder.codec, folder.tokenizer.name: folder.tokenizer}
    for name in folder.names:
        if name.startswith(("LICENSE", "NOTICE")):
            files[name] = folder.path / name
    return files


def _copy_voices(found: dict[str, Path], folder: Path) -> dict[str, str]:
    """Copy voices as safetensors; their names in the new model, and hashes."""
    folder.mkdir()
    sums = {}
    for name, path in found.items():
        target = folder / f"{name}.safetensors"
        if path.suffix == ".safetensors":
            sums[f"voices/{target.name}"] = hashes.copy(path, target)
            continue
        voice = read_voice_file(path)
        kind: Literal["bfloat16", "float32"]
        kind = "bfloat16" if voice.dtype == "bfloat16" else "float32"
        write_voice_file(target, voice.embeddings, voice.cache, kind)
        sums[f"voices/{target.name}"] = hashes.sha256(target)
    return sums


def _check_target(target: Path, num_bytes: int) -> None:
    check_new_folder(target)
    parent = target.absolute().parent
    free = shutil.disk_usage(parent).free
    if num_bytes + _SPARE_BYTES > free:
        raise PplexError(
            f"{target} will take {units.size(num_bytes)} and {parent} has "
            f"{units.size(free)} free; choose a folder on a larger disk"
        )


@contextmanager
def _cache_limit(num_bytes: int) -> Iterator[None]:
    """Let MLX keep so much freed memory for what comes next, and no more."""
    before = mx.set_cache_limit(num_bytes)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
        mx.clear_cache()
