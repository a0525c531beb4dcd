"""What there is to judge: recordings with both sides, found in files and folders.

A folder is a batch (it has a ``manifest.jsonl``), samples of Full-Duplex-Bench, or a
plain folder of outputs. Side files are known by what they hold, not by their names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pplex.audio.files import Channel, probe, read_pcm
from pplex.audio.folders import LeftOut, is_recording, list_folder
from pplex.errors import PplexError
from pplex.evaluation.full_duplex_bench import Sample, read_sample
from pplex.files import reading, real_path
from pplex.respond.manifest import (
    DONE,
    LOCK_PATTERN,
    Line,
    Manifest,
    is_unchanged,
    manifest_name,
    manifests_in,
    passes,
)
from pplex.respond.transcript import Word
from pplex.units import some
from pplex.values import fit, read_json

SAMPLE_RATE = 24_000
USER, AGENT = ".user.wav", ".agent.wav"
# What lies beside recordings that were answered, and is none of them.
_OURS = tuple(".json .jsonl .srt .vtt .tsv .txt .npz .html .png .svg .pdf .csv".split())

# What is looked into of stats and transcripts.
_STATS = {
    "input": (str, None),
    "outputs": {str: str},
    "audio_s": (float, None),
    "tail_s": (float, None),
    "frames": (int, None),
    "step_ms": ({str: (float, None)}, None),
    "step_ms_series": ([float], None),
    "real_time_factor": float,
    "channel": ("mix", int, None),
    "voice": (str, None),
    "prompt": (str, None),
    "model": (str, None),
    "device": (str, None),
    "seed": (int, None),
}
_WORD = {
    "text": str,
    "start_s": float,
    "end_s": float,
    "frame": (int, None),
    "speaker": (str, None),
}
_TRANSCRIPT = {"duration_s": (float, None), "words": [_WORD]}


@dataclass(frozen=True)
class Track:
    """One side's sound: a file and the channel in it."""

    path: Path
    channel: Channel = 1

    def read(self, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
        """PCM (samples,) at that rate."""
        return read_pcm(self.path, sample_rate=sample_rate, channel=self.channel).pcm


@dataclass(frozen=True)
class Item:
    """One recording, done or not; ``stats`` and ``words`` are None where not known.

    ``role`` are the agent's instructions, ``extra`` a jobs file's other columns.
    ``partner`` is the other side of the user's recording, whom the agent stands in for.
    ``source`` is the recording that was answered, where it is there, ``settings`` what
    stats or a manifest say of the run, ``root`` the folder that was asked about.
    ``status`` is ``done``, ``failed``, ``missing`` (said to be done, but a file is not
    there), ``unreadable``, ``no answer`` or what a manifest says.
    """

    name: str
    status: str = "done"
    error: str | None = None
    user: Track | None = None
    agent: Track | None = None
    partner: Track | None = None
    role: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    audio: Path | None = None
    stats: dict[str, Any] | None = None
    words: list[Word] | None = None
    chunks: Path | None = None
    sample: Sample | None = None
    folder: Path | None = None
    source: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    root: Path | None = None


@dataclass
class Found:
    """Every recording, and what is to be said about the set as a whole."""

    items: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find(paths: Sequence[Path]) -> Found:
    """All recordings of ``paths``, in order; refuses paths without a trace of one."""
    found = Found()
    for path in paths:
        before = len(found.items)
        if path.is_dir():
            _search(path, found)
        elif path.exists():
            known = _side_files([path.parent], found.notes)
            found.items.append(_outputs_item(path, known))
        else:
            raise PplexError(f"{path} does not exist; check the name")
        root = path if path.is_dir() else path.parent
        found.items[before:] = [replace(i, root=root) for i in found.items[before:]]
    if not found.items and not found.notes:
        names = ", ".join(str(path) for path in paths)
        raise PplexError(
            f"no recordings in {names}: a folder needs a {manifest_name()}, WAV files "
            "that pplex wrote, or folders with input.wav and output.wav"
        )
    found.items = _distinct(found.items)
    return found


def _search(folder: Path, found: Found) -> None:
    if manifests_in(folder):
        _read_manifests(folder, found)
        return
    samples = [
        sub
        for sub in sorted([folder, *(p for p in folder.rglob("*") if p.is_dir())])
        if (sub / "input.wav").is_file()
        and ((sub / "output.wav").is_file() or read_sample(sub))
    ]
    if samples:
        found.items += [_sample_item(folder, sub, found.notes) for sub in samples]
        return
    wavs = _recordings(folder, found.notes)
    known = _side_files(sorted({p.parent for p in wavs} | {folder}), found.notes)
    for path in wavs:
        if path.name.endswith(USER) and path.with_name(_partner(path)).is_file():
            continue  # with the agent's
        found.items.append(_outputs_item(path, known, folder))


def _recordings(folder: Path, notes: list[str]) -> list[Path]:
    """The recordings of a folder; ``notes`` gets what is left out."""
    listed, left_out = list_folder(folder, recursive=True), LeftOut()
    others = [name for name in listed.names if not is_recording(name)]
    left_out.add(listed, (n for n in others if not n.lower().endswith(_OURS)))
    notes += [f"{folder}: {said}" for said in left_out.sentences()]
    return sorted(folder / name for name in listed.names if is_recording(name))


def _read_manifests(folder: Path, found: Found) -> None:
    lines = Manifest(folder, note=found.notes.append).last
    if not lines and not found.notes:
        found.notes.append(f"{folder}: no recording is finished yet")
    if any(folder.glob(LOCK_PATTERN)):
        found.notes.append(
            f"{folder}: a batch is at work here, or was stopped; recordings that it "
            "has not finished are not shown"
        )
    done = [(n, line) for n, line in sorted(lines.items()) if line["status"] == DONE]
    failed = [name for name, line in done if passes(line) is False]
    if failed:
        found.notes.append(
            f"{folder}: {len(failed)} of {len(lines)} recordings fail a check of pplex "
            f"batch: {some(failed)}"
        )
    named: set[Path] = set()
    for _, line in sorted(lines.items()):
        found.items.append(_manifest_item(line, folder, found.notes))
        paths = [*_outputs_of(line, folder).values(), _input_of(line, folder)]
        named |= {real_path(path) for path in paths if path is not None}
    wavs = _recordings(folder, found.notes)
    strange = [path for path in wavs if real_path(path) not in named]
    if strange:
        names = some([str(path.relative_to(folder)) for path in strange])
        found.notes.append(
            f"{folder}: left out, for it is in no line of the manifest: {names}"
        )


def _outputs_of(line: Line, folder: Path) -> dict[str, Path]:
    return {what: _locate(folder, o["path"]) for what, o in line["outputs"].items()}


def _input_of(line: Line, folder: Path) -> Path | None:
    path = (line["input"] or {}).get("path")
    return None if path is None else _locate(folder, path)


def _manifest_item(line: Line, folder: Path, notes: list[str]) -> Item:
    name, status = line["recording"], line["status"]
    item = Item(name, status, line["error"], folder=folder, settings=line)
    if status != "done":
        return item
    paths, wrong = _outputs_of(line, folder), []
    for what, path in paths.items():
        if not os.path.isfile(path):
            wrong.append(f"{path} is not there any more")
        elif _was_changed(path, line["outputs"][what]):
            wrong.append(f"{path} was changed after the batch wrote it")
    audio = paths.get("audio") or paths.get("agent")
    if wrong or audio is None:
        error = "; ".join(wrong) or "the manifest names no sound"
        item = replace(item, status="missing", error=error)
    if audio is None or not os.path.isfile(audio):
        return item
    stats = words = None
    for path in (p for p in paths.values() if p.suffix == ".json"):
        if os.path.isfile(path):
            of_run, said = _side_file(path, notes)
            stats, words = stats or of_run, words if said is None else said
    known = _SideFiles({} if stats is None else {real_path(audio): stats})
    spoken = _input_of(line, folder)
    done = _outputs_item(audio, known, folder, spoken, paths.get("user"))
    if spoken is not None and spoken.name == "input.wav":
        done = _as_sample(done, spoken.parent)
    return replace(
        done,
        name=name,
        status=item.status if done.status == "done" else done.status,
        error=item.error or done.error,
        stats=stats,
        words=words,
        role=line["prompt"] or done.role,
        extra=line["extra"] or {},
        settings=line | (stats or {}),
    )


def _was_changed(path: Path, output: Line) -> bool:
    if output["sha256"] is not None:
        return not is_unchanged(path, output)
    return output["size"] not in (None, path.stat().st_size)


def _sample_item(root: Path, folder: Path, notes: list[str]) -> Item:
    """A sample with its answer beside it, in mono or, as pplex has it, in stereo."""
    output = folder / "output.wav"
    name = str(folder.relative_to(root.parent) if folder != root else folder.name)
    item = Item(name, "no answer", f"{output} is not there", folder=folder)
    if output.is_file():
        source = folder / "input.wav"
        item = _outputs_item(output, _side_files([folder], notes), None, source)
    return _as_sample(replace(item, name=name), folder)


def _as_sample(item: Item, folder: Path) -> Item:
    """The item with what Full-Duplex-Bench says of the sample in ``folder``."""
    sample = read_sample(folder)
    if sample is None:
        return item
    chunks = None
    if item.agent is not None:
        chunks = item.agent.path.with_name("output.json")
    return replace(
        item,
        sample=sample,
        folder=folder,
        chunks=chunks if chunks and chunks.is_file() else None,
    )


def _outputs_item(
    path: Path,
    known: _SideFiles,
    folder: Path | None = None,
    source: Path | None = None,
    user_file: Path | None = None,
) -> Item:
    """A WAV that pplex wrote: stereo, one of a pair, or the agent alone."""
    stats, words = known.of(path)
    name = path.name
    if folder is not None and folder in path.parents:
        name = str(path.relative_to(folder))
    role = str((stats or {}).get("prompt", ""))
    item = Item(name, stats=stats, words=words, folder=path.parent, role=role)
    item = replace(item, settings=stats or {})
    if path.name.endswith(USER):
        path = path.with_name(_partner(path))
    if path.name.endswith(AGENT):
        user_file = user_file or path.with_name(_partner(path))
        stem = name.removesuffix(USER).removesuffix(AGENT)
        item = replace(item, name=stem + ".wav")
    try:
        channels = probe(path).channels
    except PplexError as e:
        return replace(item, status="unreadable", error=str(e))
    source = source or _source_of(stats, path.parent)
    source = source if source is not None and os.path.isfile(source) else None
    item = replace(item, source=source)
    channel: Channel = (stats or {}).get("channel") or 1
    is_stereo = (stats or {}).get("source_channels") == 2
    if source is not None and channel in (1, 2) and is_stereo:
        item = replace(item, partner=Track(source, 3 - channel))
    if channels == 2:
        return replace(item, user=Track(path, 1), agent=Track(path, 2), audio=path)
    if user_file is not None and os.path.isfile(user_file):
        source, channel = user_file, 1
    user = None if source is None else Track(source, channel)
    return replace(item, user=user, agent=Track(path), audio=path)


def _source_of(stats: dict[str, Any] | None, folder: Path) -> Path | None:
    source = (stats or {}).get("input")
    return None if source is None else _locate(folder, source)


def _partner(path: Path) -> str:
    ours, other = (USER, AGENT) if path.name.endswith(USER) else (AGENT, USER)
    return path.name.removesuffix(ours) + other


def _distinct(items: list[Item]) -> list[Item]:
    """Each recording once, though it may be named twice."""
    seen: set[object] = set()
    kept = []
    for item in items:
        key = (real_path(item.agent.path), item.agent.channel) if item.agent else item
        if id(key) not in seen and (not item.agent or key not in seen):
            seen.add(key if item.agent else id(key))
            kept.append(item)
    return kept


def read_stats(path: Path) -> dict[str, Any]:
    """The figures of a stats file."""
    if not path.exists():
        raise PplexError(f"{path} does not exist; check the name")
    with reading(path, "is not a stats file that pplex wrote"):
        stats: dict[str, Any] = fit(read_json(path), _STATS)
    return stats


@dataclass
class _SideFiles:
    """Stats and transcripts of some folders, by the name of the audio they go with."""

    stats: dict[Path, dict[str, Any]] = field(default_factory=dict)
    words: dict[Path, list[Word]] = field(default_factory=dict)

    def of(self, audio: Path) -> tuple[dict[str, Any] | None, list[Word] | None]:
        """The stats and the words of one audio file."""
        stats = self.stats.get(real_path(audio))
        words = None
        for name in stats["outputs"].values() if stats is not None else ():
            words = self.words.get(real_path(_locate(audio.parent, name)), words)
        if words is None:
            stem = audio.name.removesuffix(AGENT).removesuffix(USER)
            stem = stem.removesuffix(audio.suffix)
            for path, found in self.words.items():
                same = path.parent == real_path(audio).parent
                if same and path.stem.removesuffix(".transcript") == stem:
                    words = found
        return stats, words


def _side_files(folders: Iterable[Path], notes: list[str]) -> _SideFiles:
    """Everything of that kind in some folders; ``notes`` gets what was left out."""
    known = _SideFiles()
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            if path.name.startswith(".") or path.name.endswith("output.json"):
                continue
            stats, words = _side_file(path, notes)
            if stats is not None:
                for name in stats["outputs"].values():
                    known.stats[real_path(_locate(folder, name))] = stats
            if words is not None:
                known.words[real_path(path)] = words
    return known


def _locate(folder: Path, name: str) -> Path:
    """A path of a manifest: from here, or from beside the manifest if moved."""
    path = Path(name)
    for candidate in (folder / path, path, folder / path.name):
        if os.path.exists(candidate):
            return candidate
    return folder / path


def _side_file(
    path: Path, notes: list[str]
) -> tuple[dict[str, Any] | None, list[Word] | None]:
    """The figures or the words of a file of pplex, None and None of any other.

    One that is damaged is left out, and ``notes`` gets a sentence.
    """
    try:
        with reading(path, "was left out, as it is damaged"):
            content = read_json(path)
            if isinstance(content, dict):
                if {"real_time_factor", "outputs"} <= content.keys():
                    return fit(content, _STATS), None
                if "words" in content and {"duration_s", "metadata"} & content.keys():
                    return None, _words(fit(content, _TRANSCRIPT))
    except PplexError as e:
        notes.append(str(e))
    return None, None


def _words(content: dict[str, Any]) -> list[Word]:
    """Words of a transcript that pplex wrote; the agent's where it has both sides.

    Of a talk the agent is the right one, as in its sound.
    """
    return [
        Word(word["text"], word["start_s"], word["end_s"], word["frame"] or 0)
        for word in content["words"]
        if word["speaker"] in (None, "agent", "right")
    ]
