"""Which files a model is made of, in a folder, a repository, or around one file.

* Split MLX layout: temporal, depformer and embeddings.safetensors.
* Otherwise one file of weights: model.q8.safetensors, else model.q4.safetensors, else
  model.safetensors, else the only other .safetensors file at the top. Quantized files
  come first because a repository that has them means them to be run.

Both need Mimi and the text tokenizer; config.json and voices are taken where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from pplex.checkpoint.config import load_config, tells_family
from pplex.errors import PplexError
from pplex.model.config import ModelConfig

SPLIT_PARTS = ("temporal", "depformer", "embeddings")
SPLIT_FILES = tuple(f"{part}.safetensors" for part in SPLIT_PARTS)
SINGLE_FILES = ("model.q8.safetensors", "model.q4.safetensors", "model.safetensors")
SPLIT_CODEC = "mimi.safetensors"
CONFIG_FILE = "config.json"
VOICES_FOLDER = "voices"
VOICES_ARCHIVE = "voices.tgz"
VOICE_SUFFIXES = (".safetensors", ".pt")

_CODECS = (SPLIT_CODEC, "tokenizer-*.safetensors")
_TOKENIZER = "tokenizer_spm_*.model"


class IncompleteError(Exception):
    """Says, as the end of a sentence, what a list of files lacks to be a model."""


def needed_files(names: Iterable[str]) -> list[str]:
    """Pick from file names (relative, with slashes) those that the model needs."""
    present = sorted(names)
    needed = [name for part in _PARTS for name in part(present)]
    return needed + _match(present, CONFIG_FILE) + _voice_files(present)


def _voice_files(names: list[str]) -> list[str]:
    """Pick from file names those of voices: files of their own, else the archive."""
    patterns = [f"{VOICES_FOLDER}/*{suffix}" for suffix in VOICE_SUFFIXES]
    voices = [name for pattern in patterns for name in _match(names, pattern)]
    return voices or _match(names, VOICES_ARCHIVE)


class CheckpointFolder:
    """A model on this machine: which file of it is what.

    A part that is missing is an error only for those who ask for it.
    """

    def __init__(self, path: Path) -> None:
        """``path`` is the folder, or the file in it to take the weights from."""
        self._weights = None if path.is_dir() else path
        self.path = path if path.is_dir() else path.parent

    @property
    def names(self) -> list[str]:
        """Names of files: at the top and in `voices`; no dead links."""
        places = [(self.path, ""), (self.path / VOICES_FOLDER, f"{VOICES_FOLDER}/")]
        return [
            prefix + path.name
            for place, prefix in places
            if place.is_dir()
            for path in sorted(place.iterdir())
            if path.is_file()
        ]

    @property
    def fault(self) -> str | None:
        """What is missing of a model, as the end of a sentence; None if nothing is."""
        parts = _PARTS if self._weights is None else _PARTS[1:]
        try:
            for part in parts:
                part(self.names)
        except IncompleteError as e:
            return str(e)
        return None

    @property
    def lm_files(self) -> list[Path]:
        """The language model: one file, or those of ``SPLIT_FILES``."""
        if self._weights is not None:
            return [self._weights]
        return self._find(lm_names)

    @property
    def codec(self) -> Path:
        """Mimi's weights."""
        return self._find(_codec_names)[0]

    @property
    def tokenizer(self) -> Path:
        """The SentencePiece model of the text."""
        return self._find(_tokenizer_names)[0]

    @property
    def config_file(self) -> Path:
        """Where config.json is, if there is one."""
        return self.path / CONFIG_FILE

    def read_config(self) -> ModelConfig:
        """The model's sizes.

        Where config.json does not say whose model it is, one of as many depformer steps
        as the agent has codebooks, without voices, is a Moshi, as Kyutai publishes it.
        """
        config = load_config(self.config_file)
        if not tells_family(self.config_file) and self._looks_like_moshi(config):
            return config.as_moshi()
        return config

    def _looks_like_moshi(self, config: ModelConfig) -> bool:
        # What these import takes long to load.
        from pplex.checkpoint.layouts import LAYOUTS
        from pplex.checkpoint.safetensors import read_specs

        try:
            names = [name for file in self.lm_files for name in read_specs(file)]
        except PplexError:  # for those to say who load it
            return False
        steps = max(layout.num_steps(names) for layout in LAYOUTS)
        # NVIDIA's loader takes PersonaPlex of so few steps with one table more.
        table = f"depformer_emb.{steps - 1}.weight"
        return (
            steps == config.lm.num_codebooks
            and not _voice_files(self.names)
            and table not in names
        )

    def _find(self, part: Callable[[list[str]], list[str]]) -> list[Path]:
        try:
            return [self.path / name for name in part(self.names)]
        except IncompleteError as e:
            raise PplexError(f"the model folder {self.path} is incomplete: {e}") from e


def lm_names(present: list[str]) -> list[str]:
    """Pick from file names those of the language model: ``SPLIT_FILES``, or one."""
    if any(name in present for name in SPLIT_FILES):
        missing = [name for name in SPLIT_FILES if name not in present]
        if missing:
            raise IncompleteError(f"{' and '.join(missing)} missing")
        return list(SPLIT_FILES)
    for name in SINGLE_FILES:
        if name in present:
            return [name]
    codecs = {name for pattern in _CODECS for name in _match(present, pattern)}
    others = [n for n in _match(present, "*.safetensors") if n not in codecs]
    if len(others) != 1:
        found = f"found {', '.join(others[:3])}" if others else "found none"
        raise IncompleteError(
            f"its weights are not there: {' or '.join(SINGLE_FILES)} or "
            f"{SPLIT_FILES[0]} was expected, {found}"
        )
    return others


def _codec_names(present: list[str]) -> list[str]:
    found = [name for pattern in _CODECS for name in _match(present, pattern)]
    if not found:
        raise IncompleteError(f"the Mimi codec is missing ({' or '.join(_CODECS)})")
    return found[:1]


def _tokenizer_names(present: list[str]) -> list[str]:
    found = _match(present, _TOKENIZER)
    if not found:
        raise IncompleteError(f"the text tokenizer is missing ({_TOKENIZER})")
    return found[:1]


_PARTS = (lm_names, _codec_names, _tokenizer_names)


def _match(names: list[str], pattern: str) -> list[str]:
    """Names that fit a pattern whose stars do not reach into folders."""
    return [
        name
        for name in names
        if name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)
    ]
