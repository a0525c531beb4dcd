"""What reads bytes from outside: each target takes a file and may raise PplexError."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from pplex.errors import PplexError

if TYPE_CHECKING:
    from pplex.model.config import ModelConfig

DATA = Path(__file__).parents[1] / "data"
CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Target:
    """A reader, the suffix of its files, and files to start from.

    ``slow`` ones take a second or so a file.
    """

    read: Callable[[Path], object]
    suffix: str
    seeds: Callable[[], Iterator[bytes]]
    slow: bool = False


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


def read_tokenizer(path: Path) -> None:
    from pplex.checkpoint.tokenizer import TextTokenizer
    from pplex.respond.transcript import words

    tokenizer = TextTokenizer.load(path)
    tokenizer.encode_prompt("You enjoy having a good conversation.")
    ids = range(0, tokenizer.num_pieces, 1 + tokenizer.num_pieces // 500)
    words(ids, tokenizer.piece, 12.5)


def read_lock(path: Path) -> None:
    from pplex.respond.lock import LOCK_NAME, FolderLock

    folder = path.parent / "locked"
    folder.mkdir(exist_ok=True)
    (folder / LOCK_NAME).write_bytes(path.read_bytes())
    lock = FolderLock(folder, None)
    lock.begin({"a.wav": {"path": "a.wav"}})
    lock.release(ended=True)


def read_side_file(path: Path) -> None:
    """As stats and transcript beside an output, to whatever looks at outputs."""
    _look_at(path, "a.json")


def read_batch_folder(path: Path) -> None:
    """As a batch's manifest, to whatever looks at outputs."""
    _look_at(path, "manifest.jsonl")


def _look_at(path: Path, name: str) -> None:
    from pplex.cli.score_tables import score_table
    from pplex.evaluation.checks import Checks, run_checks
    from pplex.evaluation.find import find
    from pplex.evaluation.measure import Method
    from pplex.evaluation.report import make_entries, write_report
    from pplex.evaluation.score import as_csv, score

    folder = path.parent / "outputs"
    folder.mkdir(exist_ok=True)
    pcm = 0.1 * np.sin(np.arange(2 * 2400).reshape(-1, 2) / 9)
    soundfile.write(folder / "a.wav", pcm, 24000)
    (folder / name).write_bytes(path.read_bytes())
    found, method = find([folder]), Method(vad="energy")
    page = folder / "page.html"
    entries = make_entries(found, method)
    write_report(page, entries, found.notes, "energy", "fuzz")
    _read_page(page.read_text(encoding="utf-8"), len(entries))
    for words in ("auto", "own"):
        result, _ = score(found, Method(vad="energy", words=words))
        text = json.dumps(result, ensure_ascii=False, allow_nan=False)
        assert text.encode("utf-8", "backslashreplace")
        assert score_table(result) and as_csv(result)
    checks = Checks(True, True, 1.0, 1.0, folder / "a.wav", "x")
    assert len(run_checks(folder / "a.wav", checks)) == 7


