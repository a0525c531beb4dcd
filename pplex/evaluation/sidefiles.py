"""Stats and transcripts beside the sound, known by what they hold."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pplex.errors import PplexError
from pplex.respond.transcript import Word

USER, AGENT = ".user.wav", ".agent.wav"
_MAX_JSON_BYTES = 64 << 20


def read_stats(path: Path) -> dict[str, Any]:
    """The figures of a stats file."""
    if not path.is_file():
        raise PplexError(f"{path} does not exist; check the name")
    stats = as_stats(read_json(path))
    if stats is None:
        raise PplexError(f"{path} is not a stats file that pplex wrote")
    return stats


@dataclass
class SideFiles:
    """Stats and transcripts of some folders, by the name of the audio they go with."""

    stats: dict[Path, dict[str, Any]] = field(default_factory=dict)
    words: dict[Path, list[Word]] = field(default_factory=dict)

    def of(self, audio: Path) -> tuple[dict[str, Any] | None, list[Word] | None]:
        """The stats and the words of one audio file."""
        stats = self.stats.get(real_path(audio))
        words = None
        if stats is not None:
            name = stats["outputs"].get("transcript")
            if isinstance(name, str):
                beside = real_path(locate(audio.parent, name))
                words = self.words.get(beside)
        if words is None:
            stem = audio.name.removesuffix(AGENT).removesuffix(USER)
            stem = stem.removesuffix(audio.suffix)
            for path, found in self.words.items():
                same = path.parent == real_path(audio).parent
                if same and path.stem.removesuffix(".transcript") == stem:
                    words = found
        return stats, words


def side_files(folders: Iterable[Path]) -> SideFiles:
    """Everything of that kind in some folders."""
    known = SideFiles()
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            if path.name.startswith(".") or path.name.endswith("output.json"):
                continue
            content = read_json(path)
            stats = as_stats(content)
            if stats is not None:
                for name in stats["outputs"].values():
                    if isinstance(name, str):
                        audio = real_path(locate(folder, name))
                        known.stats[audio] = stats
            words = as_words(content)
            if words is not None:
                known.words[real_path(path)] = words
    return known


def real_path(path: Path) -> Path:
    """The path with its links followed, in a circle as far as the system does.

    What can be no path at all stays as it is.
    """
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):
        return path


def locate(folder: Path, name: str) -> Path:
    """A path of a manifest: from here, or from beside the manifest if moved."""
    path = Path(name)
    for candidate in (folder / path, path, folder / path.name):
        if os.path.exists(candidate):
            return candidate
    return folder / path


def read_json(path: Path) -> object:
    """The content of a JSON file, None where it is none."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def as_stats(content: object) -> dict[str, Any] | None:
    """The figures, if that is what a JSON file holds."""
    if isinstance(content, dict) and "real_time_factor" in content:
        if isinstance(content.get("outputs"), dict):
            return content
    return None


def as_words(content: object) -> list[Word] | None:
    """Words of a transcript that pplex wrote; the agent's where it has both sides."""
    if not isinstance(content, dict) or "duration_s" not in content:
        return None
    try:
        return [
            Word(
                str(word["text"]),
                float(word["start_s"]),
                float(word["end_s"]),
                int(word.get("frame", 0)),
            )
            for word in content["words"]
            if word.get("speaker", "agent") == "agent"
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
