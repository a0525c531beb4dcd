"""What a model on disk is made of, what of it is unused, what a frame costs with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pplex.checkpoint.codec_layout import published_shapes
from pplex.checkpoint.config import unknown_keys
from pplex.checkpoint.folder import CheckpointFolder
from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.known import KNOWN_MODELS, known_repo
from pplex.checkpoint.layouts import form_name, unneeded
from pplex.checkpoint.safetensors import read_specs
from pplex.checkpoint.source import Source
from pplex.checkpoint.voices import find_voices
from pplex.errors import PplexError
from pplex.model.config import ModelConfig
from pplex.units import some

_KV_ITEM_BYTES = 2  # keys and values in 16 bits, as on a GPU

_TABLES = r"text_emb|audio_emb|depformer\.(text|audio)_emb"


@dataclass(frozen=True)
class PartInfo:
    """A part of the language model: its matrices in one form."""

    part: str
    form: str
    dtype: str
    matrices: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class ModelInfo:
    """A model on disk; sizes in bytes; ``licence`` that of its weights, if known.

    ``bytes_per_frame`` are the weights of the language model that a frame of a
    conversation reads, ``codec_bytes_per_frame`` those of the codec,
    ``kv_bytes_per_frame`` what it remembers of a frame and reads again in each later
    one, for ``context`` frames at most.
    """

    name: str
    path: str
    repo: str | None
    revision: str | None
    licence: str | None
    layout: str
    depformer_steps: int
    parameters: int
    lm_bytes: int
    codec_bytes: int
    bytes_per_frame: int
    codec_bytes_per_frame: int
    kv_bytes_per_frame: int
    context: int
    frame_rate: float
    parts: list[PartInfo]
    voices: list[str]

    @property
    def memory_bytes(self) -> int:
        """Weights, codec, and a full memory of the conversation."""
        return self.lm_bytes + self.codec_bytes + self.kv_bytes_per_frame * self.context

    def least_frame_ms(self, bandwidth_gbs: float, remembered: int = 0) -> float:
        """Milliseconds a frame takes at least where reading memory is what takes time.

        ``bandwidth_gbs`` in GB a second; ``remembered`` frames are in the cache.
        """
        kept = min(remembered, self.context) * self.kv_bytes_per_frame
        total = self.bytes_per_frame + self.codec_bytes_per_frame + kept
        return total / bandwidth_gbs / 1e6


def describe(local: LocalModel) -> ModelInfo:
    """Read the headers of a model's files."""
    folder = local.folder
    config = folder.read_config()
    source = Source(local.folder, config.lm)
    lm, known = config.lm, KNOWN_MODELS.get(local.name) or known_repo(local.repo)
    codec, codec_frame = _codec_bytes(folder, config)
    return ModelInfo(
        name=local.name,
        path=str(local.path),
        repo=local.repo,
        revision=local.revision,
        licence=known.licence if known else None,
        layout=source.layout,
        depformer_steps=source.steps,
        parameters=sum(stored.num_values for stored in source.matrices),
        lm_bytes=source.num_bytes,
        codec_bytes=codec,
        bytes_per_frame=bytes_per_frame(source),
        codec_bytes_per_frame=codec_frame,
        kv_bytes_per_frame=config.kv_bytes(_KV_ITEM_BYTES),
        context=lm.context,
        frame_rate=config.frame_rate,
        parts=_parts(source),
        voices=list(find_voices(local.path)),
    )


def bytes_per_frame(source: Source) -> int:
    """Bytes of weights that a frame of a conversation reads, as they are stored.

    Each is read once; the tables are not, but for a few rows; nor is what belongs to
    depformer steps that predict the user.
    """
    kept = source.config.num_codebooks
    total = 0
    for stored in source.matrices:
        targets = stored.matrix.targets
        if re.match(_TABLES, targets[0] or ""):
            continue
        used = [t for t in targets if _step(t or "") < kept]
        norm = len(stored.matrix.shape) == 1
        share = bool(used) if norm else len(used) / len(targets)
        total += round(stored.num_bytes * share)
    return total


def _step(target: str) -> int:
    match = re.match(r"depformer\.(?:steps\.|input\[)(\d+)", target)
    return int(match[1]) if match else 0


def _parts(source: Source) -> list[PartInfo]:
    groups: dict[tuple[str, str, str], list[int]] = {}
    for stored in source.matrices:
        if len(stored.matrix.shape) == 1:
            part = "norms"
        else:
            target = (stored.matrix.targets[0] or "").split("[")[0]
            target = re.sub(r"^layers\.\d+", "temporal", target)
            part = re.sub(
                r"^depformer\.steps\.\d+(\.layers\.\d+)?", "depformer", target
            )
        specs = stored.specs
        dtype = specs["scales" if "scales" in specs else "weight"].dtype
        key = (part, form_name(stored.form) if stored.form else "-", dtype)
        sums = groups.setdefault(key, [0, 0, 0])
        for i, more in enumerate((1, stored.num_values, stored.num_bytes)):
            sums[i] += more
    return [PartInfo(*key, *sums) for key, sums in groups.items()]


def _codec_bytes(folder: CheckpointFolder, config: ModelConfig) -> tuple[int, int]:
    """Bytes of the codec's file, and of what a frame reads of it."""
    try:
        path = folder.codec
    except PplexError:  # a file of weights alone can be looked at too
        return 0, 0
    total = used = 0
    for name, spec in read_specs(path).items():
        total += spec.num_bytes
        match = re.match(r"quantizer\.rvq_(first|rest)\.vq\.layers\.(\d+)\.", name)
        if match and int(match[2]) >= config.mimi.num_codebooks - 1:
            continue
        used += spec.num_bytes
    return total, used


def ignored(folder: CheckpointFolder) -> Iterator[tuple[str, str]]:
    """What is passed over, and in which file: keys, tensors of no part of the model.

    A language model that cannot be used raises.
    """
    if keys := unknown_keys(folder.config_file):
        yield folder.config_file.name, _unused("keys", keys)
    config = folder.read_config()
    for file, names in Source(folder, config.lm).unneeded.items():
        if names:
            yield file.name, _unused("tensors", names)
    try:
        codec = read_specs(folder.codec)
    except PplexError:  # for those to say who want one
        return
    if names := unneeded(codec, published_shapes(config.mimi)):
        yield folder.codec.name, _unused("tensors", names)


def _unused(what: str, names: Sequence[str]) -> str:
    shown = some([f"`{name[:80]}`" for name in names])
    return f"{what} that nothing here needs are ignored: {shown}"
