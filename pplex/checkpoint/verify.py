"""Check a model on disk, part after part, and say what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np

from pplex.checkpoint import hashes
from pplex.checkpoint.describe import ignored
from pplex.checkpoint.folder import CheckpointFolder
from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.safetensors import read_specs
from pplex.checkpoint.source import Source, is_finite
from pplex.checkpoint.tokenizer import TextTokenizer
from pplex.checkpoint.voices import (
    RING_LENGTH,
    VoicePrompt,
    check_voice,
    find_voices,
    fits_first,
    read_voice_file,
)
from pplex.checkpoint.weights import codec_tensors
from pplex.errors import PplexError
from pplex.model.config import TEXT_PAD, LmConfig, ModelConfig
from pplex.model.prompt import initial_column
from pplex.model.streams import TEXT_ROW, agent_rows, user_rows
from pplex.values import fit, read_json

Level = Literal["ok", "note", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One line of a report; ``what`` is the file or part that was looked at.

    A check of the published values has the level ``at_worst`` if it does not pass.
    """

    level: Level
    what: str
    text: str
    at_worst: Level | None = None


def verify(
    local: LocalModel, sums: Path | None, advance: Callable[[int], object]
) -> Iterator[Finding]:
    """Yield findings: files, tensors, codec, tokenizer, voices, hashes.

    ``sums`` is a list of SHA-256 to check against, instead of the model's own.
    ``advance`` is told of bytes of the language model that are checked.
    """
    yield from _verify(local, lambda source: _tensors(source, advance))
    yield from _hashes(local.folder, sums)


def verify_quickly(local: LocalModel) -> Iterator[Finding]:
    """Like ``verify``, but of the language model the headers only, and no hashes.

    A value that was changed is not noticed, a file that is not whole is.
    """
    yield from _verify(local, _headers)


def _verify(
    local: LocalModel, tensors: Callable[[Source], Iterator[Finding]]
) -> Iterator[Finding]:
    folder = local.folder
    if folder.fault:
        yield Finding("fault", str(folder.path), folder.fault)
    what = folder.config_file.name
    try:
        config = folder.read_config()
    except PplexError as e:
        yield Finding("fault", what, str(e))
        return
    there = folder.config_file.is_file()
    yield Finding("ok", what, "its sizes" if there else "none: 7B sizes taken")
    source = None
    try:
        source = Source(local.folder, config.lm)
    except PplexError as e:
        yield Finding("fault", "language model", str(e))
        yield from _contents(folder)
    if source is not None:
        yield from tensors(source)
        level: Level = "note" if local.is_known else "warning"
        yield from (Finding(level, *line) for line in ignored(folder))
    yield from _codec(folder, config)
    yield from _tokenizer(folder, config)
    yield from _voices(folder, config, source)


def _contents(folder: CheckpointFolder) -> Iterator[Finding]:
    """What the files of a language model hold that does not fit: for a report."""
    if folder.fault:
        return
    for path in folder.lm_files:
        try:
            specs = read_specs(path)
        except PplexError as e:
            yield Finding("fault", path.name, str(e))
            continue
        types = Counter(spec.dtype for spec in specs.values())
        counts = ", ".join(f"{count} {dtype}" for dtype, count in types.most_common())
        names = f"from `{min(specs)}` to `{max(specs)}`" if specs else "none"
        yield Finding("note", path.name, f"{len(specs)} tensors ({counts}), {names}")


def _headers(source: Source) -> Iterator[Finding]:
    """What making ``source`` has shown."""
    count = sum(len(stored.specs) for stored in source.matrices)
    text = f"{count} tensors, layout {source.layout}: names, shapes, types"
    yield Finding("ok", "language model", text)


def _tensors(source: Source, advance: Callable[[int], object]) -> Iterator[Finding]:
    bad = 0
    for stored in source.matrices:
        target = stored.matrix.targets[0]
        assert target is not None
        arrays = source.whole(target)
        for part, spec in stored.specs.items():
            if arrays[part].dtype != mx.uint32 and not is_finite(arrays[part]):
                bad += 1
                text = f"`{spec.name}` has NaN or infinite values"
                yield Finding("fault", stored.path.name, text)
        del arrays
        advance(stored.num_bytes)
        source.release(target)
        mx.clear_cache()
    if not bad:
        (found,) = _headers(source)
        yield replace(found, text=f"{found.text}, values")


def _codec(folder: CheckpointFolder, config: ModelConfig) -> Iterator[Finding]:
    try:
        path = folder.codec
    except PplexError:
        return  # said already
    try:
        weights = codec_tensors(folder, config.mimi)
    except PplexError as e:
        yield Finding("fault", path.name, str(e))
        return
    for name, array in weights.items():
        if not is_finite(array):
            yield Finding("fault", path.name, f"`{name}` has NaN or infinite values")
            return
    yield Finding("ok", path.name, f"the codec: {len(weights)} arrays")


def _tokenizer(folder: CheckpointFolder, config: ModelConfig) -> Iterator[Finding]:
    try:
        path = folder.tokenizer
    except PplexError:
        return  # said already
    try:
        pieces = TextTokenizer.load(path).num_pieces
    except PplexError as e:
        yield Finding("fault", path.name, str(e))
        return
    expected = config.lm.text_card
    level: Level = "ok" if pieces == expected else "fault"
    also = "" if pieces == expected else f", the model has {expected}"
    yield Finding(level, path.name, f"the tokenizer: {pieces} pieces{also}")


