"""Voice files: read exactly, refused when broken, and never executed."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pplex.checkpoint import torchfile, unpack
from pplex.checkpoint.voices import (
    check_voice,
    find_voices,
    read_voice_file,
    write_voice_file,
)
from pplex.errors import PplexError

DATA = Path(__file__).parent / "data"
TGZ = DATA / "tiny" / "voices.tgz"
SPLIT = DATA / "quantized-layout" / "4bit"

RNG = np.random.default_rng(5)
EMBEDDINGS = RNG.standard_normal((3, 1, 1, 8)).astype(np.float32)
CACHE = RNG.integers(0, 2048, (1, 17, 4))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


# Writing what torch.save writes, without torch.


class Global:
    """A global that a pickle names, whether or not it exists here."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None:
        """Called only by the reader's stand-in."""


class Storage:
    def __init__(self, kind: str, key: str, numel: int) -> None:
        self.pid = ("storage", Global("torch", kind), key, "cuda:0", numel)


class Call:
    """Pickles as a call of a global."""

    def __init__(self, function: Global, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class TorchPickler(pickle._Pickler):
    """Python's own pickler, which can be told to write any global."""

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Storage) else None

    def save(self, obj, *args, **options):
        if isinstance(obj, Global):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        else:
            super().save(obj, *args, **options)


def tensor(kind: str, key: str, shape: tuple, numel: int | None = None, **change):
    numel = int(np.prod(shape)) if numel is None else numel
    stride = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    ordered = Call(Global("collections", "OrderedDict"))
    return Call(
        Global("torch._utils", "_rebuild_tensor_v2"),
        Storage(kind, key, numel),
        change.get("offset", 0),
        change.get("size", shape),
        change.get("stride", stride),
        False,
        ordered,
    )


def pickled(obj: object) -> bytes:
    stream = io.BytesIO()
    TorchPickler(stream, protocol=2).dump(obj)
    return stream.getvalue()


