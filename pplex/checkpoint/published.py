"""Whether a model's files are the published ones: what can be told without running it.

A check that finds another model than the published one is a fault where the published
value has several sources, else a warning, or a note where nobody has confirmed it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
import numpy as np

from pplex.checkpoint import hashes
from pplex.checkpoint.folder import CONFIG_FILE, CheckpointFolder
from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.known import KNOWN_MODELS, PUBLISHED_BITS
from pplex.checkpoint.reference import (
    CODEC,
    LM,
    TOKENIZER,
    FirstStep,
    Reference,
    StoredVoice,
)
from pplex.checkpoint.safetensors import read_specs
from pplex.checkpoint.source import Source
from pplex.checkpoint.tokenizer import TextTokenizer
from pplex.checkpoint.verify import Finding, Level, input_tables, input_vectors
from pplex.checkpoint.voices import (
    MADE_FOR,
    RING_LENGTH,
    VoicePrompt,
    find_voices,
    read_voice_file,
)
from pplex.errors import PplexError
from pplex.model.prompt import initial_column

_INPUT_TOLERANCE = 0.02  # of a vector's length; about 0.004 was measured
_ENTRY_TOLERANCE = 0.001
_NORM_TOLERANCE = 0.005
_SCALE_BITS = 6  # of the 7 that a scale in bfloat16 has behind its point
_ZERO_SCALES = 0.01  # of a matrix

_FEW = 1 / 3  # of the unconfirmed values; by chance some may not agree
_MANTISSA = {2: (mx.uint16, {"BF16": 7, "F16": 10}), 4: (mx.uint32, {"F32": 23})}


def check(what: str, passed: bool, text: str, at_worst: Level) -> Finding:
    """A finding of a check that is ``at_worst`` this if it did not pass."""
    return Finding("ok" if passed else at_worst, what, text, at_worst)


def check_files(
    local: LocalModel, reference: Reference, *, quickly: bool = False
) -> Iterator[Finding]:
    """Compare the files of a model with the published ones.

    ``quickly``: without hashes of files and without the values of matrices. What must
    hold of any model is checked of one of other sizes too.
    """
    folder = local.folder
    try:
        lm = folder.read_config().lm
        source = Source(folder, lm)
        tokenizer = TextTokenizer.load(folder.tokenizer)
        voices = {
            name: read_voice_file(path)
            for name, path in find_voices(local.path).items()
        }
    except PplexError:
        return  # one of the faults that ``verify`` has found
    yield from _bits(local, source)
    if not quickly:
        yield from _scales(source)
    is_ours = lm == reference.lm
    if is_ours:
        yield from _lengths(local, reference)
        if not quickly:
            yield from _content(local, reference)
        yield from _tensors(source, reference)
        yield from _texts(tokenizer, reference.texts)
        yield from _voices(voices, reference.voices)
    if all(source.form(table) is None for table in input_tables(lm)):
        first = reference.first if is_ours else None
        yield from _inputs(source, voices, first)


def summary(findings: Sequence[Finding], name: str, applies: bool) -> Finding:
    """What all checks say together; ``applies``: that of the published values too."""
    able = [f for f in findings if f.at_worst in ("fault", "warning")]
    failed = [f for f in able if f.level != "ok"]
    unsure = [f for f in findings if f.at_worst == "note"]
    counted = f"{len(able) - len(failed)} of {len(able)} checks that can fail"
    agree = sum(f.level == "ok" for f in unsure)
    counted += f"; {agree} of {len(unsure)} unconfirmed values agree"
    names = ", ".join(f.what for f in failed)
    if not applies:
        text = f"{counted}; the published values are of another size and do not apply"
        return Finding("warning" if failed else "ok", "numbers", text)
    if not failed and agree < _FEW * len(unsure):
        text = f"by its files {name} as published, but is it run right? {counted}"
        return Finding("note", name, text)
    if not failed:
        return Finding("ok", name, f"this is {name} as published: {counted}")
    word = "is not" if any(f.level == "fault" for f in failed) else "may not be"
    text = f"this {word} {name} as published: {counted}; look at: {names}"
    return Finding("warning", name, text)


def _bits(local: LocalModel, source: Source) -> Iterator[Finding]:
    """Whether the temporal transformer has the bits that the model is said to have."""
    forms = Counter(
        stored.form.bits if stored.form else 16
        for stored in source.matrices
        if len(stored.matrix.shape) == 2
        and str(stored.matrix.targets[0]).startswith("layers.")
    )
    bits = forms.most_common(1)[0][0]
    said = {
        name: bits
        for name, bits in PUBLISHED_BITS.items()
        if KNOWN_MODELS[name].repo == local.repo
    }
    if (told := _told_bits(local.folder)) is not None:
        said[CONFIG_FILE] = told
    for path in source.files:
        for end, number in (("q4", 4), ("q8", 8)):
            if path.stem.endswith(f".{end}"):
                said[path.name] = number
    wrong = [f"{who} says {number}" for who, number in said.items() if number != bits]
    text = f"most matrices have {bits} bits"
    yield check("bits", not wrong, ", but ".join([text, *wrong]), "fault")


def _told_bits(folder: CheckpointFolder) -> int | None:
    """The bits that config.json speaks of, where it speaks of all matrices."""
    try:
        told = json.loads(folder.config_file.read_text(encoding="utf-8"))
        form = told.get("quantization", {})
        bits = None if form.get("mixed") else form.get("bits")
    except (OSError, ValueError, AttributeError):
        return None
    return bits if isinstance(bits, int) else None


def _scales(source: Source) -> Iterator[Finding]:
    """Whether the scales of quantized matrices are as fine as they can be."""
    names = [stored for stored in source.matrices if stored.form is not None]
    if not names:
        return
    coarse = []
    for stored in names:
        target = stored.matrix.targets[0]
        assert target is not None
        scales = source.whole(target)["scales"]
        kind, widths = _MANTISSA[scales.dtype.size]
        words = np.asarray(scales.view(kind)).reshape(-1)
        source.release(target)
        mantissa = widths[stored.specs["scales"].dtype]
        used = int(np.bitwise_or.reduce(words)) & ((1 << mantissa) - 1)
        fine = mantissa - ((used & -used).bit_length() - 1) if used else 0
        zeros = float(np.mean((words << 1) & (2 ** (8 * kind.size) - 1) == 0))
        if fine < _SCALE_BITS or zeros > _ZERO_SCALES:
            coarse.append(stored.matrix.name)
    more = f" and {len(coarse) - 1} more" if len(coarse) > 1 else ""
    text = f"those of {len(names)} matrices are fine"
    if coarse:
        text = (
            f"those of `{coarse[0]}`{more} are zero, or rounded to under {_SCALE_BITS} "
            "bits: the weights are coarser than they were"
        )
    yield check("scales", not coarse, text, "warning")


def _lengths(local: LocalModel, reference: Reference) -> Iterator[Finding]:
    """The bytes of each file of the conversion whose lengths are known."""
    sizes = {n: (local.folder.path / n).stat().st_size for n in local.folder.names}
    weights = [path.name for path in local.folder.lm_files]
    alike = all(sizes.get(n) == reference.lengths.get(n) for n in weights)
    if local.repo != reference.lengths_of and not alike:
        return
    other = [n for n, size in reference.lengths.items() if sizes.get(n) != size]
    known = len(reference.lengths)
    text = f"{known - len(other)} of {known} files have the published lengths"
    if other:
        text += f", not {other[0]}: another revision?"
    yield check("lengths", not other, text, "note")


def _published_roles(local: LocalModel) -> dict[str, str]:
    """The names of files by what they are for, as ``Reference.files`` has them."""
    folder = local.folder
    roles = {CODEC: folder.codec.name, TOKENIZER: folder.tokenizer.name}
    if len(folder.lm_files) == 1:
        roles[LM] = folder.lm_files[0].name
    return roles


def _content(local: LocalModel, reference: Reference) -> Iterator[Finding]:
    """SHA-256 of the files that have a published one's length."""
    folder, roles = local.folder, _published_roles(local)
    same, changed = [], []
    for role, stored in reference.files.items():
        path = folder.path / roles.get(role, role)
        if not path.is_file() or role == LM and LM not in roles:
            continue
        if path.stat().st_size != stored.num_bytes:
            text = f"{path.stat().st_size:,} bytes, published are {stored.num_bytes:,}"
            yield check(path.name, False, f"{text}: another form or revision", "note")
        elif hashes.name_or_sha256(path) == stored.sha256:
            same.append(path.name)
        else:
            changed.append(path.name)
    if same or changed:
        text = f"{', '.join(same)}: as published"
        if changed:
            text = f"{', '.join(changed)} has the published length and other content"
        yield check("SHA-256", not changed, text, "fault")


