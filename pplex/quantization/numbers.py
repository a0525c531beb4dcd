"""What a machine made of a model, held against the published values, or another's.

Published values that one source alone has are notes: a difference is reported and is no
fault. Where two machines have the same weights the same must come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.hub_cache import cached_snapshot
from pplex.checkpoint.known import KNOWN_MODELS
from pplex.checkpoint.published import check, check_files, summary
from pplex.checkpoint.reference import PERSONAPLEX, Reference, Unconfirmed
from pplex.checkpoint.verify import Finding, Level
from pplex.conversation.prompts import make_role
from pplex.conversation.session import Model
from pplex.errors import PplexError
from pplex.model.config import ModelConfig
from pplex.quantization.forced import forced_logits, script_of
from pplex.quantization.record import (
    CodecFigures,
    EngineFigures,
    Record,
    Run,
    Step,
    measure,
)
from pplex.values import shown

# What ports of the reference reach on the real weights, less some room.
_MIN_COSINE = 0.995
_MIN_FIRST_CODES = 0.9
_MIN_DECODED_DB = 25.0
_MIN_SAME_CHOICES = 0.95  # of given tokens; ports had 98.8 % of codes, 99.3 % of text

_MEAN_TOLERANCE = 0.02  # of the deviation; the published figures are of one file
_DEVIATION_TOLERANCE = 0.02
_OTHER_TOLERANCE = 0.05  # of another file, behind the second layer
_OUTPUT_TOLERANCE = 0.3
_LOGIT_TOLERANCE, _LOGIT_MEAN_TOLERANCE = 0.1, 0.05
_TONE_TOLERANCE_HZ = 45.0  # it comes in pieces of 80 ms
_CHECKED_CODES = 7  # the reference's ring may hide the oldest at the last step

# How far moments may lie apart between two records, by the fewest bits of the two.
_SAME_WEIGHTS = 0.01
_OUTPUTS_SHARE = 5.0  # so many times as far may a few entries
_OTHER_WEIGHTS = {16: 0.02, 8: 0.05, 4: 0.25}


def verify_numbers(
    local: LocalModel,
    recording: Path | None,
    other: Record | None,
    looking: Callable[[str], object],
    *,
    hashing: bool,
    reference: Reference = PERSONAPLEX,
) -> tuple[Record, list[Finding]]:
    """Measure a model and compare it with ``reference``, and with an ``other`` record.

    The rest as for ``record.measure``.
    """
    config = local.folder.read_config()
    applies = config.lm == reference.lm
    findings = list(check_files(local, reference))
    given = reference.unconfirmed.text if applies else None
    record, model = measure(local, given, recording, looking, hashing=hashing)
    findings += check_record(record, reference, config)
    findings.append(summary(findings, reference.name, applies))
    findings += _comparison_hint(local, record.bits)
    if other is not None:
        forced = None
        if model is not None and (run := other.run) is not None:
            if record.voices.get(run.voice) == run.voice_sha256:
                looking("the other's run")
                forced = force_run(model, run)
            else:
                voice = shown(run.voice)
                text = f"not tried: the voice of the other's run, {voice}, is not here"
                findings.append(Finding("note", "given tokens", text))
        findings += compare_records(record, other, forced)
    return record, findings


def check_record(
    record: Record, reference: Reference, config: ModelConfig
) -> Iterator[Finding]:
    """Say of each value whether it is the published one, or what it should be."""
    if config.lm == reference.lm:
        yield from _first_tokens(record, reference)
        yield from _unconfirmed(record, reference.unconfirmed)
    if record.codec is not None:
        yield from _constants(record.codec, config)
    if record.engine is not None:
        yield from _engine(record.engine)
    else:
        text = "there is not enough free memory to load the model: not compared"
        yield Finding("note", "engine", text)
    if record.run is not None:
        text = f"{len(record.run.text)} greedy frames, run twice"
        text += "" if record.run.is_repeatable else ", were not the same"
        yield check("repeated run", record.run.is_repeatable, text, "warning")


def _comparison_hint(local: LocalModel, bits: tuple[int, ...]) -> Iterator[Finding]:
    """Where a quantized model's source is here too: how to compare them."""
    source = "bf16"
    if max(bits) < 16 and cached_snapshot(KNOWN_MODELS[source].repo or "", None):
        text = f"`pplex models compare {source} {local.name}` says what they cost"
        yield Finding("note", "fewer bits", text)


def _first_tokens(record: Record, reference: Reference) -> Iterator[Finding]:
    first, found = reference.first, record.initial
    passed = (found.text, found.codes[0]) == (first.text, first.codes[0])
    text = f"text {found.text}, code {found.codes[0]}"
    if not passed:
        text += f", published are {first.text} and {first.codes[0]}"
    worst: Level = "warning" if min(record.bits) >= 8 else "note"
    yield check("first tokens", passed, text, worst)
    if min(record.bits) >= 16:
        pairs = zip(found.codes, first.codes[:_CHECKED_CODES], strict=False)
        same = sum(a == b for a, b in pairs)
        text = f"{same} of {_CHECKED_CODES} are the published ones"
        yield check("first codes", same == _CHECKED_CODES, text, "note")


