"""MPEG, Ogg and FLAC, which promise little: what their own frames and pages say.

libsndfile reads the first of joined recordings, stops where it guesses that an MP3
ends, and takes a half file for a whole one, all without a word. Here each frame and
page is walked over by its header, and nothing is decoded.
"""

import re
import struct
from dataclasses import dataclass
from typing import Protocol

from pplex.audio.wav import second_recording
from pplex.errors import PplexError
from pplex.units import counted

_BLOCK = 1 << 16
_MAX_FLAC_FRAME = 1 << 19
_MAX_TRIES = 3
_AGAIN = "copy it again, or keep what there is (ffmpeg -i INPUT OUTPUT.wav)"


class _Readable(Protocol):
    """A file, or a part of one."""

    def seek(self, offset: int, whence: int = 0, /) -> int: ...

    def read(self, count: int = -1, /) -> bytes: ...


@dataclass(frozen=True)
class Packets:
    """What was walked over.

    ``num_frames`` is what can be decoded of it at the least, in samples a channel, None
    where that is not known here; ``left_over`` counts bytes that are neither sound nor
    a tag. Where ``is_estimated``, libsndfile only guesses how long it is.
    """

    num_frames: int | None = None
    left_over: int = 0
    lacks_start: bool = False
    is_estimated: bool = False


# --- MPEG, layers I to III

