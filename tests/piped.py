"""``pplex`` as a process of its own, with pipes to write to and read from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

RATE = 24000
FRAME = 1920
HEADER = 44


def start(*args: object, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options):
    """Start ``pplex`` with arguments."""
    return subprocess.Popen(
        [sys.executable, "-m", "pplex", *map(str, args)],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        bufsize=0,
        **options,
    )


def pipe(content: bytes, *args: object) -> tuple[int, bytes, str]:
    """Give ``pplex`` an input; its exit code, output and messages."""
    process = start(*args)
    out, err = process.communicate(content, timeout=120)
    return process.returncode, out, err.decode()


def read_exactly(file, count: int) -> bytes:
    """Read ``count`` bytes of an unbuffered file, fewer at its end."""
    content = b""
    while len(content) < count and (part := file.read(count - len(content))):
        content += part
    return content


def samples(path: Path) -> bytes:
    """The bytes of a WAV file after its header."""
    return path.read_bytes()[HEADER:]


def noise(*shape: int) -> np.ndarray:
    """Samples in [-0.3, 0.3]."""
    return np.random.default_rng(1).uniform(-0.3, 0.3, shape).astype(np.float32)