def _unconfirmed(record: Record, reference: Unconfirmed) -> Iterator[Finding]:
    """The figures of one port's files."""
    step, theirs = record.silence, reference.bits in record.bits
    last = len(step.moments) - 2
    for idx, (mean, deviation) in reference.moments.items():
        found_mean, found = step.moments[idx]
        exact = theirs or 0 <= idx <= 2
        tolerance = _DEVIATION_TOLERANCE if exact else _OTHER_TOLERANCE
        passed = abs(found - deviation) <= tolerance * deviation
        passed &= abs(found_mean - mean) <= _MEAN_TOLERANCE * deviation
        where = {0: "sum of tables", -1: "last norm"}.get(idx, f"layer {idx} of {last}")
        text = f"mean {found_mean:.6f}, deviation {found:.6f}"
        yield _unconfirmed_check(where, passed, text, f"{mean}, {deviation}")
    for where, values, expected, tolerance in (
        ("first inputs", step.inputs, reference.inputs, 0.001),
        ("first outputs", step.outputs, reference.outputs, _OUTPUT_TOLERANCE),
    ):
        count = len(expected)
        apart = np.abs(np.subtract(values[:count], expected)).max()
        text = ", ".join(f"{value:.3f}" for value in values[:count])
        said = ", ".join(map(str, expected))
        yield _unconfirmed_check(where, bool(apart <= tolerance), text, said)
    passed = step.text == reference.text
    passed &= abs(step.text_logit - reference.text_logit) <= _LOGIT_TOLERANCE
    passed &= abs(step.text_mean - reference.text_mean) <= _LOGIT_MEAN_TOLERANCE
    text = f"likeliest {step.text} at {step.text_logit}, mean {step.text_mean}"
    said = f"{reference.text}, {reference.text_logit}, {reference.text_mean}"
    yield _unconfirmed_check("text logits", passed, text, said)
    said = " or ".join(" ".join(map(str, codes)) for codes in reference.codes)
    text = " ".join(map(str, step.codes))
    yield _unconfirmed_check("codes", step.codes in reference.codes, text, said)


def _unconfirmed_check(what: str, passed: bool, found: str, expected: str) -> Finding:
    text = found if passed else f"{found}; published, unconfirmed: {expected}"
    return check(what, passed, text, "note")


def _constants(codec: CodecFigures, config: ModelConfig) -> Iterator[Finding]:
    """Whether the codec gives the prompt's constants, and what they sound like."""
    for what, codes, constant in (
        ("sine codes", codec.sine, config.sine_codes),
        ("silence codes", codec.zeros, config.silence_codes),
    ):
        same = [int(np.equal(some, constant).sum()) for some in codes]
        count = len(constant)
        text = f"{same[0]} of {count} are what the codec makes of it, {same[1]} later"
        yield check(what, max(same) == count, text, "note")
    passed = abs(codec.tone_hz - 440) <= _TONE_TOLERANCE_HZ
    text = f"the constant sounds at {codec.tone_hz:.0f} Hz, meant are 440"
    yield check("sine sound", passed, text, "note")
    passed = codec.silence_dbfs <= -50
    text = f"the constant sounds at {codec.silence_dbfs:.0f} dBFS"
    yield check("silence sound", passed, text, "note")


def _engine(engine: EngineFigures) -> Iterator[Finding]:
    """Whether what runs here says what the specification says."""
    least = min(engine.text_cosine, engine.codes_cosine)
    text = f"cosine of logits with the specification's {least:.5f}, at least "
    yield check("engine", least >= _MIN_COSINE, f"{text}{_MIN_COSINE}", "warning")
    passed = engine.first_codes >= _MIN_FIRST_CODES
    passed &= engine.decoded_db >= _MIN_DECODED_DB
    text = (
        f"{engine.first_codes:.0%} of first codes are the specification's, sound "
        f"{engine.decoded_db:.0f} dB above its error; at least {_MIN_FIRST_CODES:.0%}, "
        f"{_MIN_DECODED_DB:.0f} dB"
    )
    yield check("codec", passed, text, "warning")


# Two records


@dataclass(frozen=True)
class Forced:
    """Shares of the tokens of another's run that are this model's first choice."""

    text: float
    codes: float


def force_run(model: Model, run: Run) -> Forced:
    """Give a model the tokens of another machine's greedy run."""
    lm = model.config.lm
    said, user = np.array([run.text, *run.agent]), np.array(run.user)
    rows = (len(said), len(user)) == (lm.num_agent_streams, lm.num_codebooks)
    if (
        not rows
        or said[0].max() >= lm.text_card
        or max(said[1:].max(), user.max()) >= lm.card
    ):
        raise PplexError("the other's run is not of a model with the same streams")
    prompt = make_role(model, run.voice, run.prompt).prompt
    script = script_of(lm, prompt, said.astype(np.int32), user.astype(np.int32))
    text, codes = [], []
    for logits, given in forced_logits(model.engine, script):
        text.append(logits.text.argmax(axis=1) == given[:, 0])
        codes.append(logits.agent.argmax(axis=2) == given[:, 1:])
    return Forced(
        float(np.concatenate(text).mean()), float(np.concatenate(codes).mean())
    )