_KBITS = {
    (1, 1): range(32, 449, 32),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
# How a frame or a tag begins.
_MPEG_STARTS = re.compile(rb"\xff[\xe0-\xff]|ID3|TAG|APETAGEX|LYRICSBEGIN")
_RATES = (44100, 48000, 32000)
_FREE_FORMAT = 0


@dataclass(frozen=True)
class _MpegFrame:
    """A frame's header: ``kind`` is the same in all frames of a recording."""

    kind: tuple[int, int, int]  # version 1, 2 or 2.5 (as 4), layer, rate
    is_mono: bool
    has_crc: bool
    num_bytes: int
    num_samples: int

    @property
    def side_info(self) -> int:
        """Where layer III's side information begins in a frame."""
        return 6 if self.has_crc else 4

    @property
    def main_data(self) -> int:
        """Where the side information ends in a frame without a checksum."""
        if self.kind[0] == 1:
            return 4 + (17 if self.is_mono else 32)
        return 4 + (9 if self.is_mono else 17)


@dataclass(frozen=True)
class _MpegInfo:
    """What the frame before the sound says: frames, bytes with its own.

    ``cut`` is how many samples the encoder put before and behind the sound.
    """

    num_frames: int | None
    num_bytes: int
    cut: int


def _mpeg_frame(head: bytes) -> _MpegFrame | None:
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version = {0: 4, 2: 2, 3: 1}.get(head[1] >> 3 & 3)
    layer = 4 - (head[1] >> 1 & 3)
    kbit_idx, rate_idx = head[2] >> 4, head[2] >> 2 & 3
    if version is None or layer == 4 or rate_idx == 3 or kbit_idx in (_FREE_FORMAT, 15):
        return None
    rate = _RATES[rate_idx] // version
    bits = 1000 * _KBITS[min(version, 2), layer][kbit_idx - 1]
    padding = head[2] >> 1 & 1
    num_samples = 384 if layer == 1 else 576 if version > 1 and layer == 3 else 1152
    num_bytes = num_samples // 8 * bits // rate + padding
    if layer == 1:
        num_bytes = (12 * bits // rate + padding) * 4
    return _MpegFrame(
        (version, layer, rate),
        head[3] >> 6 == 3,
        not head[1] & 1,
        num_bytes,
        num_samples,
    )


def walk_mpeg(file: _Readable, size: int, name: str) -> Packets:
    """Walk over an MPEG recording of ``size`` bytes; refuse one that is not whole."""
    position = lost = lost_now = count = 0
    kind: tuple[int, int, int] | None = None
    info = None
    num_samples = num_bytes = 0
    lacks_start = False
    while position < size:
        file.seek(position)
        head = file.read(192)
        if tag := _tag_bytes(file, head):
            position += tag
            continue
        frame = _mpeg_frame(head)
        if frame is not None and kind is not None and frame.kind != kind:
            file.seek(position + frame.num_bytes)
            after = _mpeg_frame(file.read(4))
            if after is not None and after.kind == frame.kind:
                raise second_recording(name)
            frame = None
        if frame is None:
            skipped = _next_frame(file, position + 1, size, kind) - position
            lost_now += skipped
            position += skipped
            continue
        if lost_now and kind is None:
            raise PplexError(
                f"{name} begins with {counted(lost_now, 'byte')} of no whole frame: "
                f"its start is cut off; {_AGAIN}"
            )
        lost, lost_now = lost + lost_now, 0
        if position + frame.num_bytes > size:
            raise PplexError(
                f"{name} is truncated: its last frame lacks "
                f"{counted(position + frame.num_bytes - size, 'byte')}; {_AGAIN}"
            )
        position += frame.num_bytes
        num_bytes += frame.num_bytes
        found = _mpeg_info(head, frame)
        if kind is None:
            kind, info = frame.kind, found
            if info is not None:
                continue
        elif found is not None and info is not None:
            raise second_recording(name)
        if not count and frame.kind[1] == 3:
            lacks_start = _refers_back(head, frame)
        count += 1
        num_samples += frame.num_samples
    if not count:
        raise PplexError(f"{name} holds no samples; give a recording with sound")
    info = info or _MpegInfo(None, 0, 0)
    promised = info.num_frames
    if promised is not None and count > promised + 1:
        raise second_recording(name)
    # Some encoders count their own first frame too; its bytes all count.
    if promised is not None and count < promised and num_bytes < info.num_bytes:
        raise PplexError(
            f"{name} is truncated: its header promises {promised} frames and {count} "
            f"are there; {_AGAIN}"
        )
    return Packets(
        num_frames=max(0, num_samples - info.cut),
        left_over=lost + lost_now,
        lacks_start=lacks_start,
        is_estimated=promised is None,
    )


def _tag_bytes(file: _Readable, head: bytes) -> int:
    """Bytes of the tag that begins with ``head``, 0 if it is none."""
    if head[:3] == b"ID3" and len(head) >= 10 and max(head[6:10]) < 128:
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        return 10 + size + (10 if head[5] & 0x10 else 0)
    if head[:4] == b"TAG+":
        return 227
    if head[:3] == b"TAG":
        return 128
    if head[:8] == b"APETAGEX" and len(head) >= 32:
        _, size, _, flags = struct.unpack("<IIII", head[8:24])
        return size + 32 if flags & 0x20000000 else 32
    if head[:11] == b"LYRICSBEGIN":
        file.seek(-len(head), 1)
        content = file.read(_BLOCK)
        ends = [content.find(end) for end in (b"LYRICS200", b"LYRICSEND")]
        return min((end + 9 for end in ends if end > 0), default=0)
    return 0


def _next_frame(
    file: _Readable, start: int, size: int, kind: tuple[int, int, int] | None
) -> int:
    """Where the next frame or tag begins, ``size`` if none does.

    A frame counts if another, or the end, follows it.
    """
    while start < size:
        file.seek(start)
        block = file.read(_BLOCK)
        for match in _MPEG_STARTS.finditer(block):
            position = start + match.start()
            file.seek(position)
            head = file.read(192)
            if _tag_bytes(file, head):
                return position
            frame = _mpeg_frame(head)
            if frame is None or (kind is not None and frame.kind != kind):
                continue
            file.seek(position + frame.num_bytes)
            after = _mpeg_frame(file.read(4))
            is_last = position + frame.num_bytes == size
            if is_last or (after is not None and after.kind == frame.kind):
                return position
        # What begins at the end of a block is in the next one, too.
        start += max(1, len(block) - 10)
    return size


def _mpeg_info(head: bytes, frame: _MpegFrame) -> _MpegInfo | None:
    """What a Xing, Info or VBRI frame says, None where it is a frame of sound."""
    if frame.kind[1] != 3:
        return None
    if head[36:40] == b"VBRI":
        return _MpegInfo(int.from_bytes(head[50:54], "big"), 1 << 62, 0)
    start = frame.main_data
    if head[start : start + 4] not in (b"Xing", b"Info"):
        return None
    flags = int.from_bytes(head[start + 4 : start + 8], "big")
    position, fields = start + 8, []
    for bit, length in ((1, 4), (2, 4), (4, 100), (8, 4)):
        is_there = flags & bit
        field = int.from_bytes(head[position : position + 4], "big")
        fields.append(field if is_there else None)
        position += length if is_there else 0
    delays = int.from_bytes(head[position + 21 : position + 24], "big")
    whole = 1 << 62 if fields[1] is None else fields[1]
    return _MpegInfo(fields[0], whole, (delays >> 12) + (delays & 0xFFF))


def _refers_back(head: bytes, frame: _MpegFrame) -> bool:
    """Whether a frame of layer III has a part of its bits in frames before it."""
    start = frame.side_info
    bits = int.from_bytes(head[start : start + 2], "big")
    return bits >> (7 if frame.kind[0] == 1 else 8) > 0


# --- Ogg


def walk_ogg(file: _Readable, size: int, name: str) -> Packets:
    """Walk over the pages of an Ogg recording; refuse one that is not whole."""
    position, serial, number, ended = 0, b"", 0, False
    while position < size:
        file.seek(position)
        head = file.read(27)
        if head[:4] != b"OggS":
            break
        lacing = file.read(head[26]) if len(head) == 27 else b""
        end = position + 27 + len(lacing) + sum(lacing)
        if len(head) < 27 or len(lacing) < head[26] or end > size:
            raise _cut_ogg(name)
        begins = bool(head[5] & 2)
        if begins and position:
            raise second_recording(name)
        own, page = head[14:18], int(struct.unpack("<I", head[18:22])[0])
        if not position:
            serial, number = own, page
        elif own != serial or page != number:
            raise PplexError(
                f"{name} is damaged: a part is missing at byte {position}; {_AGAIN}"
            )
        number += 1
        ended = bool(head[5] & 4)
        position = end
    file.seek(position)
    rest = file.read(_BLOCK)
    if rest[:3] == b"TAG":
        position += min(128, len(rest))
    elif _has_later(file, rest, b"OggS"):
        raise PplexError(f"{name} is damaged at byte {position}; {_AGAIN}")
    if not ended:
        raise _cut_ogg(name)
    return Packets(left_over=size - position)


def _cut_ogg(name: str) -> PplexError:
    return PplexError(f"{name} is truncated: its last page is missing; {_AGAIN}")


def _has_later(file: _Readable, block: bytes, mark: bytes) -> bool:
    """Whether ``mark`` is in ``block`` or in what follows it in ``file``."""
    while block:
        if mark in block:
            return True
        more = file.read(_BLOCK)
        block = block[1 - len(mark) :] + more if more else b""
    return False


# --- FLAC

_STREAMINFO = 4 + 4 + 34  # the mark, a block's head, the block


def walk_flac(file: _Readable, size: int, name: str) -> Packets:
    """Find the last frame of a FLAC recording, which says how long it is."""
    file.seek(0)
    start = _tag_bytes(file, file.read(192))
    file.seek(start)
    info = file.read(_STREAMINFO)
    if info[:4] != b"fLaC" or len(info) < _STREAMINFO:
        raise PplexError(f"{name} is not FLAC that can be read; convert it to WAV")
    if _has_later(file, file.read(_BLOCK), info[:4] + b"\0\0\0\x22"):
        raise second_recording(name)
    block_size = int.from_bytes(info[10:12], "big")
    begin = max(start + _STREAMINFO, size - _MAX_FLAC_FRAME)
    file.seek(begin)
    content = file.read(size - begin)
    if content[-128:-125] == b"TAG":
        content = content[:-128]
    # What looks like a frame's start may lie within one.
    found: tuple[int, bytes] | None = None
    sync = len(content)
    for _ in range(_MAX_TRIES):
        sync, num_frames = _last_flac_frame(content, sync, block_size)
        if sync < 0:
            break
        length = _crc16_end(content[sync:])
        if length == len(content) - sync:
            return Packets(num_frames)
        if found is None:
            found = num_frames, content[sync + (length or 0) :]
    if found is None or found[1][:1] == b"\xff":  # a frame that has only begun
        raise PplexError(f"{name} is truncated: its last frame is not whole; {_AGAIN}")
    return Packets(found[0], len(found[1]))


def _last_flac_frame(content: bytes, end: int, block_size: int) -> tuple[int, int]:
    """Where the last frame before ``end`` begins, -1 for none; samples to its end."""
    while (sync := content.rfind(b"\xff", 0, end)) >= 0:
        head = content[sync : sync + 16].ljust(16, b"\0")
        num_frames = _flac_frame(head, block_size)
        if num_frames is not None:
            return sync, num_frames
        end = sync
    return -1, 0


def with_total(content: bytes, num_frames: int) -> bytes:
    """The start of a FLAC file with its number of samples filled in."""
    mark = content.find(b"fLaC") + 18
    word = int.from_bytes(content[mark : mark + 8], "big") >> 36 << 36 | num_frames
    return content[:mark] + word.to_bytes(8, "big") + content[mark + 8 :]


def flac_total(content: bytes) -> int:
    """Samples a channel that a FLAC header promises, 0 where it does not know."""
    mark = content.find(b"fLaC") + 18
    return int.from_bytes(content[mark : mark + 8], "big") & ((1 << 36) - 1)


def _flac_frame(head: bytes, block_size: int) -> int | None:
    """Samples up to the end of the frame that begins with ``head``."""
    if head[1] & 0xFE != 0xF8 or head[2] & 0xF0 == 0:
        return None
    lead = head[4]
    length = 1
    number = lead
    if lead >= 0xC0:
        length = next((n for n in range(2, 8) if lead < 256 - (1 << 7 - n)), 7)
        number = lead & (1 << max(0, 7 - length)) - 1
        for byte in head[5 : 4 + length]:
            if byte & 0xC0 != 0x80:
                return None
            number = number << 6 | byte & 0x3F
    elif lead >= 0x80:
        return None
    position = 4 + length
    code = head[2] >> 4
    if code in (6, 7):
        own = int.from_bytes(head[position : position + code - 5], "big") + 1
        position += code - 5
    elif code == 1:
        own = 192
    else:
        own = 576 << code - 2 if code < 6 else 256 << code - 8
    position += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    crc = 0
    for byte in head[:position]:
        crc ^= byte
        for _ in range(8):
            crc = crc << 1 ^ (0x107 if crc & 0x80 else 0)
    if crc != head[position]:
        return None
    return own + (number if head[1] & 1 else number * block_size)


def _crc16_table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ (0x18005 if crc & 0x8000 else 0)) & 0x1FFFF
        table.append(crc & 0xFFFF)
    return table


def _crc16_end(content: bytes) -> int | None:
    """Length of the longest start of ``content`` that ends in its own checksum."""
    table, crc, found = _crc16_table(), 0, None
    for idx, byte in enumerate(content):
        crc = (crc << 8 & 0xFF00) ^ table[crc >> 8 ^ byte]
        if not crc and idx > 6:
            found = idx + 1
            if idx + 1 == len(content):
                break
    return found
