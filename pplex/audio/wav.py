"""The header of a WAV, RF64 or BW64 recording, from a file or a pipe alike.

libsndfile gives up on what other programs read: a length of 0 from a recorder that was
cut off, RF64 through a pipe, a malformed LIST before the samples. And it does not say
what lies behind the samples.
"""

import struct
from dataclasses import dataclass
from typing import BinaryIO, Literal, Protocol

from pplex.errors import PplexError

Encoding = Literal["u8", "s16le", "s24le", "s32le", "f32le", "f64le", "mulaw", "alaw"]

_MIN_SOURCE_RATE = 1_000
_MAX_SOURCE_RATE = 768_000
_MAX_CHANNELS = 64
MAX_HEADER_BYTES = 1 << 28  # what may come before the samples: tags, cover pictures

WAV_MAGIC = (b"RIFF", b"RF64", b"BW64")
UNKNOWN_LONG = 1 << 62
MPEG_TAGS = (0x50, 0x55)

# libsndfile's names for bare samples, and their bytes.
SUBTYPES: dict[Encoding, tuple[str, int]] = {
    "u8": ("PCM_U8", 1),
    "s16le": ("PCM_16", 2),
    "s24le": ("PCM_24", 3),
    "s32le": ("PCM_32", 4),
    "f32le": ("FLOAT", 4),
    "f64le": ("DOUBLE", 8),
    "mulaw": ("ULAW", 1),
    "alaw": ("ALAW", 1),
}
_ENCODINGS: dict[tuple[int, int], Encoding] = {
    (1, 1): "u8",
    (1, 2): "s16le",
    (1, 3): "s24le",
    (1, 4): "s32le",
    (3, 4): "f32le",
    (3, 8): "f64le",
    (6, 1): "alaw",
    (7, 1): "mulaw",
}
_EXTENSIBLE = 0xFFFE
_NAMES = (b"data", b"fmt ", b"fact", b"LIST", b"bext", b"id3 ")
_MAX_EMPTY_CHUNK = 1 << 24


class _Source(Protocol):
    """Bytes in order, from a file or a pipe."""

    def take(self, count: int) -> bytes:
        """``count`` bytes, fewer only at the end."""

    def skip(self, count: int) -> int:
        """Pass over bytes; how many there were."""

    def unread(self, content: bytes) -> None:
        """Put back what was taken last."""