def write_pt(path: Path, content: bytes, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("NAME/data.pkl", content)
        for name, data in entries.items():
            archive.writestr(f"NAME/{name}", data)
    return path


def voice_entries() -> dict[str, bytes]:
    return {
        "byteorder": b"little",
        "data/0": EMBEDDINGS.tobytes(),
        "data/1": CACHE.astype("<i8").tobytes(),
        "version": b"3\n",
    }


def voice_dict() -> dict[str, object]:
    return {
        "embeddings": tensor("FloatStorage", "0", EMBEDDINGS.shape),
        "cache": tensor("LongStorage", "1", CACHE.shape),
    }


def write_safetensors(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors_header(embeddings_dtype: str = "F32", width: int = 4) -> dict:
    end = 24 * width
    return {
        "__metadata__": {"made": "by hand"},
        "embeddings": entry(embeddings_dtype, [3, 1, 1, 8], 0, end),
        "cache": entry("F32", [1, 17, 4], end, end + 272),
    }


def refusal(path: Path) -> str:
    """The sentence with which a voice is refused; it names the file."""
    with pytest.raises(PplexError) as info:
        read_voice_file(path)
    assert path.name in str(info.value)
    return str(info.value)


# What is right.


@pytest.mark.parametrize("name", ["NATF0", "NATM0"])
def test_the_references_pt_and_safetensors_voices_agree(name):
    torch_voice = read_voice_file(find_voices(TGZ.parent)[name])
    mlx_voice = read_voice_file(find_voices(SPLIT)[name])
    frames = {"NATF0": 24, "NATM0": 16}[name]
    for voice in (torch_voice, mlx_voice):
        assert (voice.name, voice.dtype) == (name, "float32")
        assert voice.embeddings.shape == (frames, 64)
        assert (voice.cache.shape, voice.cache.dtype) == ((17, 4), np.int32)
        assert (voice.cache[0] == 3).all()
        sine = [430, 1268, 381, 1611, 1095, 1495, 56, 472]
        np.testing.assert_array_equal(voice.cache[9:], np.repeat([sine], 4, 0).T)
    np.testing.assert_array_equal(torch_voice.embeddings, mlx_voice.embeddings)
    np.testing.assert_array_equal(torch_voice.cache, mlx_voice.cache)


def test_a_pt_written_like_torch_is_read(tmp_path):
    content = {"note": "extra keys are ignored", **voice_dict(), "n": [1, 2.5, None]}
    path = write_pt(tmp_path / "VOICE.pt", pickled(content), voice_entries())
    voice = read_voice_file(path)
    assert voice.name == "VOICE"
    np.testing.assert_array_equal(voice.embeddings, EMBEDDINGS[:, 0, 0])
    np.testing.assert_array_equal(voice.cache, CACHE[0])


def test_an_ordered_dict_is_read(tmp_path):
    items = voice_dict()

    class Ordered:
        def __reduce__(self):
            call = Global("collections", "OrderedDict")
            return call, (), None, None, iter(items.items())

    path = write_pt(tmp_path / "a.pt", pickled(Ordered()), voice_entries())
    np.testing.assert_array_equal(read_voice_file(path).cache, CACHE[0])


def test_bfloat16_and_float16_are_widened_exactly(tmp_path):
    exact = np.array([1.0, -2.5, 3.140625, 2.0**-100, 0.0, -0.0, 1e38, 5e-39])
    bits = (exact.astype(np.float32).view(np.uint32) >> 16).astype("<u2")
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    entries = voice_entries()
    entries["data/0"] = np.tile(bits, 3).tobytes()
    content = voice_dict()
    content["embeddings"] = tensor("BFloat16Storage", "0", (3, 1, 1, 8))
    voice = read_voice_file(write_pt(tmp_path / "a.pt", pickled(content), entries))
    assert voice.dtype == "bfloat16"
    np.testing.assert_array_equal(voice.embeddings, np.tile(expected, (3, 1)))

    header = safetensors_header("BF16", 2)
    data = entries["data/0"] + CACHE.astype("<f4").tobytes()
    same = read_voice_file(write_safetensors(tmp_path / "a.safetensors", header, data))
    assert same.dtype == "bfloat16"
    np.testing.assert_array_equal(same.embeddings, voice.embeddings)

    half = EMBEDDINGS.astype("<f2")
    header = safetensors_header("F16", 2)
    data = half.tobytes() + CACHE.astype("<f4").tobytes()
    same = read_voice_file(write_safetensors(tmp_path / "b.safetensors", header, data))
    assert same.dtype == "float16"
    np.testing.assert_array_equal(same.embeddings, half[:, 0, 0].astype(np.float32))


def test_offset_size_and_stride_are_honoured(tmp_path):
    stored = np.arange(100, dtype="<f4")
    content = voice_dict()
    content["embeddings"] = tensor(
        "FloatStorage", "0", (3, 1, 1, 8), 100, offset=5, stride=(1, 9999, 77, 10)
    )
    entries = {**voice_entries(), "data/0": stored.tobytes()}
    voice = read_voice_file(write_pt(tmp_path / "a.pt", pickled(content), entries))
    expected = 5 + np.arange(3)[:, None] + 10 * np.arange(8)
    np.testing.assert_array_equal(voice.embeddings, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_written_voice_reads_back(tmp_path, dtype):
    path = tmp_path / "mine.safetensors"
    write_voice_file(path, EMBEDDINGS[:, 0, 0], CACHE[0], dtype=dtype)
    voice = read_voice_file(path)
    assert voice.dtype == dtype
    tolerance = 0 if dtype == "float32" else 2.0**-8
    np.testing.assert_allclose(voice.embeddings, EMBEDDINGS[:, 0, 0], rtol=tolerance)
    np.testing.assert_array_equal(voice.cache, CACHE[0])
    from safetensors.numpy import load_file  # what others read it with

    if dtype == "float32":
        shapes = {name: a.shape for name, a in load_file(path).items()}
        assert shapes == {"embeddings": (3, 1, 1, 8), "cache": (1, 17, 4)}


def test_bfloat16_rounds_half_to_even(tmp_path):
    values = np.array([[1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20]])
    write_voice_file(tmp_path / "a.safetensors", values, CACHE[0], dtype="bfloat16")
    read = read_voice_file(tmp_path / "a.safetensors").embeddings
    np.testing.assert_array_equal(read, [[1, 1 + 2.0**-6, 1 + 2.0**-7]])


def test_a_voice_of_another_width_is_refused(tmp_path):
    write_voice_file(tmp_path / "X.safetensors", EMBEDDINGS[:, 0, 0], CACHE[0])
    voice = read_voice_file(tmp_path / "X.safetensors")
    check_voice(voice, 8, text_card=32_000, card=2048)
    with pytest.raises(PplexError, match="'X' was made for a model of width 8, .*4096"):
        check_voice(voice, 4096)
    with pytest.raises(PplexError, match="audio ids"):
        check_voice(voice, 8, card=100)


# What is wrong.


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path):
    bait = tmp_path / "executed"
    content = {**voice_dict(), "extra": Touch(bait)}
    message = refusal(write_pt(tmp_path / "evil.pt", pickled(content), voice_entries()))
    assert "system" in message
    assert not bait.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("collections", "OrderedDict.__init__"),
        ("torch", "load"),
        ("torch", "DoubleStorage"),
        ("torch._utils", "_rebuild_parameter"),
        ("numpy", "ndarray"),
    ],
)
def test_any_other_global_is_refused_by_name(tmp_path, module, name):
    content = {**voice_dict(), "extra": Global(module, name)}
    path = write_pt(tmp_path / "a.pt", pickled(content), voice_entries())
    assert f"{module}.{name}" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02.",
        b"\x80\x02}q\x00",
        b"\x80\x02]q\x00.",
        b"\x80\x02K\x01.",
        b"\x80\x02h\x05.",
        b"\x80\x02(((((t.",
        b"\x80\x02}r\xff\xff\xff\xff.",
        b"\x80\x02ctorch\nFloatStorage\nK\x01Q.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02ctorch\nFloatStorage\n}(X\x04\x00\x00\x00kindX\x01\x00\x00\x00aub.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02\x82\x01.",
        b"garbage",
    ],
)
def test_broken_pickles_are_one_sentence(tmp_path, content):
    refusal(write_pt(tmp_path / "a.pt", content, voice_entries()))


