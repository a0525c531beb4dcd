"""Bring a model's files from Hugging Face: the only module that goes online."""

from __future__ import annotations

import errno
import glob
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pplex import units
from pplex.checkpoint.folder import (
    CheckpointFolder,
    IncompleteError,
    lm_names,
    needed_files,
)
from pplex.checkpoint.hub_cache import bad_name, cache_folder, cached_snapshot
from pplex.checkpoint.known import known_repo
from pplex.errors import PplexError, first_line

_SPARE_BYTES = 100_000_000  # left free on the disk after a download
_LARGE_BYTES = 10_000_000  # from here on, a file's progress is shown


def download(repo: str, revision: str | None, progress: bool) -> Path:
    """Bring the needed files of a repository into the cache; return their folder."""
    cache_folder()  # says it where huggingface_hub cannot be loaded
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub import errors as hub_errors

    where = at(repo, revision)
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        needed = needed_files(list(sizes))
        missing = _check_space(repo, info.sha, {file: sizes[file] for file in needed})
        known = known_repo(repo)
        if missing and known is None:
            _check_layout(repo, info.sha, needed)
        if missing and progress and known is not None:
            sys.stderr.write(f"{where}: licence {known.terms}\n")
        for file in needed:
            # One after another, in this thread: those of snapshot_download cannot be
            # interrupted before their file is whole.
            with _progress_bars(progress and sizes[file] >= _LARGE_BYTES):
                hf_hub_download(repo, file, revision=info.sha)
        with _progress_bars(False):
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
        cure: dict[Any, str] = {
            401: "your login is not valid any more: run `hf auth login` again",
            403: "your login may not read it: give it the right, or run "
            "`hf auth login` with another token",
        }
        raise PplexError(
            f"Hugging Face refused to give {where} (HTTP status {status or 'unknown'})"
            f"; {cure.get(status, 'try again later')}"
        ) from e
    except (ValueError, TypeError, LookupError, AttributeError) as e:
        raise PplexError(
            f"what answers instead of Hugging Face about {where} is not the hub "
            f"({first_line(e)[:100]}); is there a page of this network to log in to?"
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


def _without_network(repo: str, revision: str | None, error: BaseException) -> Path:
    """Fall back on the very same files in the cache, if all are there."""
    from huggingface_hub import constants

    snapshot = cached_snapshot(repo, revision)
    if snapshot is None:
        offline = constants.HF_HUB_OFFLINE
        cure = "unset HF_HUB_OFFLINE" if offline else "check the network"
        raise PplexError(
            f"Hugging Face cannot be reached to download {at(repo, revision)}; {cure}, "
            "or try `--model mini`, which works at once without a download"
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


def _check_space(repo: str, sha: str | None, sizes: dict[str, int]) -> int:
    """Refuse a download that cannot fit, before its first byte; the bytes of it."""
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
            f"{repo} needs {units.size(missing)} more and {existing} has "
            f"{units.size(free)} free; free some space or set HF_HUB_CACHE to a folder "
            "on a larger disk"
        )
    return missing


def _check_layout(repo: str, sha: str | None, needed: list[str]) -> None:
    """Refuse weights in a layout that is none of ours before they are downloaded."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    from pplex.checkpoint.source import tell_layout

    files = lm_names(needed)
    names: set[str] = set()
    for file in files:
        try:
            header = HfApi().parse_safetensors_file_metadata(repo, file, revision=sha)
        except SafetensorsParsingError as e:
            raise IncompleteError(f"{file} is no safetensors file") from e
        names |= header.tensors.keys()
    tell_layout(Path(repo, files[0]), names, len(files) > 1)


@contextmanager
def _progress_bars(wanted: bool) -> Iterator[None]:
    """Silence huggingface_hub's bars for a while, unless they are wanted."""
    from huggingface_hub.utils.tqdm import (
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


def at(repo: str, revision: str | None) -> str:
    """How a repository, or a commit of it, is named."""
    return f"{repo}@{revision}" if revision else repo


@dataclass(frozen=True)
class Online:
    """``user`` is None without a login; ``reason`` says what failed."""

    reachable: bool
    user: str | None
    reason: str | None


def check_network() -> Online:
    """Ask Hugging Face who we are: one request, or two without a login."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    api = huggingface_hub.HfApi()
    try:
        if huggingface_hub.get_token() is None:
            api.model_info("nvidia/personaplex-7b-v1", timeout=10)
            return Online(True, None, None)
        return Online(True, str(api.whoami()["name"]), None)
    except HfHubHTTPError as e:
        status = getattr(e.response, "status_code", None)
        return Online(True, None, f"Hugging Face answered {status}")
    except Exception as e:  # every kind of network fault, of any HTTP library
        return Online(False, None, first_line(e)[:200])
