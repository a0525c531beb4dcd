"""Make twins of the published repositories: their files, with random weights.

Names, nesting, types, headers and ``config.json`` are the published ones; the sizes are
small, or the 7B's. All repositories of a seed and a size hold the same model, quantized
or not, with 8 or 16 depformer steps. A sparse file has its header and its length, and
zeros that take no room on the disk. As a script:

    python tests/twins.py FOLDER 8bit
    python tests/twins.py FOLDER 4bit --size 7b
    python tests/twins.py FOLDER bf16 --size 7b --sparse
"""

from __future__ import annotations

import argparse
import functools
import gzip
import io
import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from random_checkpoint import mimi_arrays, tokenizer_bytes
from test_voices import pickled, tensor

from pplex.checkpoint.codec_layout import published_shapes
from pplex.checkpoint.safetensors import TensorSpec, narrow_bfloat16, write_tensors
from pplex.model.config import (
    CodecTransformerConfig,
    LmConfig,
    MimiConfig,
    ModelConfig,
    QuantizerConfig,
    SeanetConfig,
)

CONFIGS = Path(__file__).parent / "data" / "published"
CODEC = "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER = "tokenizer_spm_32k_3.model"
TOKENIZER_BYTES = 552_778
VOICES_BYTES = 6_095_521  # of voices.tgz

# Narrow and of few layers; cards, windows and delays are the published ones. The two
# feed-forwards are as wide in proportion, which flat configs take for granted.
SMALL = ModelConfig(
    lm=LmConfig(
        dim=64,
        num_heads=2,
        num_layers=2,
        hidden_dim=128,
        text_card=512,
        depformer_dim=64,
        depformer_num_heads=2,
        depformer_num_layers=2,
        depformer_hidden_dim=128,
    ),
    mimi=MimiConfig(
        seanet=SeanetConfig(n_filters=4, dimension=32),
        transformer=CodecTransformerConfig(
            d_model=32, num_heads=2, num_layers=2, dim_feedforward=64
        ),
        quantizer=QuantizerConfig(dimension=8),
    ),
)
SIZES = {"small": SMALL, "7b": ModelConfig()}

# How many frames each voice's embeddings have.
VOICES = {
    **{"NATF0": 51, "NATF1": 48, "NATF2": 51, "NATF3": 51},
    **{"NATM0": 50, "NATM1": 51, "NATM2": 50, "NATM3": 46},
    **{"VARF0": 68, "VARF1": 50, "VARF2": 51, "VARF3": 62, "VARF4": 57},
    **{"VARM0": 43, "VARM1": 46, "VARM2": 69, "VARM3": 46, "VARM4": 55},
}


@dataclass(frozen=True)
class Repo:
    """A published repository.

    ``layout`` is pytorch, split or sliced (the names of ``moshi_mlx``); ``voices`` the
    name of an archive or a folder, or None.
    """

    name: str
    layout: str
    voices: str | None
    revision: str = 40 * "1"
    steps: int = 16
    bits: int = 16
    group_size: int = 64
    weights: str = "model.safetensors"
    more: tuple[str, ...] = ()

    @property
    def codec(self) -> str:
        """The codec's file."""
        return "mimi.safetensors" if self.layout == "split" else CODEC


_TGZ, _SPLIT = "voices.tgz", "voices"
REPOS = {
    "bf16": Repo(
        "nvidia/personaplex-7b-v1",
        "pytorch",
        _TGZ,
        "fdaf4090a61cb315c138a1faee287ffd6c716309",
        more=("dist.tgz",),
    ),
    "8bit": Repo(
        "aufklarer/PersonaPlex-7B-MLX-8bit",
        "split",
        _SPLIT,
        "170375ccea23be9950ca0a611cf2a47b2a452540",
        bits=8,
    ),
    # Voices in a folder of the folder were left by an early converter.
    "4bit": Repo(
        "aufklarer/PersonaPlex-7B-MLX-4bit",
        "split",
        _SPLIT,
        bits=4,
        more=("voices/voices/NATF0.pt",),
    ),
    "personaplex-rl": Repo(
        "kyutai/personaplex-rl-seamless",
        "pytorch",
        _TGZ,
        "3fa800309a4b743a8a6d764253eb45def0334afc",
    ),
    "moshika-rl": Repo("kyutai/moshika-rl-seamless", "pytorch", None, steps=8),
    "moshiko-q4": Repo(
        "kyutai/moshiko-mlx-q4",
        "sliced",
        None,
        steps=8,
        bits=4,
        group_size=32,
        weights="model.q4.safetensors",
    ),
    "moshiko-q8": Repo(
        "kyutai/moshiko-mlx-q8",
        "sliced",
        None,
        steps=8,
        bits=8,
        weights="model.q8.safetensors",
    ),
    "moshiko-bf16": Repo("kyutai/moshiko-mlx-bf16", "sliced", None, steps=8),
}


