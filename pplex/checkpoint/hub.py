"""Names of models to local files.

A name is an alias, a local folder or file, or `owner/name[@revision]` on Hugging Face.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from pplex.checkpoint.download import at, download
from pplex.checkpoint.folder import CheckpointFolder
from pplex.checkpoint.hub_cache import (
    ModelEntry,
    cached_models,
    cached_snapshot,
)
from pplex.checkpoint.known import DEFAULT_MODEL, KNOWN_MODELS, known_repo
from pplex.errors import PplexError, did_you_mean

_REPO_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class LocalModel:
    """A model's files on this machine.

    `path` is a folder or one .safetensors file; `repo` and `revision` (a commit hash)
    say where on Hugging Face it came from, None for local files.
    """

    name: str
    path: Path
    repo: str | None
    revision: str | None

    @property
    def folder(self) -> CheckpointFolder:
        """Which file is what."""
        return CheckpointFolder(self.path)

    @property
    def is_known(self) -> bool:
        """Whether it is one of ``KNOWN_MODELS``."""
        return self.name in KNOWN_MODELS or known_repo(self.repo) is not None


def resolve(
    name: str, *, offline: bool, progress: bool = True, revision: str | None = None
) -> LocalModel:
    """Find a model's files, downloading what is missing unless `offline`.

    An alias wins over a folder of the same name (write ./NAME for that); then local
    paths; then `owner/name[@revision]`. Progress bars go to stderr.
    """
    if name in KNOWN_MODELS:
        repo = KNOWN_MODELS[name].repo
        if repo is None:
            return _built_in(name)
        return _from_hub(name, repo, revision, offline, progress)
    path = Path(name).expanduser()
    if name and path.exists():
        return _local(name, path)
    match = _REPO_NAME.fullmatch(name)
    if not match or name.startswith((".", "~", "/")) or path.suffix == ".safetensors":
        known = ", ".join(KNOWN_MODELS)
        raise PplexError(
            f"there is no model {name!r}: give one of {known}, a folder or "
            ".safetensors file that exists, or owner/name of a Hugging Face repository"
            + did_you_mean(name, KNOWN_MODELS)
        )
    repo, named = match.groups()
    if named and revision and named != revision:
        raise PplexError(
            f"the model {name!r} and the revision {revision!r} disagree; give one"
        )
    return _from_hub(name, repo, named or revision, offline, progress)


def list_models() -> list[ModelEntry]:
    """List the known models, then others in the Hugging Face cache; never online."""
    on_disk = {entry.repo: entry for entry in cached_models()}
    entries = []
    for alias, known in KNOWN_MODELS.items():
        entry = on_disk.pop(known.repo, ModelEntry(alias, known.repo))
        if known.repo is None and (path := _built_in_folder(alias)).is_dir():
            size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
            entry = replace(entry, path=path, size_bytes=size, complete=True)
        facts = {k: v for k, v in vars(known).items() if k != "repo"}
        entries.append(replace(entry, name=alias, **facts))
    return entries + [on_disk[repo] for repo in sorted(on_disk, key=str)]


def downloaded_repo(name: str) -> str:
    """The repository of a downloaded model, by alias or owner/name; else refused."""
    known = KNOWN_MODELS.get(name)
    if known is None and Path(name).expanduser().exists():
        raise PplexError(
            f"{name} is a folder or file of yours, not a download; delete it yourself"
        )
    repo = known.repo if known else name
    if repo is None:
        raise PplexError(f"the model {name!r} is part of pplex and cannot be removed")
    if not any(entry.repo == repo for entry in cached_models()):
        raise PplexError(
            f"{name} is not on this machine; `pplex models list` shows what is"
        )
    return repo


def locate(name: str) -> LocalModel:
    """Like ``resolve`` offline, but a local folder may lack files: to look into it."""
    path = Path(name).expanduser()
    if name not in KNOWN_MODELS and path.is_dir():
        return LocalModel(name, path, None, None)
    return resolve(name, offline=True)


def _built_in_folder(name: str) -> Path:
    return Path(__file__).resolve().parents[1] / name


def _built_in(name: str) -> LocalModel:
    folder = _built_in_folder(name)
    if not folder.is_dir():
        raise PplexError(
            f"the built-in model {name!r} is not part of this installation; "
            f"give another, such as --model {DEFAULT_MODEL}"
        )
    return _local(name, folder)


def _local(name: str, path: Path) -> LocalModel:
    if path.is_dir():
        if fault := CheckpointFolder(path).fault:
            raise PplexError(f"the model folder {path} is incomplete: {fault}")
    elif path.suffix != ".safetensors":
        raise PplexError(
            f"{path} is not a model: give its folder or a .safetensors file"
        )
    return LocalModel(name, path, None, None)


def _from_hub(
    name: str, repo: str, revision: str | None, offline: bool, progress: bool
) -> LocalModel:
    if offline:
        snapshot = cached_snapshot(repo, revision)
        if snapshot is None:
            raise PplexError(
                f"{at(repo, revision)} is not on this machine, or not all of it, and "
                "nothing is downloaded with --offline or by a command that only looks; "
                f"get it with `pplex models pull {name}`"
            )
    else:
        snapshot = download(repo, revision, progress)
    return LocalModel(name, snapshot, repo, snapshot.name)
