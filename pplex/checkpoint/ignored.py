"""What a model's files have that is not used here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pplex.checkpoint.codec_layout import published_shapes
from pplex.checkpoint.config import unknown_keys
from pplex.checkpoint.folder import CheckpointFolder
from pplex.checkpoint.layouts import unneeded
from pplex.checkpoint.safetensors import read_specs
from pplex.checkpoint.source import Source
from pplex.errors import PplexError


def ignored(folder: CheckpointFolder) -> Iterator[tuple[str, str]]:
    """What is passed over, and in which file: keys, tensors of no part of the model.

    A language model that cannot be used raises.
    """
    if keys := unknown_keys(folder.config_file):
        yield folder.config_file.name, _say("keys", keys)
    config = folder.read_config()
    for file, names in Source(folder, config.lm).unneeded.items():
        if names:
            yield file.name, _say("tensors", names)
    try:
        codec = read_specs(folder.codec)
    except PplexError:  # for those to say who want one
        return
    if names := unneeded(codec, published_shapes(config.mimi)):
        yield folder.codec.name, _say("tensors", names)


def _say(what: str, names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name[:80]}`" for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what} that nothing here needs are ignored: {shown}{more}"