def _tensors(source: Source, reference: Reference) -> Iterator[Finding]:
    """Number and type of the tensors of NVIDIA's own file."""
    if source.layout != "pytorch":
        return
    specs = [spec for file in source.files for spec in read_specs(file).values()]
    types = sorted({spec.dtype for spec in specs})
    text = f"{len(specs)} of {', '.join(types)}"
    passed = len(specs) == reference.num_tensors and types == ["BF16"]
    if not passed:
        text += f", published are {reference.num_tensors} of BF16"
    yield check("tensors", passed, text, "fault")


def _texts(
    tokenizer: TextTokenizer, texts: Mapping[str, tuple[int, ...]]
) -> Iterator[Finding]:
    """The ids of the texts whose ids are known."""
    other = [text for text, ids in texts.items() if tokenizer.encode(text) != [*ids]]
    text = f"{len(texts) - len(other)} of {len(texts)} texts have the published ids"
    if other:
        text += f", not {other[0]!r}"
    yield check("tokenizer", not other, text, "fault")


def _voices(
    voices: Mapping[str, VoicePrompt], published: Mapping[str, StoredVoice]
) -> Iterator[Finding]:
    """Content and lengths of the voices with published names."""
    found = {name: voice for name, voice in voices.items() if name in published}
    for name, voice in found.items():
        stored = published[name]
        if stored.sha256 is not None:
            passed = voice_sha256(voice) == stored.sha256
            text = f"its {len(voice.embeddings)} frames are "
            text += "the published ones" if passed else "not the published ones"
            yield check(f"voice {name}", passed, text, "fault")
    frames = {name: len(voice.embeddings) for name, voice in found.items()}
    other = [name for name, count in frames.items() if published[name].frames != count]
    if found:
        text = f"{len(found) - len(other)} of {len(found)} have the published lengths"
        if other:
            text += (
                f", not {other[0]}: {frames[other[0]]} frames, "
                f"published are {published[other[0]].frames}"
            )
        yield check("voices", not other, text, "warning")


