"""What of a model is in the Hugging Face cache; this module never goes online."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pplex.checkpoint.folder import (
    CONFIG_FILE,
    SINGLE_FILES,
    SPLIT_FILES,
    CheckpointFolder,
)
from pplex.checkpoint.known import known_repo
from pplex.errors import PplexError
from pplex.files import reading

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo

_MAIN = "main"
_BROKEN = "is not a cache of huggingface_hub; set HF_HUB_CACHE to another folder"
# One of these is in every snapshot of a model, and tells where the snapshot is.
_LANDMARKS = (CONFIG_FILE, *SPLIT_FILES[:1], *SINGLE_FILES, "tokenizer_spm_32k_3.model")


@dataclass(frozen=True)
class ModelEntry:
    """A line of the list of models: what is known of one, and what is on disk.

    `path`, `revision` and `size_bytes` are None where nothing is; `complete` is false
    too when files are missing. `licence` is that of the weights, where it is known.
    """

    name: str
    repo: str | None
    description: str = ""
    download_gb: float | None = None
    memory_gb: float | None = None
    path: Path | None = None
    revision: str | None = None
    size_bytes: int | None = None
    complete: bool = False
    licence: str | None = None


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The folder of a complete snapshot in the cache, without any network call."""
    folder = cache_folder()
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for landmark in _LANDMARKS:
        with reading(folder, _BROKEN):
            try:
                found = try_to_load_from_cache(repo, landmark, revision=revision)
            except HFValidationError as e:
                raise bad_name(repo) from e
        if isinstance(found, str):
            snapshot = Path(found).parent
            return None if CheckpointFolder(snapshot).fault else snapshot
    return None


def cached_models() -> Iterator[ModelEntry]:
    """The models in the Hugging Face cache that look like ours."""
    for repo in _repos():
        if repo.repo_type != "model" or not repo.revisions:
            continue
        newest = max(
            repo.revisions, key=lambda r: (_MAIN in r.refs, r.last_modified or 0)
        )
        complete = CheckpointFolder(newest.snapshot_path).fault is None
        if not (known_repo(repo.repo_id) or complete):
            continue
        yield ModelEntry(
            name=repo.repo_id,
            repo=repo.repo_id,
            description="in the Hugging Face cache",
            path=newest.snapshot_path,
            revision=newest.commit_hash,
            size_bytes=newest.size_on_disk,
            complete=complete,
        )


def remove_from_cache(repo: str) -> int:
    """Delete every revision of a repository from the cache; bytes that were freed."""
    freed = 0
    for found in _repos():
        if found.repo_id == repo and found.repo_type == "model":
            # huggingface_hub's own way only logs what it cannot delete.
            try:
                shutil.rmtree(found.repo_path)
            except OSError as e:
                raise PplexError(
                    f"{repo} cannot be removed, or not all of it, from "
                    f"{found.repo_path}: {e.strerror or e}"
                ) from e
            freed += found.size_on_disk
    return freed


def _repos() -> Iterable[CachedRepoInfo]:
    """What is in the cache, of whatever kind."""
    folder = cache_folder()
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    with reading(folder, _BROKEN):
        try:
            return scan_cache_dir(folder).repos
        except CacheNotFound:
            return ()


def cache_folder() -> Path:
    """Where huggingface_hub keeps its downloads, made or not.

    To be asked before that is used: PplexError where its settings keep it from loading.
    """
    try:
        from huggingface_hub import constants
    except ValueError as e:
        raise PplexError(
            f"huggingface_hub cannot be loaded ({e}): what one of the variables HF_... "
            "of the environment has is no number; correct or unset it"
        ) from e
    return Path(constants.HF_HUB_CACHE).expanduser().absolute()


def bad_name(repo: str) -> PplexError:
    """The refusal of what cannot name a repository."""
    return PplexError(
        f"{repo!r} cannot be the name of a Hugging Face repository; give owner/name"
    )
