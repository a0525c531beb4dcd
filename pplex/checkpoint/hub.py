"""Names of models to local files: the only module that goes online.

A name is an alias, a local folder or file, or `owner/name[@revision]` on Hugging Face.
"""

import errno
import glob
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pplex.checkpoint.folder import CheckpointFolder, IncompleteError, needed_files
from pplex.checkpoint.hub_cache import (
    ModelEntry,
    bad_name,
    cache_folder,
    cached_models,
    cached_snapshot,
    remove_from_cache,
)
from pplex.checkpoint.known import DEFAULT_MODEL, KNOWN_MODELS
from pplex.errors import PplexError

_REPO_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
_SPARE_BYTES = 100_000_000  # left free on the disk after a download


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
    if not match or name.startswith((".", "~", "/")):
        known = ", ".join(KNOWN_MODELS)
        raise PplexError(
            f"there is no model {name!r}: give one of {known}, a folder or "
            ".safetensors file that exists, or owner/name of a Hugging Face repository"
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
        entry = on_disk.pop(known.repo, None)
        path = entry.path if entry else None
        size = entry.size_bytes if entry else None
        complete = entry.complete if entry else False
        if known.repo is None and _built_in_folder(alias).is_dir():
            path = _built_in_folder(alias)
            size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
            complete = True
        entries.append(
            ModelEntry(
                name=alias,
                repo=known.repo,
                description=known.description,
                download_gb=known.download_gb,
                memory_gb=known.memory_gb,
                path=path,
                revision=entry.revision if entry else None,
                size_bytes=size,
                complete=complete,
            )
        )
    return entries + [on_disk[repo] for repo in sorted(on_disk, key=str)]


def remove(name: str) -> int:
    """Delete a downloaded model, by alias or owner/name; bytes that were freed."""
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
    return remove_from_cache(repo)


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
                f"{_at(repo, revision)} is not on this machine, or not all of it, and "
                "nothing is downloaded with --offline or by a command that only looks; "
                f"get it with `pplex models pull {name}`"
            )
    else:
        snapshot = _download(repo, revision, progress)
    return LocalModel(name, snapshot, repo, snapshot.name)


def _download(repo: str, revision: str | None, progress: bool) -> Path:
    """Bring the needed files of a repository into the cache; return their folder."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub import errors as hub_errors

    where = _at(repo, revision)
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        needed = needed_files(list(sizes))
        _check_space(repo, info.sha, {file: sizes[file] for file in needed})
        with _progress_bars(progress):
            folder = snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[glob.escape(file) for file in needed],
            )
        if CheckpointFolder(Path(folder)).fault:  # the network went half way
            raise IncompleteError("the download is not whole; run it again to resume")
        return Path(folder)
    except IncompleteError as e:
        raise PplexError(f"{where} cannot be used: {e}") from e
    except hub_errors.GatedRepoError as e:
        raise PplexError(
            f"{repo} is gated: accept the licence at https://huggingface.co/{repo} "
            "and run `hf auth login`"
        ) from e
    except hub_errors.RepositoryNotFoundError as e:
        raise PplexError(
            f"there is no repository {repo} on Hugging Face, or it is private; check "
            "the name, or run `hf auth login`"
        ) from e
    except hub_errors.RevisionNotFoundError as e:
        raise PplexError(
            f"{repo} has no revision {revision!r}; check it at "
            f"https://huggingface.co/{repo}/commits/main"
        ) from e
    except hub_errors.HFValidationError as e:
        raise bad_name(repo) from e
    except _connection_errors() as e:
        if _says_disk_full(e):
            raise _disk_full(where) from e
        return _without_network(repo, revision, e)
    except hub_errors.HfHubHTTPError as e:
        status = getattr(getattr(e, "response", None), "status_code", None)
        raise PplexError(
            f"Hugging Face refused to give {where} (HTTP status {status or 'unknown'})"
            "; try again later"
        ) from e
    except (OSError, RuntimeError) as e:  # RuntimeError: hf_xet, the Rust downloader
        if _says_disk_full(e):
            raise _disk_full(where) from e
        reason = getattr(e, "strerror", None) or e
        raise PplexError(f"{where} cannot be downloaded: {reason}") from e


def _says_disk_full(error: BaseException) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or "No space left" in str(error)


def _disk_full(where: str) -> PplexError:
    return PplexError(
        f"the disk is full: {where} does not fit in {cache_folder()}; free some "
        "space or set HF_HUB_CACHE to a folder on a larger disk"
    )


def _without_network(repo: str, revision: str | None, error: Exception) -> Path:
    """Fall back on the very same files in the cache, if all are there."""
    snapshot = cached_snapshot(repo, revision)
    if snapshot is None:
        raise PplexError(
            f"Hugging Face cannot be reached to download {_at(repo, revision)}; check "
            "the network, or try `--model mini`, which works at once without a download"
        ) from error
    return snapshot


def _connection_errors() -> tuple[type[BaseException], ...]:
    """What a missing network raises, in each huggingface_hub's own HTTP library."""
    from huggingface_hub import errors as hub_errors

    classes: list[type[BaseException]] = [ConnectionError, TimeoutError]
    for name in ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "XetDownloadError"):
        if hasattr(hub_errors, name):
            classes.append(getattr(hub_errors, name))
    for library, name in (
        ("httpx2", "TransportError"),
        ("httpx", "TransportError"),
        ("requests.exceptions", "ConnectionError"),
        ("requests.exceptions", "Timeout"),
    ):
        module = sys.modules.get(library)
        if hasattr(module, name):
            classes.append(getattr(module, name))
    return tuple(classes)


def _check_space(repo: str, sha: str | None, sizes: dict[str, int]) -> None:
    """Refuse a download that cannot fit, before its first byte."""
    from huggingface_hub import try_to_load_from_cache

    missing = sum(
        size
        for file, size in sizes.items()
        if not isinstance(try_to_load_from_cache(repo, file, revision=sha), str)
    )
    folder = cache_folder()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if missing and missing + _SPARE_BYTES > free:
        raise PplexError(
            f"{repo} needs {missing / 1e9:.1f} GB more and {existing} has "
            f"{free / 1e9:.1f} GB free; free some space or set HF_HUB_CACHE to a "
            "folder on a larger disk"
        )


@contextmanager
def _progress_bars(wanted: bool) -> Iterator[None]:
    """Silence huggingface_hub's bars for a while, unless they are wanted."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if wanted or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _at(repo: str, revision: str | None) -> str:
    return f"{repo}@{revision}" if revision else repo
