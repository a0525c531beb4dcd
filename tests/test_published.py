"""A model is held against the published one: whatever is changed in it is found."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
from random_checkpoint import mimi_arrays
from safetensors import safe_open
from twins import CODEC, REPOS, SMALL, TOKENIZER, write_twin

from pplex.checkpoint import reference as known
from pplex.checkpoint.folder import VOICES_ARCHIVE
from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.published import check_files, summary
from pplex.checkpoint.reference import (
    PERSONAPLEX,
    FirstStep,
    Reference,
    StoredFile,
    StoredVoice,
    Unconfirmed,
)
from pplex.checkpoint.voices import find_voices, read_voice_file
from pplex.conversation.session import load
from pplex.errors import PplexError
from pplex.model.config import ModelConfig
from pplex.quantization.numbers import (
    check_record,
    compare_records,
    force_run,
    verify_numbers,
)
from pplex.quantization.record import (
    EngineFigures,
    Record,
    measure,
    read_record,
    write_record,
)

TEXTS = ("Hello, world!", "  two  spaces and 1234", "it's done")


def local(folder: Path, repo: str | None = None) -> LocalModel:
    return LocalModel(folder.name, folder, repo, None)


def quiet(what: str) -> None:
    pass


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("twins")
    for name in ("bf16", "8bit", "4bit"):
        write_twin(folder / name, REPOS[name])
    return {name: folder / name for name in ("bf16", "8bit", "4bit")}


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    import soundfile

    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("sound") / "user.wav"
    soundfile.write(path, 0.1 * rng.standard_normal(20 * 1920), 24000)
    return path


@pytest.fixture(scope="module")
def records(twins, recording) -> dict[str, Record]:
    """What this machine makes of each twin."""
    return {
        name: measure(local(folder), 5, recording, quiet, hashing=True)[0]
        for name, folder in twins.items()
    }


@pytest.fixture(scope="module")
def reference(twins, records) -> Reference:
    """What would have been published: of bf16, what is unconfirmed of 4 bits."""

    def stored(name: str) -> StoredFile:
        content = (twins["bf16"] / name).read_bytes()
        return StoredFile(len(content), hashlib.sha256(content).hexdigest())

    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(twins["bf16"] / TOKENIZER)
    )
    voices = {}
    for name, path in find_voices(twins["bf16"]).items():
        frames = read_voice_file(path).embeddings.astype("<f4")
        digest = hashlib.sha256(frames.tobytes()).hexdigest()
        voices[name] = StoredVoice(len(frames), digest if name == "NATF2" else None)
    with safe_open(twins["bf16"] / "model.safetensors", "np") as file:
        count = len(file.keys())
    first = read_voice_file(find_voices(twins["bf16"])["VARF1"]).embeddings[0]
    initial, silent = records["bf16"].initial, records["4bit"].silence
    last = len(silent.moments) - 1
    return Reference(
        name="the twin",
        lm=SMALL.lm,
        num_tensors=count,
        files={
            known.LM: stored("model.safetensors"),
            known.CODEC: stored(CODEC),
            known.TOKENIZER: stored(TOKENIZER),
            VOICES_ARCHIVE: stored(VOICES_ARCHIVE),
        },
        lengths={
            str(path.relative_to(twins["8bit"])): path.stat().st_size
            for path in twins["8bit"].rglob("*")
            if path.is_file()
        },
        texts={text: tuple(processor.encode(text)) for text in TEXTS},
        voices=voices,
        first=FirstStep(
            tuple(first[:10]), np.linalg.norm(first), initial.text, initial.codes
        ),
        unconfirmed=Unconfirmed(
            bits=4,
            moments={
                idx if idx < last else -1: moments
                for idx, moments in enumerate(silent.moments)
            },
            inputs=silent.inputs[:5],
            outputs=silent.outputs[:5],
            text=silent.text,
            text_logit=silent.text_logit,
            text_mean=silent.text_mean,
            codes=(silent.codes,),
        ),
    )


@pytest.fixture
def copy(twins, tmp_path):
    """A copy of a twin, to be changed."""

    def make(name: str) -> Path:
        shutil.copytree(twins[name], tmp_path / name)
        return tmp_path / name

    return make


def found(folder: Path, reference: Reference) -> dict[str, str]:
    """What checks find, but for the codec's constants, by their levels."""
    _, findings = verify_numbers(
        local(folder), None, None, quiet, hashing=False, reference=reference
    )
    mute = ("sine codes", "silence codes", "sine sound", "silence sound")
    return {f.what: f.level for f in findings if f.level != "ok" and f.what not in mute}