def test_a_tensor_cannot_be_changed_after_it_was_checked(tmp_path):
    class Changed:
        def __reduce__(self):
            made = tensor("FloatStorage", "0", EMBEDDINGS.shape)
            return made.function, made.arguments, (None, {"offset": 1 << 40})

    content = {**voice_dict(), "embeddings": Changed()}
    refusal(write_pt(tmp_path / "a.pt", pickled(content), voice_entries()))


@pytest.mark.parametrize(
    "change",
    [
        {"offset": 1},
        {"offset": -1},
        {"size": (4, 1, 1, 8)},
        {"size": (3, 1, 1, -8)},
        {"size": (1 << 40, 1, 1, 8)},
        {"size": (1 << 40, 1, 1, 8), "stride": (0, 0, 0, 0)},
        {"stride": (8, 8, 8, 2)},
        {"stride": (-8, 8, 8, 1)},
        {"stride": (8, 1)},
        {"size": (24,), "stride": (1,)},
        {"size": (0, 1, 1, 8)},
        {"size": (3, 1, 1, 8.0)},
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change):
    content = voice_dict()
    content["embeddings"] = tensor("FloatStorage", "0", (3, 1, 1, 8), 24, **change)
    refusal(write_pt(tmp_path / "a.pt", pickled(content), voice_entries()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data/0": None}, "missing"),
        ({"data/0": EMBEDDINGS.tobytes()[:-4]}, "bytes"),
        ({"data/0": EMBEDDINGS.tobytes() + b"more"}, "too large"),
        ({"byteorder": b"big"}, "byte order"),
        ({"data/0": np.full(24, np.nan, "<f4").tobytes()}, "NaN"),
    ],
)
def test_wrong_entries_are_refused(tmp_path, change, reason):
    entries = {k: v for k, v in {**voice_entries(), **change}.items() if v is not None}
    path = write_pt(tmp_path / "a.pt", pickled(voice_dict()), entries)
    assert reason in refusal(path)


@pytest.mark.parametrize("key", ["embeddings", "cache"])
def test_missing_keys_are_named(tmp_path, key):
    content = voice_dict()
    del content[key]
    path = write_pt(tmp_path / "a.pt", pickled(content), voice_entries())
    assert repr(key) in refusal(path)


def test_a_compressed_bomb_is_refused_by_its_size(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("NAME/data.pkl", bytes(torchfile.MAX_PICKLE_BYTES + 1))
    assert "too large" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("names", [[], ["a/data.pkl", "b/data.pkl"], ["data.pkl"]])
def test_there_must_be_exactly_one_pickle(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name in [*names, "a/version"]:
            archive.writestr(name, pickled(voice_dict()))
    assert "data.pkl" in refusal(tmp_path / "a.pt")


def test_every_cut_and_flipped_byte_is_read_or_refused(tmp_path):
    """Nothing but PplexError comes out of a damaged file."""
    path = write_pt(tmp_path / "a.pt", pickled(voice_dict()), voice_entries())
    write_voice_file(tmp_path / "a.safetensors", EMBEDDINGS[:, 0, 0], CACHE[0])
    rng = np.random.default_rng(1)
    for source in (path, tmp_path / "a.safetensors"):
        content = source.read_bytes()
        damaged = source.with_name(f"damaged{source.suffix}")
        for cut in rng.integers(0, len(content), 60):
            damaged.write_bytes(content[:cut])
            refusal(damaged)
        for position in rng.integers(0, len(content), 300):
            changed = bytearray(content)
            changed[position] ^= 1 << int(rng.integers(8))
            damaged.write_bytes(changed)
            try:
                read_voice_file(damaged)
            except PplexError:
                pass


DATA_BYTES = EMBEDDINGS.tobytes() + CACHE.astype("<f4").tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"embeddings": entry("F32", [3, 1, 1, 8], 0, 92)},
        {"embeddings": entry("F32", [3, 1, 1, 8], 1000, 1096)},
        {"embeddings": entry("F32", [3, 1, 1, 8], -4, 92)},
        {"embeddings": entry("F32", [3, 1, 1, 1 << 40], 0, 12 << 40)},
        {"embeddings": entry("F32", [3, 8], 0, 96)},
        {"embeddings": entry("F32", [0, 1, 1, 8], 0, 0)},
        {"embeddings": entry("I32", [3, 1, 1, 8], 0, 96)},
        {"embeddings": entry("F64", [3, 1, 1, 4], 0, 96)},
        {"embeddings": entry("F32", [3, 1, 1, True], 0, 12)},
        {"embeddings": None},
        {"embeddings": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"cache": entry("F32", [17, 4], 96, 368)},
        {"cache": entry("F32", [1, 4, 17], 96, 368)},
        {"cache": entry("F32", [1, 17, 4], 0, 272)},
    ],
)
def test_broken_safetensors_are_refused(tmp_path, change):
    header = {**safetensors_header(), **change}
    refusal(write_safetensors(tmp_path / "a.safetensors", header, DATA_BYTES))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 9) + b"not json!",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
)
def test_broken_safetensors_headers_are_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    refusal(tmp_path / "a.safetensors")