def _voices(
    folder: CheckpointFolder, config: ModelConfig, source: Source | None
) -> Iterator[Finding]:
    try:
        found = find_voices(folder.path)
    except PplexError as e:
        yield Finding("fault", "voices", str(e))
        return
    for name in _promised_voices(folder):
        if name not in found:
            text = f"the voice {name}, which config.json names, is missing"
            yield Finding("fault", "voices", text)
    if config.lm.is_moshi:
        yield Finding("ok", "voices", "none: a Moshi takes none")
        return
    if not found:
        yield Finding("warning", "voices", "none; give one with --voice FILE.wav")
        return
    first = None if source is None else first_vector(source)
    for path in found.values():
        try:
            voice = read_voice_file(path)
            lm = config.lm
            check_voice(voice, lm.dim, text_card=lm.text_card, card=lm.card)
        except PplexError as e:
            yield Finding("fault", path.name, str(e))
            continue
        doubts = list(voice_doubts(voice, config, first))
        for doubt in doubts:
            yield Finding("warning", path.name, doubt)
        if not doubts:
            yield Finding("ok", path.name, f"{len(voice.embeddings) + 1} frames")


def _promised_voices(folder: CheckpointFolder) -> list[str]:
    try:
        found = fit(read_json(folder.config_file), {"voices": ([str], None)})
    except (OSError, ValueError, PplexError):
        return []  # reported as what it is: a fault of config.json
    return found["voices"] or []


def input_tables(lm: LmConfig) -> list[str]:
    """The tables of the model's input, in the order of its sum."""
    return [*(f"audio_emb[{i}]" for i in range(lm.n_q)), "text_emb"]


def input_vectors(
    source: Source, columns: np.ndarray, dtype: mx.Dtype = mx.bfloat16
) -> np.ndarray:
    """The model's inputs float32 (columns, dim) for columns (streams, columns).

    Summed in ``dtype`` in the model's order, a table in memory at a time. A negative id
    stands for nothing.
    """
    total = None
    ordered = [*columns[1:], columns[TEXT_ROW]]
    for target, ids in zip(input_tables(source.config), ordered, strict=True):
        rows = source.rows(target, np.maximum(ids, 0).tolist()).astype(dtype)
        rows = mx.where(mx.array(ids >= 0)[:, None], rows, mx.zeros((), dtype))
        total = rows if total is None else total + rows
        mx.eval(total)
        source.release(target)
    assert total is not None
    return np.array(total.astype(mx.float32))


def first_vector(source: Source) -> np.ndarray:
    """The input (dim,) before the first frame, of the initial ids."""
    first: np.ndarray = input_vectors(source, initial_column(source.config)[:, None])[0]
    return first


def voice_doubts(
    voice: VoicePrompt, config: ModelConfig, first: np.ndarray | None
) -> Iterator[str]:
    """What a voice made by the reference for this model would not look like."""
    ring, lm = voice.cache, config.lm
    delayed = np.array(lm.delays) > 0
    # Of the column after the last, only the delayed rows are written yet.
    written = np.ones(ring.shape, bool)
    written[~delayed, (len(voice.embeddings) + 1) % RING_LENGTH] = False
    if (ring[TEXT_ROW] != TEXT_PAD)[written[TEXT_ROW]].any():
        yield "its text row is not padding throughout"
    user = user_rows(lm)
    if (ring[user] != np.array(config.sine_codes)[:, None])[written[user]].any():
        yield "its user rows are not the constant sine codes of this model"
    agent = ring[agent_rows(lm)][written[agent_rows(lm)]]
    if agent.min() < 0 or agent.max() >= lm.card:
        yield f"its agent rows are not codes from 0 to {config.lm.card - 1}"
    if first is not None and not fits_first(voice, first):
        yield "its first vector is not this model's: made for another model?"


def _hashes(folder: CheckpointFolder, given: Path | None) -> Iterator[Finding]:
    path = given or folder.path / hashes.SUMS_FILE
    if given is None and not path.is_file():
        yield from _cache_hashes(folder)
        return
    try:
        sums = hashes.read_sums(path)
    except PplexError as e:
        if given is not None:  # no fault of the model's
            raise PplexError(f"--sums {e}") from e
        yield Finding("fault", path.name, str(e))
        return
    bad = 0
    for name, expected in sums.items():
        file = folder.path / name
        if not file.is_file():
            yield Finding("fault", name, f"missing, though {path.name} lists it")
        elif hashes.sha256(file) != expected:
            text = f"its SHA-256 is not that of {path.name}: the content has changed"
            yield Finding("fault", name, text)
        else:
            continue
        bad += 1
    if not bad:
        yield Finding("ok", path.name, f"{len(sums)} files have the content it lists")


def _cache_hashes(folder: CheckpointFolder) -> Iterator[Finding]:
    checked = 0
    for name in folder.names:
        pair = hashes.cached_name(folder.path / name)
        if pair is None:
            continue
        checked += 1
        if pair[0] != pair[1]:
            text = "its content is not what Hugging Face gave; remove and pull again"
            yield Finding("fault", name, text)
    if checked:
        text = (
            f"{checked} files were compared with the hashes Hugging Face names them by"
        )
        yield Finding("ok", "hashes", text)
    else:
        text = f"there is no {hashes.SUMS_FILE}; a changed value would not be noticed"
        yield Finding("note", "hashes", text)