# The tensors of the language model, as the published files name them.


def published_names(lm: LmConfig, steps: int) -> dict[str, tuple[int, ...]]:
    """The names of NVIDIA's file, and their shapes."""
    d, e = lm.dim, lm.depformer_dim
    shapes: dict[str, tuple[int, ...]] = {
        "text_emb.weight": (lm.text_card + 1, d),
        "text_linear.weight": (lm.text_card, d),
        "out_norm.alpha": (1, 1, d),
        "depformer_text_emb.weight": (lm.text_card + 1, e),
    }
    for i in range(lm.n_q):
        shapes[f"emb.{i}.weight"] = (lm.card + 1, d)
    for i in range(lm.num_layers):
        layer = f"transformer.layers.{i}"
        shapes |= _layer(layer, d, 1)
        shapes |= _gating(f"{layer}.gating", d, lm.hidden_dim)
    for s in range(steps):
        shapes[f"depformer_in.{s}.weight"] = (e, d)
        shapes[f"linears.{s}.weight"] = (lm.card, e)
        if s:
            shapes[f"depformer_emb.{s - 1}.weight"] = (lm.card + 1, e)
    for m in range(lm.depformer_num_layers):
        layer = f"depformer.layers.{m}"
        shapes |= _layer(layer, e, steps)
        for s in range(steps):
            shapes |= _gating(f"{layer}.gating.{s}", e, lm.depformer_hidden_dim)
    return shapes


def _layer(name: str, dim: int, steps: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.self_attn.in_proj_weight": (steps * 3 * dim, dim),
        f"{name}.self_attn.out_proj.weight": (steps * dim, dim),
        f"{name}.norm1.alpha": (1, 1, dim),
        f"{name}.norm2.alpha": (1, 1, dim),
    }


def _gating(name: str, dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.linear_in.weight": (2 * hidden, dim),
        f"{name}.linear_out.weight": (dim, hidden),
    }