def test_other_files_are_no_voices(tmp_path):
    assert "does not exist" in refusal(tmp_path / "a.pt")
    (tmp_path / "a.wav").write_bytes(b"")
    assert "not a voice" in refusal(tmp_path / "a.wav")


# Finding and unpacking.


def write_tgz(folder: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "voices.tgz", "w:gz") as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    return folder


def member(name: str, content: bytes = b"x", **fields: object):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def test_voices_are_unpacked_once_into_the_users_cache(own_cache):
    voices = find_voices(TGZ.parent)
    assert list(voices) == ["NATF0", "NATM0"]
    assert all(own_cache in path.parents for path in voices.values())
    assert voices["NATF0"].stat().st_size == 8469
    changed = {path: path.stat().st_mtime_ns for path in voices.values()}
    assert find_voices(TGZ.parent) == voices
    assert {path: path.stat().st_mtime_ns for path in voices.values()} == changed
    folder = voices["NATF0"].parent
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_voices_beside_a_weight_file_are_found():
    assert list(find_voices(SPLIT / "temporal.safetensors")) == ["NATF0", "NATM0"]


def test_a_voices_folder_wins_and_safetensors_come_first(tmp_path):
    (tmp_path / "voices").mkdir()
    for name in ("B.pt", "A.pt", "A.safetensors", ".hidden.pt", "readme.txt"):
        (tmp_path / "voices" / name).write_bytes(b"")
    write_tgz(tmp_path, [member("voices/C.pt")])
    found = {name: path.name for name, path in find_voices(tmp_path).items()}
    assert found == {"A": "A.safetensors", "B": "B.pt"}
    assert list(found) == ["A", "B"]


def test_a_checkpoint_without_voices_has_none(tmp_path):
    assert find_voices(tmp_path) == {}


