"""Which files of a repository or folder a model is made of.

* Split MLX layout: temporal, depformer, embeddings and mimi.safetensors.
* Otherwise one file of weights: model.q8.safetensors, else model.q4.safetensors, else
  model.safetensors, else the only other .safetensors file at the top. Quantized files
  come first because a repository that has them means them to be run.

Both need Mimi and the text tokenizer; config.json and voices are taken where they are.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

SPLIT_FILES = (
    "temporal.safetensors",
    "depformer.safetensors",
    "embeddings.safetensors",
)
SINGLE_FILES = ("model.q8.safetensors", "model.q4.safetensors", "model.safetensors")
MIMI_PATTERNS = ("mimi.safetensors", "tokenizer-*.safetensors")
TOKENIZER_PATTERN = "tokenizer_spm_*.model"
VOICE_PATTERNS = ("voices/*.safetensors", "voices/*.pt")


class IncompleteError(Exception):
    """Says, as the end of a sentence, what a list of files lacks to be a model."""


def needed_files(names: Iterable[str]) -> list[str]:
    """Pick from file names (relative, with slashes) those that the model needs."""
    present = sorted(names)
    mimi = next((n for p in MIMI_PATTERNS for n in _match(present, p)), None)
    needed = _weights(present)
    if mimi is None:
        raise IncompleteError(
            "the Mimi codec is missing (mimi.safetensors or tokenizer-*.safetensors)"
        )
    needed.append(mimi)
    tokenizers = _match(present, TOKENIZER_PATTERN)
    if not tokenizers:
        raise IncompleteError(f"the text tokenizer is missing ({TOKENIZER_PATTERN})")
    needed.append(tokenizers[0])
    needed += _match(present, "config.json")
    voices = [n for p in VOICE_PATTERNS for n in _match(present, p)]
    return needed + (voices or _match(present, "voices.tgz"))


def _weights(present: list[str]) -> list[str]:
    if any(name in present for name in SPLIT_FILES):
        missing = [name for name in SPLIT_FILES if name not in present]
        if missing:
            raise IncompleteError(f"{' and '.join(missing)} missing")
        return list(SPLIT_FILES)
    for name in SINGLE_FILES:
        if name in present:
            return [name]
    others = [
        name
        for name in _match(present, "*.safetensors")
        if not any(fnmatchcase(name, pattern) for pattern in MIMI_PATTERNS)
    ]
    if len(others) != 1:
        found = f"found {', '.join(others[:3])}" if others else "found none"
        raise IncompleteError(
            f"its weights are not there: {' or '.join(SINGLE_FILES)} or "
            f"{SPLIT_FILES[0]} was expected, {found}"
        )
    return others


def _match(names: list[str], pattern: str) -> list[str]:
    """Names that fit a pattern whose stars do not reach into folders."""
    return [
        name
        for name in names
        if name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)
    ]