class FileSource:
    """The bytes of an open file of ``size`` bytes."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def take(self, count: int) -> bytes:
        """``count`` bytes, fewer only at the end."""
        return self._file.read(count)

    def skip(self, count: int) -> int:
        """Pass over bytes; how many there were."""
        passed = min(count, max(0, self._size - self._file.tell()))
        self._file.seek(passed, 1)
        return passed

    def unread(self, content: bytes) -> None:
        """Put back what was taken last."""
        self._file.seek(-len(content), 1)


@dataclass(frozen=True)
class WavHeader:
    """What a header says; ``num_bytes`` of samples follow it, None where it is unknown.

    ``encoding`` is None for what is no plain sample, such as ADPCM; ``tag`` is then its
    number. ``is_unfinished`` where the length was never filled in.
    """

    encoding: Encoding | None
    tag: int
    bits: int
    rate: int
    channels: int
    num_bytes: int | None = None
    is_unfinished: bool = False


def read_wav_header(source: _Source, name: str) -> WavHeader:
    """Read the header of what ``name`` calls, up to where its samples begin."""
    source.skip(12)
    found: WavHeader | None = None
    long_size: int | None = None
    left = MAX_HEADER_BYTES
    while True:
        chunk, size = struct.unpack("<4sI", _whole(source, 8, name))
        if chunk == b"data":
            if found is None:
                raise _bad(name, "its samples come before their format")
            num_bytes, is_unfinished = _length(source, size, long_size)
            kept = found.encoding, found.tag, found.bits, found.rate, found.channels
            return WavHeader(*kept, num_bytes, is_unfinished)
        left -= 8 + size
        if left < 0:
            kind = chunk.decode("latin-1")
            raise _bad(name, f"{size} bytes of {kind!r} before the samples")
        if chunk == b"fmt ":
            known = found
            found = _parse_format(_whole(source, min(size, 64), name), name)
            if known not in (None, found):
                raise _bad(name, "it has two formats")
            source.skip(max(0, size - 64))
        elif chunk == b"ds64" and size >= 16:
            sizes = _whole(source, 16, name)
            long_size = int(struct.unpack("<8xQ", sizes)[0])
            long_size = long_size if 0 < long_size < UNKNOWN_LONG else None
            source.skip(size - 16)
        else:
            source.skip(size)
        _skip_padding(source, size)


def is_unknown(size: int) -> bool:
    """Whether a size of 32 bits stands for one that nobody knew.

    Programs that write into a pipe, or were stopped early, leave 0 or about the
    largest number there, less what comes before the samples: ffmpeg, sox, lame.
    """
    return size == 0 or 0x7EFFFF00 <= size <= 0x80000000 or size >= 0xFFFFFF00


def bytes_left_over(source: _Source, num_bytes: int, name: str) -> int:
    """Count what lies behind ``num_bytes`` of samples and is no chunk."""
    _skip_padding(source, num_bytes)
    while head := source.take(8):
        if head[:4] in (*WAV_MAGIC, b"RIFX", b"data"):
            raise second_recording(name)
        if not _is_chunk(head):
            return len(head) + source.skip(UNKNOWN_LONG)
        size = int(struct.unpack("<4xI", head)[0])
        passed = source.skip(size)
        if passed < size:
            return 8 + passed
        _skip_padding(source, size)
    return 0


def second_recording(name: str) -> PplexError:
    """The refusal of files that were joined."""
    return PplexError(
        f"{name} has a second recording behind the first, which would be lost; make "
        "one of them (ffmpeg -i INPUT OUTPUT.wav) or give each on its own"
    )


def check_format(name: str, rate: int, channels: int) -> None:
    """Refuse rates and numbers of channels that cannot be read."""
    if not _MIN_SOURCE_RATE <= rate <= _MAX_SOURCE_RATE:
        raise PplexError(
            f"{name} says its sample rate is {rate} Hz; "
            f"{_MIN_SOURCE_RATE} to {_MAX_SOURCE_RATE} Hz can be read"
        )
    if not 1 <= channels <= _MAX_CHANNELS:
        raise PplexError(
            f"{name} says it has {channels} channels; 1 to {_MAX_CHANNELS} can be read"
        )


def _length(
    source: _Source, size: int, long_size: int | None
) -> tuple[int | None, bool]:
    """Bytes of samples, None if unknown; whether 0 stands where samples follow."""
    if long_size is not None and is_unknown(size):
        return long_size, False
    if size:
        return (None if is_unknown(size) else size), False
    head = source.take(8)
    source.unread(head)
    is_small = int.from_bytes(head[4:], "little") < _MAX_EMPTY_CHUNK
    if not head or (_is_chunk(head) and is_small):
        return 0, False
    return None, True


def _is_chunk(head: bytes) -> bool:
    name = head[:4].replace(b" ", b"0").replace(b"_", b"0")
    return len(head) == 8 and name.isalnum()


def _skip_padding(source: _Source, size: int) -> None:
    """Pass over the byte that makes a chunk even; some programs leave it out."""
    if not size & 1:
        return
    head = source.take(5)
    is_left_out = _is_chunk(head[:4] + bytes(4)) and head[1:] not in _NAMES
    source.unread(head if is_left_out else head[1:])


def _whole(source: _Source, count: int, name: str) -> bytes:
    content = source.take(count)
    if len(content) < count:
        raise _bad(name, "it ends before its samples")
    return content


def _bad(name: str, why: str) -> PplexError:
    return PplexError(
        f"{name} is not WAV that can be read: {why}; convert it "
        "(ffmpeg -i INPUT OUTPUT.wav)"
    )


def _parse_format(content: bytes, name: str) -> WavHeader:
    if len(content) < 16:
        raise _bad(name, "its format has too few bytes")
    tag, channels, rate, _, align, bits = struct.unpack("<HHIIHH", content[:16])
    if tag == _EXTENSIBLE and len(content) >= 26:
        tag = struct.unpack("<H", content[24:26])[0]
    encoding = _ENCODINGS.get((tag, -(-bits // 8)))
    check_format(name, rate, channels)
    if encoding is not None:
        width = SUBTYPES[encoding][1] * channels
        if align != width:
            raise _bad(name, f"{align} bytes a sample where {width} are")
    return WavHeader(encoding, tag, bits, rate, channels)
