"""What the header of other containers than WAV promises, against the bytes there.

libsndfile clips a length that is too large to the end of the file without a word, so
a half copied recording would pass as a short one; and it reads some files on beyond
the length that their header names.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pplex.audio.wav import UNKNOWN_LONG, is_unknown, second_recording

_MAX_CHUNKS = 10_000
_MAGIC = (b"RIFX", b"FORM", b"riff", b"caff", b".snd", b"NIST")
_SPHERE_FIELDS = ("sample_count", "channel_count", "sample_n_bytes")


@dataclass(frozen=True)
class Extent:
    """Where samples begin and end; ``end`` is None where the header has no length.

    ``left_over`` counts bytes behind them that are no chunk.
    """

    start: int
    end: int | None
    left_over: int = 0


@dataclass(frozen=True)
class _Chunks:
    """How chunks are laid out: from where, and the header of each.

    ``counted`` is how much of the header its size counts, ``name`` the bytes of a name.
    """

    first: int
    header: str
    name: int
    samples: bytes
    before: int = 0  # bytes of the chunk before its samples
    counted: int = 0
    align: int = 2


_LAYOUTS = {
    b"RIFX": _Chunks(12, ">4sI", 4, b"data"),
    b"FORM": _Chunks(12, ">4sI", 4, b"SSND", before=8),
    b"riff": _Chunks(40, "<16sQ", 16, b"data", counted=24, align=8),
    b"caff": _Chunks(8, ">4sQ", 4, b"data", before=4, align=1),
}


def extent(file: BinaryIO, size: int, name: str) -> Extent | None:
    """The samples of an AIFF, AU, CAF, W64, RIFX or SPHERE file of ``size`` bytes.

    None where there are none.
    """
    file.seek(0)
    magic = file.read(4)
    found: Extent | None = None
    if magic == b".snd":
        start, length = struct.unpack(">II", file.read(8).ljust(8, b"\0"))
        is_known = length and not is_unknown(length)
        found = Extent(start, start + length if is_known else None)
    elif magic == b"NIST":
        found = _sphere(file)
    elif magic in _LAYOUTS:
        return _in_chunks(file, size, _LAYOUTS[magic], name)
    if found is not None and found.end is not None and found.end < size:
        file.seek(found.end)
        if file.read(4) in _MAGIC:
            raise second_recording(name)
        return Extent(found.start, found.end, size - found.end)
    return found


def _sphere(file: BinaryIO) -> Extent | None:
    file.seek(8)
    try:
        start = int(file.readline(16))
        file.seek(0)
        head = file.read(min(start, 1 << 16)).decode("latin-1")
        fields = dict(re.findall(r"^(\w+) -i (\d+)", head, re.MULTILINE))
        count, channels, width = (int(fields[field]) for field in _SPHERE_FIELDS)
    except (ValueError, KeyError):
        return None
    return Extent(start, start + count * channels * width if count else None)


def _in_chunks(file: BinaryIO, size: int, layout: _Chunks, name: str) -> Extent | None:
    found: Extent | None = None
    for position, chunk, length in _chunks(file, size, layout):
        end = position + struct.calcsize(layout.header) + length
        if found is None:
            if chunk[:4] == layout.samples:
                start = end - length + layout.before
                narrow = struct.calcsize(layout.header) == 8
                if length >= UNKNOWN_LONG or (narrow and is_unknown(length)):
                    return Extent(start, None)
                found = Extent(start, end)
        elif chunk[:4] in (*_MAGIC, layout.samples):
            raise second_recording(name)
        elif not chunk[:4].strip().isalnum() or end > size:
            return Extent(found.start, found.end, size - position)
    return found


def _chunks(
    file: BinaryIO, size: int, layout: _Chunks
) -> Iterator[tuple[int, bytes, int]]:
    """Position, name and length without its header of each chunk."""
    position = layout.first
    head_size = struct.calcsize(layout.header)
    for _ in range(_MAX_CHUNKS):
        if position >= size:  # lengths of 64 bits lead further than files can be
            return
        file.seek(position)
        head = file.read(head_size)
        chunk, length = struct.unpack(layout.header, head.ljust(head_size, b"\0"))
        length = length - layout.counted
        if length < 0:
            length = UNKNOWN_LONG if chunk[:4] == layout.samples else 0
        yield position, chunk, length
        position += head_size + length
        position += -position % layout.align