def test_only_voices_are_unpacked(tmp_path):
    folder = write_tgz(
        tmp_path,
        [
            member("voices", b"", type=tarfile.DIRTYPE),
            member("voices/A.pt"),
            member("./voices/B.safetensors"),
            member("voices/._A.pt"),
            member("voices/readme.txt"),
        ],
    )
    voices = find_voices(folder)
    assert list(voices) == ["A", "B"]
    assert len(list(voices["A"].parent.iterdir())) == 2


@pytest.mark.parametrize(
    "bad",
    [
        member("../A.pt"),
        member("voices/../../A.pt"),
        member("/tmp/A.pt"),
        member("..\\A.pt"),
        member("voices/A.pt", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("voices/A.pt", b"", type=tarfile.LNKTYPE, linkname="voices/B.pt"),
        member("voices/A.pt", b"", type=tarfile.CHRTYPE),
        member("voices/A.pt", b"", type=tarfile.FIFOTYPE),
        member("voices/B.pt"),
    ],
    ids=lambda m: f"{m[0].name}-{m[0].type.decode()}",
)
def test_a_tar_that_could_do_harm_is_refused_whole(tmp_path, own_cache, bad):
    folder = write_tgz(tmp_path / "model", [member("voices/B.pt"), bad])
    with pytest.raises(PplexError, match="voices.tgz is refused"):
        find_voices(folder)
    assert [p for p in own_cache.rglob("*") if p.is_file()] == []
    assert [p.name for p in (own_cache / "pplex" / "voices").iterdir()] == []


@pytest.mark.parametrize("limit", ["MAX_UNPACKED_BYTES", "MAX_VOICE_BYTES"])
def test_a_tar_bomb_is_refused(tmp_path, monkeypatch, limit):
    folder = write_tgz(tmp_path, [member("voices/A.pt", bytes(500_000))])
    monkeypatch.setattr(unpack, limit, 100_000)
    with pytest.raises(PplexError, match="refused"):
        find_voices(folder)


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    folder = write_tgz(tmp_path, [member(f"voices/{i}.pt") for i in range(5)])
    monkeypatch.setattr(unpack, "MAX_MEMBERS", 4)
    with pytest.raises(PplexError, match="too many"):
        find_voices(folder)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
def test_a_truncated_archive_leaves_nothing(tmp_path, own_cache, keep):
    content = TGZ.read_bytes()
    size = int(keep * len(content)) if isinstance(keep, float) else keep
    (tmp_path / "voices.tgz").write_bytes(content[:size])
    with pytest.raises(PplexError, match="download it again"):
        find_voices(tmp_path)
    assert [p for p in own_cache.rglob("*") if p.is_file()] == []


def test_what_is_no_archive_is_refused(tmp_path):
    for content in (b"text", gzip.compress(b"text"), gzip.compress(b"")):
        (tmp_path / "voices.tgz").write_bytes(content)
        with pytest.raises(PplexError, match="voices.tgz"):
            find_voices(tmp_path)


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(PplexError, match="cannot be unpacked"):
        find_voices(TGZ.parent)


def test_the_hand_made_pickles_name_what_torch_names():
    with zipfile.ZipFile(find_voices(TGZ.parent)["NATF0"]) as archive:
        reference = archive.read("NATF0/data.pkl")
    made = pickled(voice_dict())
    for name in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"):
        assert name in reference
        assert name in made


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_header_that_would_fill_the_memory_is_not_read(tmp_path, kind):
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 500 << 20
    path = tmp_path / "voices.tgz"
    path.write_bytes(gzip.compress(header.tobuf() + b"a" * 4096))
    with pytest.raises(PplexError, match="header of 524288000 bytes"):
        unpack.unpack_voices(path)


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_files_are_no_voices(tmp_path, form):
    """Their lists of holes may be longer than the archive."""
    member = tarfile.TarInfo("a.pt")
    member.size = 512
    if form == "gnu":
        member.type = tarfile.GNUTYPE_SPARSE
    else:
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        member.pax_headers["GNU.sparse.name"] = "a.pt"
    path = tmp_path / "voices.tgz"
    content = member.tobuf(tarfile.PAX_FORMAT) + b"1\n" * 256 + bytes(1024)
    path.write_bytes(gzip.compress(content))
    with pytest.raises(PplexError, match="sparse"):
        unpack.unpack_voices(path)
