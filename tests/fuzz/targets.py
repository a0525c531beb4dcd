"""What reads bytes from outside: each target takes a file and may raise PplexError."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pplex.errors import PplexError

DATA = Path(__file__).parents[1] / "data"
CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Target:
    """A reader, the suffix of its files, and files to start from."""

    read: Callable[[Path], object]
    suffix: str
    seeds: Callable[[], Iterator[bytes]]


def read_audio(path: Path) -> None:
    from pplex.audio.files import read_pcm

    pcm = read_pcm(path, sample_rate=24000).pcm
    assert pcm.dtype == np.float32 and np.isfinite(pcm).all()


def read_stream(path: Path) -> None:
    """The bytes as they would come on stdin, through a pipe."""
    from pplex.audio.streams import Feed, UserStream, open_stream

    reader, writer = os.pipe()
    content = path.read_bytes()[: 1 << 20]

    def push() -> None:
        with open(writer, "wb", buffering=0) as file:
            try:
                for start in range(0, len(content), 4093):
                    file.write(content[start : start + 4093])
            except BrokenPipeError:
                pass

    thread = threading.Thread(target=push)
    thread.start()
    feed = Feed(reader)
    try:
        user = UserStream(feed, open_stream(feed), channel=1)
        for frame in user.frames(24000, 1920):
            assert frame.pcm.shape == (1920,) and np.isfinite(frame.pcm).all()
            if user.num_samples > 24000 * 60:
                break
    finally:
        feed.stop()
        os.close(reader)
        thread.join()


def read_voice(path: Path) -> None:
    from pplex.checkpoint.voices import read_voice_file

    assert np.isfinite(read_voice_file(path).embeddings).all()


def read_voices_archive(path: Path) -> None:
    import shutil

    from pplex.checkpoint.unpack import cache_folder, unpack_voices

    folder = unpack_voices(path)
    assert folder.resolve().is_relative_to(cache_folder().resolve())
    shutil.rmtree(folder)


def read_config(path: Path) -> None:
    from pplex.checkpoint.config import load_config

    load_config(path)


def read_weights(path: Path) -> None:
    from pplex.checkpoint.safetensors import load_tensors

    for array in load_tensors(path).values():
        assert array.size >= 0


def read_jobs_file(path: Path) -> None:
    from pplex.batch.jobsfile import read_jobs

    read_jobs(path)


def read_manifest(path: Path) -> None:
    from pplex.respond.manifest import Manifest, manifest_name

    folder = path.parent / "done"
    folder.mkdir(exist_ok=True)
    (folder / manifest_name(None)).write_bytes(path.read_bytes())
    Manifest(folder)


def _files(*names: str) -> Callable[[], Iterator[bytes]]:
    def read() -> Iterator[bytes]:
        for name in names:
            yield (DATA / name).read_bytes()[: 1 << 18]

    return read


def _audio() -> Iterator[bytes]:
    import io

    import soundfile

    pcm = (0.1 * np.sin(np.arange(4000) / 9)).astype(np.float32)
    kinds = [
        ("WAV", "PCM_16", 16000),
        ("WAV", "FLOAT", 24000),
        ("WAV", "PCM_24", 8000),
        ("WAVEX", "PCM_16", 24000),
        ("FLAC", "PCM_16", 48000),
        ("OGG", "VORBIS", 24000),
        ("AIFF", "PCM_16", 22050),
        ("AU", "PCM_16", 24000),
        ("W64", "PCM_16", 24000),
        ("RF64", "PCM_16", 24000),
        ("CAF", "PCM_16", 24000),
        ("MP3", "MPEG_LAYER_III", 24000),
    ]
    for kind, subtype, rate in kinds:
        file = io.BytesIO()
        soundfile.write(file, pcm, rate, subtype=subtype, format=kind)
        yield file.getvalue()


def _wav() -> Iterator[bytes]:
    from pplex.audio.streams import wav_header

    yield from (content for content in _audio() if content[8:12] == b"WAVE")
    yield wav_header(None, 2, 24000) + bytes(8000)


def _pt() -> Iterator[bytes]:
    import tarfile

    with tarfile.open(DATA / "tiny" / "voices.tgz") as archive:
        for member in archive.getmembers()[:2]:
            if file := archive.extractfile(member):
                yield file.read()


def _safetensors() -> Iterator[bytes]:
    from safetensors.numpy import save

    embeddings, cache = np.ones((3, 8), np.float32), np.ones((17, 4), np.int64)
    yield save({"embeddings": embeddings, "cache": cache})


def _weights() -> Iterator[bytes]:
    import tempfile

    import mlx.core as mx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        mx.save_safetensors(str(path), {"a": mx.ones((3, 4)), "b.weight": mx.ones(7)})
        yield path.read_bytes()


def _jobs() -> Iterator[bytes]:
    yield (
        b'{"input": "a.wav", "seed": 3, "tail": 1.5, "role": "casual"}\n'
        b'{"input": "b.wav", "output": "o.wav", "prompt": "", "x": [1]}\n'
    )


def _csv() -> Iterator[bytes]:
    yield b'input,output,voice,seed\na.wav,"o\n1.wav",NATF0,3\nb.wav,,,\n'


def _manifest() -> Iterator[bytes]:
    yield (
        b'{"recording": "a.wav", "status": "done", "settings": "ab", "time": 1.5, '
        b'"input": {"path": "a.wav", "size": 3, "sha256": "00"}, '
        b'"outputs": {"audio": {"path": "o.wav", "size": 4, "sha256": "11"}}}\n'
    )


TARGETS = {
    "audio": Target(read_audio, ".wav", _audio),
    "stream": Target(read_stream, ".wav", _wav),
    "pt": Target(read_voice, ".pt", _pt),
    "voice": Target(read_voice, ".safetensors", _safetensors),
    "weights": Target(read_weights, ".safetensors", _weights),
    "archive": Target(read_voices_archive, ".tgz", _files("tiny/voices.tgz")),
    "config": Target(read_config, ".json", _files("tiny/config.json")),
    "jobs": Target(read_jobs_file, ".jsonl", _jobs),
    "jobs-csv": Target(read_jobs_file, ".csv", _csv),
    "manifest": Target(read_manifest, ".jsonl", _manifest),
}


def corpus(name: str) -> list[Path]:
    """Files that once broke something, or that lead far."""
    return sorted(p for p in (CORPUS / name).glob("*") if p.is_file())


def run(target: Target, path: Path) -> str:
    """Read a file; what became of it: its refusal, or nothing."""
    try:
        target.read(path)
    except PplexError as e:
        message = str(e)
        assert message and "\n" not in message.strip(), message
        return message
    return ""
