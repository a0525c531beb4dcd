"""What a folder holds: recordings by their names, what else, what cannot be read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pplex.units import counted

# Of all that libsndfile reads. Not .raw, which says nothing of itself, and not .mat,
# which is seldom sound.
_SUFFIXES = frozenset(
    ".wav .wave .bwf .w64 .rf64 .bw64 .flac .ogg .oga .opus .mp3 .mp2 .mp1 .mpga .aif "
    ".aiff .aifc .au .snd .caf .sph .nist .voc .sf .ircam .paf .svx .8svx .16sv .iff "
    ".avr .pvf .htk .sds .sd2 .wve .xi .mat4 .mat5".split()
)


def is_recording(name: str) -> bool:
    """Whether a file is a recording, by its name."""
    return PurePosixPath(name).suffix.lower() in _SUFFIXES


@dataclass
class Folder:
    """A folder's files by their names, relative and with slashes; hidden ones are none.

    ``unread`` are folders within that were not looked into; of those that could not
    be, ``unreadable`` says why.
    """

    names: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)


def list_folder(
    path: Path, *, recursive: bool, spared: Collection[Path] = ()
) -> Folder:
    """List ``path``; ``spared``, no links, are folders to pass over.

    A loop of links ends.
    """
    found = Folder()

    def note(error: OSError) -> None:
        where = str(error.filename)
        found.unreadable[where] = error.strerror or str(error)

    visited = set()
    for current, folders, files in os.walk(path, followlinks=True, onerror=note):
        here = Path(current)
        real = here.resolve()
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(
            n
            for n in folders
            if not n.startswith(".") and (here / n).resolve() not in spared
        )
        within = here.relative_to(path)
        if not recursive:
            found.unread += [(within / name).as_posix() for name in folders]
            folders.clear()
        found.names += [
            (within / name).as_posix()
            for name in sorted(files)
            if not name.startswith(".")
        ]
    return found


@dataclass
class LeftOut:
    """What folders hold that is not taken: files by suffix, folders not looked into.

    Of folders that cannot be read ``unreadable`` says why.
    """

    suffixes: Counter[str] = field(default_factory=Counter)
    folders: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)

    def add(self, folder: Folder, left: Iterable[str]) -> None:
        """Count ``left``, names of files, and what was not looked into."""
        self.suffixes.update(
            PurePosixPath(name).suffix.lower() or "no suffix" for name in left
        )
        self.folders += len(folder.unread)
        self.unreadable |= folder.unreadable

    def sentences(self) -> list[str]:
        """What there is to say; a line each."""
        lines = [
            f"{name} cannot be read: {why}" for name, why in self.unreadable.items()
        ]
        if count := self.suffixes.total():
            kinds = ", ".join(f"{kind} {n}" for kind, n in self.suffixes.most_common())
            files = "file that is no recording by its name"
            if count > 1:
                files = "files that are no recordings by their names"
            lines.append(f"left out: {count} {files} ({kinds})")
        if self.folders:
            folders = counted(self.folders, "folder")
            lines.append(f"left out: {folders} within; --recursive looks there")
        return lines