def _read_page(text: str, count: int) -> None:
    """As a browser would: JSON without NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    start = text.index(">", text.index('<script type="application/json"')) + 1
    content = text[start : text.index("</script>", start)]
    assert len(json.loads(content, parse_constant=refuse)) == count


def read_annotation(path: Path) -> None:
    """As each file of Full-Duplex-Bench in turn."""
    from pplex.evaluation import full_duplex_bench as bench

    for read in (bench.read_chunks, bench.read_human_timing):
        run(Target(read, "", _annotations), path)
    folder = path.parent / "sample"
    for name in (*bench.ANNOTATIONS, "metadata.json"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "input.wav").touch()
        (folder / name).write_bytes(path.read_bytes())
        run(Target(bench.read_sample, "", _annotations), folder)


def read_checkpoint(path: Path) -> None:
    """A model of sizes that config.json allows: loaded, it answers three frames.

    The weights of another model are refused by it.
    """
    from random_checkpoint import write_checkpoint

    from pplex.checkpoint.config import load_config
    from pplex.checkpoint.describe import describe
    from pplex.checkpoint.hub import resolve
    from pplex.conversation.prompts import make_role
    from pplex.conversation.scheduler import converse
    from pplex.conversation.session import load
    from pplex.model.sampling import GREEDY

    config = load_config(path)
    if not _is_small(config):
        return
    folder = path.parent / "model"
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(folder, config, voice_frames=3)
    shutil.copy(path, folder / "config.json")
    local = resolve(str(folder), offline=True)
    describe(local)
    model = load(local)
    start = model.engine.prefill(make_role(model, "NATF2", "a b").prompt)
    chunks = iter(np.full((3, 1, model.config.frame_size), 0.01, np.float32))
    for reply in converse(model.engine, start, 0, chunks, GREEDY, decode_frames=1):
        assert np.isfinite(reply.pcm).all()


def _is_small(config: ModelConfig) -> bool:
    """Whether a model of these sizes is made in a moment."""
    from pplex.checkpoint.codec_layout import published_shapes
    from pplex.checkpoint.layouts import published_matrices

    lm = published_matrices(config.lm, config.lm.dep_q, config.lm.dep_q)
    sizes = list(published_shapes(config.mimi).values())
    sizes += [matrix.shape for matrix in lm]
    memory = config.lm.context * config.kv_bytes(4)
    return sum(map(math.prod, sizes)) < 5_000_000 and memory < 1 << 28


def _files(*names: str) -> Callable[[], Iterator[bytes]]:
    def read() -> Iterator[bytes]:
        for name in names:
            yield (DATA / name).read_bytes()[: 1 << 18]

    return read


def _audio() -> Iterator[bytes]:
    import io

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


def _stats() -> Iterator[bytes]:
    figures = {
        "input": "in.wav",
        "outputs": {"audio": "a.wav", "transcript": "a.json"},
        **{"audio_s": 0.1, "tail_s": 0.0, "frames": 2, "real_time_factor": 0.5},
        "step_ms": {"p50": 1.0, "p95": 2.0, "late_frames": 0},
        **{"step_ms_series": [1.0, 2.0], "channel": 1, "seed": 3, "voice": "NATF0"},
        **{"prompt": "", "model": "mini", "device": "cpu"},
    }
    yield json.dumps(figures).encode()


def _transcripts() -> Iterator[bytes]:
    words = [
        {"text": "Good", "start_s": 0.0, "end_s": 0.05, "frame": 0},
        {"text": "day.", "start_s": 0.05, "end_s": 0.1, "frame": 1},
    ]
    yield json.dumps({"text": "Good day.", "duration_s": 0.1, "words": words}).encode()


def _batches() -> Iterator[bytes]:
    line = {
        **{"recording": "a.wav", "status": "done", "error": None, "settings": "s"},
        "input": {"path": "a.wav", "size": 3, "mtime_ns": 1, "sha256": "00"},
        "outputs": {"audio": {"path": "a.wav"}, "stats": {"path": "a.json"}},
        **{"audio_s": 0.1, "timings": {"read_s": 1.0}, "time": "2026", "extra": {}},
        "checks": [{"check": "says", "passed": False, "detail": "x"}],
    }
    failed = line | {"recording": "b.wav", "status": "failed", "outputs": {}}
    yield b"\n".join(json.dumps(one).encode() for one in (line, failed)) + b"\n"


def _locks() -> Iterator[bytes]:
    yield b'{"pid": 12, "host": "here"}\n{"begun": {"path": "a.wav"}}\n'


def _annotations() -> Iterator[bytes]:
    yield b'[{"text": "a", "timestamp": [0.5, 1.0]}]'
    yield b'{"chunks": [{"text": "a", "timestamp": [0.5, null]}]}'
    yield b'{"1": [0.25, 0.75], "2": [1.0]}'
    yield b'{"timestamps": [0.5, 1.0], "context_text": "a", "current_turn_text": "b"}'


def _tokenizers() -> Iterator[bytes]:
    from random_checkpoint import tokenizer_bytes

    yield tokenizer_bytes(200)
    yield (DATA.parents[1] / "pplex/mini/tokenizer_spm_32k_3.model").read_bytes()


def _configs() -> Iterator[bytes]:
    from random_checkpoint import config_json
    from small import SMALL

    yield json.dumps(config_json(SMALL)).encode()


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
    "lock": Target(read_lock, ".lock", _locks),
    "tokenizer": Target(read_tokenizer, ".model", _tokenizers),
    "stats": Target(read_side_file, ".json", _stats),
    "transcript": Target(read_side_file, ".json", _transcripts),
    "batch-folder": Target(read_batch_folder, ".jsonl", _batches),
    "annotation": Target(read_annotation, ".json", _annotations),
    "checkpoint": Target(read_checkpoint, ".json", _configs, slow=True),
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