@pytest.fixture(scope="module")
def intact(twins, reference) -> dict[str, dict[str, str]]:
    """What checks find where nothing was changed."""
    return {name: found(folder, reference) for name, folder in twins.items()}


def places(path: Path) -> dict[str, slice]:
    """Where the values of each tensor of a file lie in it."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return {
        name: slice(*(start + at for at in spec["data_offsets"]))
        for name, spec in json.loads(content[8:start]).items()
        if name != "__metadata__"
    }


def swapped(path: Path, one: str, other: str) -> None:
    """Exchange the tensors whose names begin so, in place."""
    content, at = path.read_bytes(), places(path)
    changed = bytearray(content)
    for name in [name for name in at if name.startswith(one)]:
        twin = other + name.removeprefix(one)
        changed[at[name]], changed[at[twin]] = content[at[twin]], content[at[name]]
    path.write_bytes(changed)


@pytest.mark.parametrize("name", ["bf16", "8bit", "4bit"])
def test_an_intact_model_is_said_to_be_as_published(name, twins, reference):
    measured, findings = verify_numbers(
        local(twins[name], REPOS[name].name),
        *(None, None, quiet),
        hashing=False,
        reference=reference,
    )
    able = [f for f in findings if f.at_worst in ("fault", "warning")]
    assert [f for f in able if f.level != "ok"] == []
    (said,) = (f for f in findings if f.what == "the twin")
    assert said.level == "ok"
    assert f"is the twin as published: {len(able)} of {len(able)} checks" in said.text
    assert len(able) >= 9
    assert measured.engine is not None


# A change, in which twin, and what finds it.


def swap_tables(folder: Path) -> None:
    swapped(folder / "embeddings.safetensors", "emb.0.", "emb.3.")


def swap_users_tables(folder: Path) -> None:
    swapped(folder / "embeddings.safetensors", "emb.9.", "emb.12.")


def change_the_first_row(folder: Path) -> None:
    path = folder / "embeddings.safetensors"
    arrays = dict(mx.load(str(path)))
    table = np.array(arrays["emb.5.weight"])
    table[-1] += 0.3
    mx.save_safetensors(str(path), arrays | {"emb.5.weight": mx.array(table)})


def exchange_voices(folder: Path) -> None:
    paths = [folder / "voices" / f"{name}.safetensors" for name in ("NATF2", "NATF3")]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)


def exchange_voices_of_other_lengths(folder: Path) -> None:
    paths = [folder / "voices" / f"{name}.safetensors" for name in ("NATF0", "NATM3")]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)


def move_a_piece(folder: Path) -> None:
    """Exchange two pieces of the tokenizer that a text needs; its length stays."""
    path = folder / TOKENIZER
    content = path.read_bytes()
    h, w = (content.index(b"\x0a\x01" + letter) + 2 for letter in (b"H", b"w"))
    moved = bytearray(content)
    moved[h], moved[w] = content[w], content[h]
    path.write_bytes(moved)


def round_scales(folder: Path) -> None:
    """Keep of each scale its power of two."""
    path = folder / "temporal.safetensors"
    arrays = dict(mx.load(str(path)))
    for name in [n for n in arrays if n.endswith(".scales")]:
        words = arrays[name].view(mx.uint16) & 0xFC00
        arrays[name] = words.view(mx.float16)
    mx.save_safetensors(str(path), arrays)


def clear_scales(folder: Path) -> None:
    """Let some rows of one matrix have no scale."""
    path = folder / "depformer.safetensors"
    arrays = dict(mx.load(str(path)))
    name = next(n for n in sorted(arrays) if n.endswith("linear_in.scales"))
    scales = np.array(arrays[name])
    scales[:20] = 0
    mx.save_safetensors(str(path), arrays | {name: mx.array(scales)})


def another_codec(folder: Path) -> None:
    path = next(p for p in (folder / CODEC, folder / "mimi.safetensors") if p.exists())
    mx.random.seed(7)
    at, data = places(path), bytearray(path.read_bytes())
    for name, array in mimi_arrays(SMALL.mimi).items():
        data[at[name]] = np.array(array).astype("<f4").tobytes()
    path.write_bytes(data)


def say_four_bits(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"bits": 8', '"bits": 4'))
    assert json.loads(path.read_text())["quantization"]["bits"] == 4


def reorder_layers(folder: Path) -> None:
    swapped(folder / "temporal.safetensors", "layers.0.", "layers.1.")


def reorder_layers_of_one_file(folder: Path) -> None:
    swapped(
        folder / "model.safetensors", "transformer.layers.0.", "transformer.layers.1."
    )


def permute_the_text_head(folder: Path) -> None:
    path = folder / "embeddings.safetensors"
    arrays = dict(mx.load(str(path)))
    head = np.array(arrays["text_linear.weight"])[::-1].copy()
    mx.save_safetensors(str(path), arrays | {"text_linear.weight": mx.array(head)})


def widen_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    arrays = dict(mx.load(str(path)))
    wide = arrays["out_norm.alpha"].astype(mx.float32)
    mx.save_safetensors(str(path), arrays | {"out_norm.alpha": wide})


CHANGES = [
    ("8bit", swap_tables, {"voices' last frames": "warning"}),
    ("4bit", swap_users_tables, {"voices' last frames": "warning"}),
    (
        "8bit",
        change_the_first_row,
        {"first input": "fault", "voices' first frames": "fault"},
    ),
    ("8bit", exchange_voices, {"voice NATF2": "fault"}),
    ("4bit", exchange_voices_of_other_lengths, {"voices": "warning"}),
    ("8bit", move_a_piece, {"tokenizer": "fault", "SHA-256": "fault"}),
    ("4bit", round_scales, {"scales": "warning"}),
    ("8bit", clear_scales, {"scales": "warning"}),
    ("bf16", another_codec, {"SHA-256": "fault"}),
    ("4bit", another_codec, {"SHA-256": "fault"}),
    ("8bit", say_four_bits, {"bits": "fault"}),
    ("4bit", reorder_layers, {"layer 1 of 2": "note"}),
    ("8bit", reorder_layers, {"layer 1 of 2": "note"}),
    ("bf16", reorder_layers_of_one_file, {"SHA-256": "fault", "layer 1 of 2": "note"}),
    ("8bit", permute_the_text_head, {"first tokens": "warning"}),
    ("bf16", widen_a_tensor, {"tensors": "fault"}),
]


@pytest.mark.parametrize(
    ("name", "change", "finds"),
    CHANGES,
    ids=[f"{change.__name__}-{name}" for name, change, _ in CHANGES],
)
def test_a_change_is_found(name, change, finds, copy, intact, reference):
    assert intact[name].items().isdisjoint(finds.items())
    folder = copy(name)
    change(folder)
    assert found(folder, reference).items() >= finds.items()


def test_files_as_published_that_compute_otherwise_are_not_praised(copy, reference):
    folder = copy("4bit")
    reorder_layers(folder)
    _, findings = verify_numbers(
        local(folder), None, None, quiet, hashing=False, reference=reference
    )
    (said,) = (f for f in findings if f.what == "the twin")
    assert said.level == "note" and "is it run right?" in said.text


def test_bits_are_those_of_the_name(twins):
    for name, repo, level in (
        ("8bit", "8bit", "ok"),
        ("8bit", "4bit", "fault"),
        ("4bit", "8bit", "fault"),
        ("8bit", "bf16", "fault"),
        ("bf16", "bf16", "ok"),
    ):
        model = local(twins[name], REPOS[repo].name)
        levels = [f.level for f in check_files(model, PERSONAPLEX) if f.what == "bits"]
        assert levels == [level]


def test_a_tensor_that_nobody_needs_is_counted(copy, reference):
    path = copy("bf16") / "model.safetensors"
    more = {"extra_heads.0.weight": mx.zeros((2, 2), mx.bfloat16)}
    mx.save_safetensors(str(path), dict(mx.load(str(path))) | more)
    assert found(path.parent, reference)["tensors"] == "fault"


def test_where_the_source_is_here_too_it_is_said_how_to_compare(
    twins, reference, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / f"models--{REPOS['bf16'].name.replace('/', '--')}"
    shutil.copytree(twins["bf16"], repo / "snapshots" / REPOS["bf16"].revision)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(REPOS["bf16"].revision)
    for name, said in (("8bit", ["pplex models compare bf16 8bit"]), ("bf16", [])):
        _, findings = verify_numbers(
            local(twins[name]), None, None, quiet, hashing=False, reference=reference
        )
        hints = [f.text.split("`")[1] for f in findings if f.what == "fewer bits"]
        assert hints == said


def test_what_every_model_has_is_checked_where_no_value_is_published(twins):
    _, findings = verify_numbers(local(twins["8bit"]), None, None, quiet, hashing=False)
    assert "of another size and do not apply" in findings[-1].text
    names = {f.what for f in findings}
    assert names >= {"bits", "scales", "voices' last frames", "engine", "codec"}
    assert names.isdisjoint({"tokenizer", "SHA-256", "first input", "text logits"})


def test_an_engine_or_codec_beside_the_specification_is_warned_of(records, reference):
    record, config = records["8bit"], SMALL
    for figures, what in (
        (EngineFigures(0.99, 1.0, 1.0, 60.0), "engine"),
        (EngineFigures(1.0, 0.9, 1.0, 60.0), "engine"),
        (EngineFigures(1.0, 1.0, 0.8, 60.0), "codec"),
        (EngineFigures(1.0, 1.0, 1.0, 20.0), "codec"),
    ):
        changed = replace(record, engine=figures)
        warned = check_record(changed, reference, config)
        assert [f.what for f in warned if f.level == "warning"] == [what]
    assert record.engine is not None and record.engine.text_cosine > 0.9999


def test_a_run_that_is_not_repeated_is_warned_of(records, reference):
    run = records["bf16"].run
    assert run is not None and run.is_repeatable and len(run.text) == 20
    record = replace(records["bf16"], run=replace(run, is_repeatable=False))
    warned = check_record(record, reference, SMALL)
    assert [f.what for f in warned if f.level == "warning"] == ["repeated run"]


def test_the_shipped_lengths_are_those_of_the_published_headers(tmp_path):
    write_twin(tmp_path, REPOS["8bit"], ModelConfig(), sparse=True)
    sizes = {
        str(path.relative_to(tmp_path)): path.stat().st_size
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert len(PERSONAPLEX.lengths) == 24
    assert sizes.items() >= PERSONAPLEX.lengths.items()


def test_the_shipped_reference_is_of_the_7b(tmp_path):
    """A folder of zeros in the right form differs where values are, nowhere else."""
    write_twin(tmp_path, REPOS["8bit"], ModelConfig(), sparse=True)
    found = list(check_files(local(tmp_path), PERSONAPLEX, quickly=True))
    failed = {f.what for f in found if f.level not in ("ok", "note")}
    assert failed >= {"tokenizer", "voice NATF2", "first input"}
    assert {f.what for f in found if f.level == "ok"} >= {"bits", "lengths", "voices"}
    said = summary(found, "PersonaPlex", True)
    assert "this is not PersonaPlex as published" in said.text


# Two machines


def compared(ours: Record, other: Record) -> dict[str, str]:
    found = compare_records(ours, other, None)
    return {f.what: f.level for f in found if f.level != "ok"}


def test_a_record_is_read_as_it_was_written(records, tmp_path):
    write_record(tmp_path / "r.json", records["4bit"])
    assert read_record(tmp_path / "r.json") == records["4bit"]
    assert compared(records["4bit"], records["4bit"]) == {}


def test_fewer_bits_are_no_other_model(records):
    for name in ("8bit", "4bit"):
        assert set(compared(records[name], records["bf16"]).values()) <= {"note"}


def test_what_another_machine_makes_of_the_same_files_must_be_the_same(records):
    record = records["8bit"]
    mean, deviation = record.silence.moments[1]
    moments = list(record.silence.moments)
    moments[1] = mean, 1.02 * deviation
    other = replace(record, silence=replace(record.silence, moments=tuple(moments)))
    assert compared(other, record) == {"silent step": "fault"}
    step = replace(record.initial, text=record.initial.text + 1)
    assert compared(replace(record, initial=step), record) == {"first step": "fault"}
    assert "in layer 1 of 2" in next(
        f.text for f in compare_records(other, record, None) if f.level == "fault"
    )


@pytest.mark.parametrize(
    ("change", "finds"),
    [
        (reorder_layers, {"silent step"}),
        (swap_tables, {"silent step"}),
        (permute_the_text_head, set()),
        (exchange_voices, {"voices of both"}),
        (another_codec, {"codec of both"}),
    ],
)
def test_a_change_is_found_beside_another_record(change, finds, copy, records):
    folder = copy("8bit")
    change(folder)
    changed = measure(local(folder), 5, None, quiet, hashing=True)[0]
    found = compared(changed, records["8bit"])
    assert found.pop("files of both") == "note"
    assert found.keys() >= finds and set(found.values()) <= {"warning"}


def test_tokens_of_another_run_are_chosen_by_the_same_model_only(
    twins, records, copy, recording
):
    run = records["8bit"].run
    assert run is not None
    same = force_run(load(local(twins["8bit"])), run)
    assert (same.text, same.codes) == (1.0, 1.0)
    folder = copy("8bit")
    permute_the_text_head(folder)
    other = force_run(load(local(folder)), run)
    assert other.text < 0.5
    levels = {
        f.what: f.level
        for f in compare_records(records["8bit"], records["8bit"], other)
    }
    assert levels["given tokens"] == "fault"


@pytest.mark.parametrize(
    "change",
    [
        {"agent": ((1,) * 20,) * 7},
        {"user": ((9999,) * 20,) * 8},
        {"text": (9999,) * 20},
    ],
)
def test_a_run_of_another_model_is_refused(change, twins, records):
    run = records["8bit"].run
    assert run is not None
    with pytest.raises(PplexError, match="run"):
        force_run(load(local(twins["8bit"])), replace(run, **change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.pop("bits"), "damaged"),
        (lambda raw: raw.update(bits=["4"]), "`bits`"),
        (lambda raw: raw.update(voices={"a": 1}), "`voices`"),
        (lambda raw: raw["initial"].update(text=1.5), "`text`"),
        (lambda raw: raw["initial"].update(text_mean=10**400), "damaged"),
        (lambda raw: raw["initial"].update(moments=[[1.0]]), "`moments`"),
        (lambda raw: raw.update(format="another"), "no record"),
        (lambda raw: raw["run"].update(text=[5]), "cut short"),
        (lambda raw: raw["run"]["agent"].pop(0) and raw["run"]["user"][0].pop(), "cut"),
        (lambda raw: raw["run"]["user"][0].__setitem__(0, -1), "out of range"),
        (lambda raw: raw["run"]["user"][0].__setitem__(0, 10**30), "out of range"),
    ],
)
def test_a_damaged_record_is_refused(change, says, records, tmp_path):
    path = tmp_path / "r.json"
    write_record(path, records["4bit"])
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(PplexError, match=says):
        read_record(path)


def test_a_file_that_is_no_record_is_refused(tmp_path):
    for content in (b"", b"[]", b"\xff\xfe", b"[" * 100000):
        (tmp_path / "r.json").write_bytes(content)
        with pytest.raises(PplexError, match="no record"):
            read_record(tmp_path / "r.json")