def compare_records(
    ours: Record, other: Record, forced: Forced | None
) -> Iterator[Finding]:
    """Whether two machines made the same of a model, or nearly of two forms of it.

    ``forced`` is how ours chooses, given the tokens of the other's run.
    """
    shared = ours.sha256.keys() & other.sha256.keys()
    changed = sorted(n for n in shared if ours.sha256[n] != other.sha256[n])
    if shared:
        text = f"{len(shared) - len(changed)} of {len(shared)} files are the same"
        if changed:
            text += f", not {changed[0]}"
        yield check("files of both", not changed, text, "note")
    known = ours.voices.keys() & other.voices.keys()
    exchanged = sorted(n for n in known if ours.voices[n] != other.voices[n])
    text = f"{len(known) - len(exchanged)} of {len(known)} are the same"
    text += f", not {exchanged[0]}" if exchanged else ""
    yield check("voices of both", not exchanged, text, "warning")
    same = bool(_weights(ours)) and _weights(ours) == _weights(other)
    fewest = min(*ours.bits, *other.bits)
    tolerance = min(v for bits, v in _OTHER_WEIGHTS.items() if bits <= max(fewest, 4))
    tolerance = _SAME_WEIGHTS if same else tolerance
    worst: Level = "fault" if same else "warning"
    for what, a, b in (
        ("first step", ours.initial, other.initial),
        ("silent step", ours.silence, other.silence),
    ):
        yield _steps(what, a, b, tolerance, worst, same)
    if ours.codec is not None and other.codec is not None:
        yield _codecs(ours.codec, other.codec)
    if forced is not None:
        passed = min(forced.text, forced.codes) >= _MIN_SAME_CHOICES
        text = (
            f"given the other's tokens, {forced.text:.1%} of text and "
            f"{forced.codes:.1%} of codes would be the same"
        )
        worst = "note" if fewest < 8 else worst
        yield check("given tokens", passed, text, worst)
    run, theirs = ours.run, other.run
    if run is not None and theirs is not None and _is_same_run(run, theirs):
        yield _runs(run, theirs)


def _weights(record: Record) -> dict[str, str]:
    """The hashes of the files at the top that hold weights."""
    return {
        name: digest
        for name, digest in record.sha256.items()
        if name.endswith(".safetensors") and "/" not in name
    }


def _steps(
    what: str, ours: Step, other: Step, tolerance: float, worst: Level, same: bool
) -> Finding:
    """Deviations of all layers, and of the ``same`` weights the likeliest token."""
    a, b = (np.array(step.moments) for step in (ours, other))
    sizes = [(len(s.moments), len(s.outputs), s.tokens) for s in (ours, other)]
    if sizes[0] != sizes[1]:
        return check(what, False, "the two models have other sizes", worst)
    apart = np.abs(a[:, 1] / np.maximum(b[:, 1], 1e-30) - 1)
    beyond = np.flatnonzero(apart > tolerance)
    outputs, expected = np.array(ours.outputs), np.array(other.outputs)
    end = np.linalg.norm(outputs - expected) / max(np.linalg.norm(expected), 1e-30)
    text = (
        f"deviations of layers differ by at most {apart.max():.2g}, first outputs by "
        f"{end:.2g}; text {ours.text}, {other.text}"
    )
    if len(beyond):
        idx, last = int(beyond[0]), len(a) - 1
        where = {0: "in the sum of the tables", last: "behind the last norm"}
        place = where.get(idx, f"in layer {idx} of {last - 1}")
        text += f"; {apart[idx]:.2g} {place}, allowed are {tolerance}"
    passed = not len(beyond) and bool(end <= _OUTPUTS_SHARE * tolerance)
    passed &= ours.text == other.text or not same
    return check(what, passed, text, worst)


def _codecs(ours: CodecFigures, other: CodecFigures) -> Finding:
    """The codes of a tone and of zeros."""
    pairs = [
        (np.array(getattr(ours, key)), np.array(getattr(other, key)))
        for key in ("sine", "zeros")
    ]
    same = sum(int((a == b).sum()) for a, b in pairs if a.shape == b.shape)
    count = sum(a.size for a, _ in pairs)
    text = f"{same} of {count} codes of a tone and of zeros are the same"
    return check("codec of both", same >= _MIN_FIRST_CODES * count, text, "warning")


def _is_same_run(a: Run, b: Run) -> bool:
    keys = ("input_sha256", "voice_sha256", "prompt")
    return all(getattr(a, key) == getattr(b, key) for key in keys)


def _runs(ours: Run, other: Run) -> Finding:
    """How long two free runs are the same; they part for good at the first near-tie."""
    columns = [np.array([run.text, *run.agent]) for run in (ours, other)]
    count = min(column.shape[1] for column in columns)
    differ = (columns[0][:, :count] != columns[1][:, :count]).any(axis=0)
    first = int(differ.argmax()) if differ.any() else count
    text = f"the same for the first {first} of {count} frames"
    return check("free runs", first == count, text, "note")