def voice_sha256(voice: VoicePrompt) -> str:
    """SHA-256 of a voice's embeddings as float32, which holds every stored type."""
    values = np.ascontiguousarray(voice.embeddings, "<f4")
    return hashlib.sha256(values.tobytes()).hexdigest()


def _inputs(
    source: Source, voices: Mapping[str, VoicePrompt], first: FirstStep | None
) -> Iterator[Finding]:
    """Sums of rows of the tables: the initial ids, and those of each voice's end.

    A voice's ring still has the ids of the last two of its input vectors.
    """
    made = {n: v for n, v in voices.items() if MADE_FOR not in v.notes}
    ends = {n: v for n, v in made.items() if len(v.embeddings) > RING_LENGTH}
    columns = [initial_column(source.config)[:, None]]
    for voice in ends.values():
        frames = len(voice.embeddings)
        columns.append(voice.cache[:, np.arange(frames - 2, frames) % RING_LENGTH])
    inputs = input_vectors(source, np.concatenate(columns, axis=1))
    if first is not None:
        yield _first_input(inputs[0], first)
    worst: Level = "fault" if first is not None else "warning"
    starts = {n: _apart(v.embeddings[:1], inputs[:1]) for n, v in made.items()}
    yield from _fitting("voices' first frames", starts, "the initial ids", worst)
    last = {
        n: _apart(v.embeddings[-2:], inputs[1 + 2 * i : 3 + 2 * i])
        for i, (n, v) in enumerate(ends.items())
    }
    yield from _fitting("voices' last frames", last, "their own ids", "warning")


def _first_input(found: np.ndarray, first: FirstStep) -> Finding:
    """The sum of the rows of all initial ids."""
    norm = float(np.linalg.norm(found))
    entries = np.abs(found[: len(first.entries)] - first.entries).max()
    passed = entries <= _ENTRY_TOLERANCE
    passed &= abs(norm / first.norm - 1) <= _NORM_TOLERANCE
    text = (
        f"length {norm:.4f}, published is {first.norm}; the first "
        f"{len(first.entries)} entries differ by {entries:.2g}"
    )
    return check("first input", bool(passed), text, "fault")


def _fitting(
    what: str, apart: Mapping[str, float], of: str, worst: Level
) -> Iterator[Finding]:
    """Whether vectors of voices are sums of the tables' rows."""
    if not apart:
        return
    other = [name for name, distance in apart.items() if distance > _INPUT_TOLERANCE]
    text = f"{len(apart) - len(other)} of {len(apart)} are the sums of rows of {of}"
    if other:
        text += f", not {other[0]}: {apart[other[0]]:.2g} of its length apart"
    yield check(what, not other, text, worst)


def _apart(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest distance of rows, of the length of the expected."""
    lengths = np.maximum(np.linalg.norm(expected, axis=1), 1e-30)
    return float((np.linalg.norm(found - expected, axis=1) / lengths).max())