@dataclass(frozen=True)
class _Place:
    """A matrix or norm of a file: its name there, and which of NVIDIA's it is.

    ``steps`` are the depformer steps, from and to, whose rows it has of a stacked one.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    steps: tuple[int, int] | None = None


def _places(repo: Repo, lm: LmConfig) -> dict[str, list[_Place]]:
    """What each file of weights holds."""
    files: dict[str, list[_Place]] = {}
    for source, shape in published_names(lm, repo.steps).items():
        if repo.layout == "split":
            file, name = _split_name(source)
            files.setdefault(file, []).append(_Place(name, shape, source))
            continue
        places = files.setdefault(repo.weights, [])
        if repo.layout == "pytorch":
            stacked = source.startswith("depformer.layers.") and "self_attn" in source
            steps = (0, repo.steps) if stacked else None
            places.append(_Place(source, shape, source, steps))
        else:
            places += _slices(source, shape, repo.steps)
    return files


def _split_name(name: str) -> tuple[str, str]:
    if name.startswith(("transformer.", "out_norm.")):
        return "temporal.safetensors", name.removeprefix("transformer.")
    if name.startswith(("depformer.", "depformer_in.")):
        return "depformer.safetensors", name.removeprefix("depformer.")
    return "embeddings.safetensors", name


def _slices(source: str, shape: tuple[int, ...], steps: int) -> Iterator[_Place]:
    """Where ``moshi_mlx`` has a tensor of NVIDIA's: once, or in a slice a step."""
    name = source.replace(".alpha", ".weight").replace(
        "in_proj_weight", "in_proj.weight"
    )
    shape = shape[-1:] if source.endswith(".alpha") else shape
    rest = re.fullmatch(r"depformer\.(layers\.\d+\.)gating\.(\d+)\.(.+)", name)
    if rest:
        name = f"depformer.slices.{rest[2]}.transformer.{rest[1]}gating.{rest[3]}"
        yield _Place(name, shape, source)
    elif name.startswith("depformer.layers."):
        inner = name.removeprefix("depformer.")
        stacked = len(shape) == 2
        for s in range(steps):
            rows = (shape[0] // steps, shape[1]) if stacked else shape
            target = f"depformer.slices.{s}.transformer.{inner}"
            yield _Place(target, rows, source, (s, s + 1) if stacked else None)
    else:
        for pattern, target in (
            (r"emb\.(\d+)\.", "audio_embs.{}."),
            (r"depformer_in\.(\d+)\.", "depformer.slices.{}.linear_in."),
            (r"linears\.(\d+)\.", "depformer.slices.{}.linear_out."),
            (r"depformer_text_emb\.", "depformer.slices.0.emb."),
        ):
            if found := re.match(pattern, name):
                name = target.format(*found.groups()) + name[found.end() :]
                break
        if found := re.match(r"depformer_emb\.(\d+)\.", name):
            name = f"depformer.slices.{int(found[1]) + 1}.emb.weight"
        yield _Place(name, shape, source)


def _is_quantized(repo: Repo, place: _Place) -> bool:
    if repo.bits == 16 or len(place.shape) != 2:
        return False
    tables = _split_name(place.source)[0] == "embeddings.safetensors"
    return repo.layout == "sliced" or not tables


def _part(name: str, part: str) -> str:
    """``weight`` at the end of a name, or ``in_proj_weight``, as another part."""
    return name.removesuffix("weight") + part


# Values.


class Weights:
    """Random weights by NVIDIA's names: the same ones for every layout."""

    def __init__(self, lm: LmConfig, seed: int) -> None:
        self.lm, self.seed = lm, seed
        self.shapes = published_names(lm, lm.dep_q)
        self._latest = functools.lru_cache(2)(self._make)

    def matrix(self, source: str, steps: tuple[int, int] | None = None) -> mx.array:
        """A tensor in bfloat16, or the rows of some depformer steps of it."""
        whole = self._latest(source)
        if steps is None:
            return whole
        rows = whole.shape[0] // self.lm.dep_q
        return whole[steps[0] * rows : steps[1] * rows]

    @functools.cached_property
    def tables(self) -> list[mx.array]:
        """The tables whose rows make the temporal transformer's input."""
        names = [f"emb.{i}.weight" for i in range(self.lm.n_q)]
        return [self._make(name) for name in [*names, "text_emb.weight"]]

    def _make(self, name: str) -> mx.array:
        shape = self.shapes[name]
        key = mx.random.key(zlib.crc32(f"{self.seed} {name}".encode()))
        noise = mx.random.normal(shape, key=key)
        if name.endswith("alpha"):
            values = 1 + 0.2 * noise
        elif "emb" in name:
            values = 0.3 * noise
        else:  # logits as far apart as a trained model's
            gains = {"text_linear": 6.0, "linears": 3.0}
            values = gains.get(name.split(".")[0], 1.0) / shape[1] ** 0.5 * noise
        made = values.astype(mx.bfloat16)
        mx.eval(made)
        return made


def _specs(
    repo: Repo, places: list[_Place]
) -> Iterator[tuple[TensorSpec, _Place, str]]:
    """The tensors of a file, in the order in which safetensors writes them."""
    floats = "F16" if repo.layout == "split" else "BF16"
    found = []
    for place in places:
        if not _is_quantized(repo, place):
            found.append((TensorSpec(place.name, floats, place.shape), place, "dense"))
            continue
        rows, columns = place.shape
        packed = (rows, columns * repo.bits // 32)
        groups = (rows, columns // repo.group_size)
        for part, dtype, shape in (
            ("weight", "U32", packed),
            ("scales", floats, groups),
            ("biases", floats, groups),
        ):
            spec = TensorSpec(_part(place.name, part), dtype, shape)
            found.append((spec, place, part))
    return iter(sorted(found, key=lambda f: (f[0].dtype != "U32", f[0].name)))


def _arrays(
    repo: Repo, specs: list[tuple[TensorSpec, _Place, str]], weights: Weights
) -> Iterator[mx.array]:
    floats = mx.float16 if repo.layout == "split" else mx.bfloat16
    kept: dict[tuple[str, str], mx.array] = {}
    for spec, place, part in specs:
        if (place.name, part) not in kept:
            dense = weights.matrix(place.source, place.steps).astype(floats)
            if part == "dense":
                yield dense.reshape(spec.shape)
                continue
            triple = mx.quantize(dense, group_size=repo.group_size, bits=repo.bits)
            mx.eval(triple)
            parts = ("weight", "scales", "biases")
            kept |= {(place.name, p): a for p, a in zip(parts, triple, strict=True)}
        yield kept.pop((place.name, part))


def _voice(name: str, config: ModelConfig, weights: Weights) -> tuple[Any, Any]:
    """A voice as the reference keeps it: bfloat16 (T, 1, 1, dim) as float32, ring.

    The agent's codes are random. Column 0 has the initial ids, later ones the codes of
    the frame before, or of two frames before where a stream is delayed.
    """
    lm, frames = config.lm, VOICES[name]
    rng = np.random.default_rng(zlib.crc32(f"{weights.seed} {name}".encode()))
    codes = rng.integers(0, lm.card, (lm.n_q, frames + 1))
    codes[lm.num_codebooks :] = np.array(config.sine_codes)[:, None]
    columns = np.full((lm.num_streams, frames + 2), lm.card)
    columns[0] = 3
    columns[0, 0] = lm.text_card
    for row, delay in list(enumerate(lm.delays))[1:]:
        columns[row, 1 + delay :] = codes[row - 1, : frames + 1 - delay]
    total = np.zeros((frames, lm.dim), np.float32)
    order = [*range(1, lm.num_streams), 0]
    for table, row in zip(weights.tables, order, strict=True):
        rows = table[mx.array(columns[row, :frames])]
        total = _rounded(total + np.array(rows.astype(mx.float32)))
    ring = np.zeros((1, lm.num_streams, 4), np.int64)
    for column in range(frames - 2, frames + 1):
        ring[0, :, column % 4] = columns[:, column]
    last = (frames + 1) % 4
    ring[0, :, last] = columns[:, frames - 3]
    delayed = np.array(lm.delays) > 0
    ring[0, delayed, last] = columns[delayed, frames + 1]
    return total.reshape(frames, 1, 1, lm.dim), ring


def _rounded(values: np.ndarray) -> np.ndarray:
    return (narrow_bfloat16(values).astype(np.uint32) << 16).view(np.float32)


# Files.


def write_twin(
    folder: Path,
    repo: Repo,
    config: ModelConfig = SMALL,
    *,
    sparse: bool = False,
    seed: int = 0,
) -> None:
    """Write every file of ``repo`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    weights: Weights = (_Zeros if sparse else Weights)(config.lm, seed)
    for file, places in _places(repo, config.lm).items():
        specs = list(_specs(repo, places))
        if sparse:
            write_sparse(folder / file, [spec for spec, _, _ in specs])
        else:
            arrays = _arrays(repo, specs, weights)
            write_tensors(folder / file, [spec for spec, _, _ in specs], arrays)
    _write_codec(folder / repo.codec, config.mimi, sparse)
    tokenizer = tokenizer_bytes(config.lm.text_card)
    if config.lm.text_card == ModelConfig().lm.text_card:
        tokenizer = _padded(tokenizer, TOKENIZER_BYTES)
    (folder / TOKENIZER).write_bytes(tokenizer)
    text = config_text(repo, config)
    if text is not None:
        (folder / "config.json").write_text(text)
    if repo.voices is not None:
        _write_voices(folder, repo, config, weights)
    for name in ("README.md", ".gitattributes", *repo.more):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for pplex\n")


class _Zeros(Weights):
    """Nothing but zeros."""

    def _make(self, name: str) -> mx.array:
        return mx.broadcast_to(mx.array(0, mx.bfloat16), self.shapes[name])


def write_sparse(path: Path, specs: list[TensorSpec]) -> None:
    """A safetensors file of zeros with the header and length that ``specs`` give."""
    header, end = {}, 0
    for spec in specs:
        offsets = [end, end + spec.num_bytes]
        end = offsets[1]
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": offsets,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _write_codec(path: Path, config: MimiConfig, sparse: bool) -> None:
    shapes = published_shapes(config)
    for name in list(shapes):
        if name.endswith("cluster_usage"):
            shapes[name.replace("cluster_usage", "_initialized")] = (1,)
    specs = [TensorSpec(name, "F32", shapes[name]) for name in sorted(shapes)]
    if sparse:
        write_sparse(path, specs)
    else:
        mx.random.seed(0)
        arrays = mimi_arrays(config)
        write_tensors(path, specs, [arrays[spec.name] for spec in specs])


def _padded(model: bytes, size: int) -> bytes:
    """A SentencePiece model with a field nobody reads, of ``size`` bytes in all."""
    left = size - len(model) - 2  # the field's number, 300, takes two bytes
    length = next(n for n in range(1, 5) if left - n < 1 << 7 * n)
    left -= length
    varint = bytes(
        left >> 7 * i & 127 | (128 if i < length - 1 else 0) for i in range(length)
    )
    return model + bytes([0xE2, 0x12]) + varint + bytes(left)


def config_text(repo: Repo, config: ModelConfig = SMALL) -> str | None:
    """``config.json``: the published one word for word, if the sizes are the 7B's.

    Of another size, the published keys have that size's values, and ``explicit`` says
    what has no key there.
    """
    path = CONFIGS / f"{repo.name.split('/')[1]}.json"
    if config == ModelConfig():
        return path.read_text() if path.is_file() else None
    raw = json.loads(path.read_text()) if path.is_file() else {}
    lm = config.lm
    sizes = {
        "dim": lm.dim,
        "num_layers": lm.num_layers,
        "num_heads": lm.num_heads,
        "hidden_scale": 1.5 * lm.hidden_dim / lm.dim,
        "text_card": lm.text_card,
    }
    depformer = {
        "dim": lm.depformer_dim,
        "num_layers": lm.depformer_num_layers,
        "num_heads": lm.depformer_num_heads,
    }
    explicit: dict[str, Any] = {"mimi": asdict(config.mimi)}
    if "temporal" in raw:
        hidden = {"dim_feedforward": lm.depformer_hidden_dim}
        raw["temporal"] |= sizes
        raw["depformer"] |= depformer | hidden | {"text_card": lm.text_card}
    elif "dim" in raw:
        raw |= sizes | {f"depformer_{key}": size for key, size in depformer.items()}
    else:
        hidden = {"depformer_dim_feedforward": 3 * lm.depformer_hidden_dim // 2}
        steps = {f"depformer_{key}": size for key, size in depformer.items()}
        explicit["lm"] = sizes | steps | hidden
    return json.dumps(raw | {"explicit": explicit}, indent=2)


def _write_voices(
    folder: Path, repo: Repo, config: ModelConfig, weights: Weights
) -> None:
    if repo.voices == _SPLIT:
        (folder / _SPLIT).mkdir(exist_ok=True)
        for name in VOICES:
            embeddings, ring = _voice(name, config, weights)
            specs = [
                TensorSpec("cache", "F32", ring.shape),
                TensorSpec("embeddings", "F16", embeddings.shape),
            ]
            arrays = [ring.astype(np.float32), embeddings.astype(np.float16)]
            path = folder / _SPLIT / f"{name}.safetensors"
            write_tensors(path, specs, arrays)
        return
    content = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=content, mode="wb", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        top = tarfile.TarInfo("voices")
        top.type = tarfile.DIRTYPE
        tar.addfile(top)
        for name in VOICES:
            voice = voice_pt(name, *_voice(name, config, weights))
            member = tarfile.TarInfo(f"voices/{name}.pt")
            member.size = len(voice)
            tar.addfile(member, io.BytesIO(voice))
    # gzip passes over zeros at the end.
    padding = VOICES_BYTES - content.tell() if config == ModelConfig() else 0
    (folder / _TGZ).write_bytes(content.getvalue() + bytes(max(0, padding)))


def voice_pt(name: str, embeddings: np.ndarray, ring: np.ndarray) -> bytes:
    """A voice as ``torch.save`` writes it, with bfloat16 and int64."""
    content = io.BytesIO()
    table = {
        "embeddings": tensor("BFloat16Storage", "0", embeddings.shape),
        "cache": tensor("LongStorage", "1", ring.shape),
    }
    with zipfile.ZipFile(content, "w") as archive:
        for entry, data in (
            ("data.pkl", pickled(table)),
            ("byteorder", b"little"),
            ("data/0", narrow_bfloat16(embeddings).astype("<u2").tobytes()),
            ("data/1", ring.astype("<i8").tobytes()),
            ("version", b"3\n"),
        ):
            archive.writestr(f"{name}/{entry}", data)
    return content.getvalue()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make a twin of a published folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("repo", choices=REPOS)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--sparse", action="store_true", help="zeros, on no room")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_twin(
        args.folder,
        REPOS[args.repo],
        SIZES[args.size],
        sparse=args.sparse,
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
