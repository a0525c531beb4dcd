"""What a chunked audio header promises, against the bytes that are there.

libsndfile clips a length that is too large to the end of the file without a word, so
a half copied recording would pass as a short one.
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO

# Written by programs that stream into a pipe and do not know the length: ffmpeg, sox,
# arecord; 0 by those that were stopped before they could fill it in.
_UNKNOWN_SIZES = {0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF}
_UNKNOWN_LONG = 1 << 62

_MAX_CHUNKS = 10_000


def missing_bytes(path: Path) -> int:
    """Count the bytes of audio that a WAV, RF64, W64, AIFF or AU file lacks.

    0 for a whole file, a header of unknown length, and every other format.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(24)
        promised = _data_end(file, start)
    return max(0, promised - size)


def _data_end(file: BinaryIO, start: bytes) -> int:
    """Byte position at which the header says the audio data ends; 0 if unknown."""
    if start[:4] in (b"RIFF", b"RF64", b"BW64") and start[8:12] == b"WAVE":
        return _chunks_end(file, "<", b"data")
    if start[:4] == b"RIFX" and start[8:12] == b"WAVE":
        return _chunks_end(file, ">", b"data")
    if start[:4] == b"FORM" and start[8:12] in (b"AIFF", b"AIFC"):
        return _chunks_end(file, ">", b"SSND")
    if start[:4] == b"riff" and len(start) == 24:
        whole = int(struct.unpack("<Q", start[16:24])[0])  # W64: size of the file
        return whole if whole < _UNKNOWN_LONG else 0
    if start[:4] == b".snd" and len(start) >= 12:
        offset, length = struct.unpack(">II", start[4:12])
        return 0 if length in _UNKNOWN_SIZES else offset + length
    return 0


def _chunks_end(file: BinaryIO, endian: str, wanted: bytes) -> int:
    """End of the first chunk named `wanted`, as its own size field has it."""
    position = 12
    long_size = 0
    for _ in range(_MAX_CHUNKS):
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            return 0
        name, size = header[:4], struct.unpack(endian + "I", header[4:])[0]
        if name == b"ds64":  # RF64: 64-bit sizes of the file and of its data
            sizes = file.read(16)
            if len(sizes) == 16:
                long_size = int(struct.unpack("<Q", sizes[8:])[0])
        if name == wanted:
            if size == 0xFFFFFFFF and long_size:
                return position + 8 + long_size if long_size < _UNKNOWN_LONG else 0
            return 0 if size in _UNKNOWN_SIZES else position + 8 + int(size)
        position += 8 + size + (size & 1)
    return 0
