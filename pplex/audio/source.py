"""A recording opened: what its bytes are, and that all of it is there.

WAV is found by our own reader of headers, which pipes have too, so that a file and a
pipe agree; libsndfile decodes it and everything else. What cannot be answered whole is
refused; what is odd and does no harm is a warning.
"""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from pplex.audio.headers import extent
from pplex.audio.packets import (
    Packets,
    flac_total,
    walk_flac,
    walk_mpeg,
    walk_ogg,
    with_total,
)
from pplex.audio.stderr import decoder_lines
from pplex.audio.wav import (
    MPEG_TAGS,
    SUBTYPES,
    WAV_MAGIC,
    FileSource,
    WavHeader,
    bytes_left_over,
    check_format,
    read_wav_header,
)
from pplex.errors import PplexError
from pplex.files import open_without_waiting
from pplex.units import counted

_BLOCK_SAMPLES = 1 << 19  # read at a time, all channels together: 2 MB
# Of an MP3 without a length libsndfile guesses one from its size, and stops there.
_GUESS_FACTOR = 1 << 10
_ID3V1_BYTES = 128
_WIDTHS = {subtype: width for subtype, width in SUBTYPES.values()} | {"PCM_S8": 1}
_HEAD_BYTES = 1 << 16


class _Window(io.RawIOBase):
    """A part of a file as a file of its own.

    ``head`` replaces its first bytes; ``stated`` is the size that it claims.
    """

    def __init__(
        self,
        file: BinaryIO,
        start: int,
        size: int,
        *,
        head: bytes = b"",
        factor: int = 1,
    ) -> None:
        super().__init__()
        self._file, self._start, self.size = file, start, size
        self._head, self._stated = head, size * factor
        self._position = 0
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._stated}
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        position, count = self._position, len(buffer)
        if position < len(self._head):
            content = self._head[position : position + count]
        elif position >= self.size:
            # Where a tag is looked for at the end that is claimed, there is none.
            is_tag = position >= self._stated - _ID3V1_BYTES
            content = bytes(min(count, max(0, self._stated - position) * is_tag))
        else:
            content = self._read(position, min(count, self.size - position))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def _read(self, position: int, count: int) -> bytes:
        """Bytes of the file; libsndfile is not to see a disk that fails."""
        try:
            self._file.seek(self._start + position)
            return self._file.read(count)
        except OSError as e:
            self.error = e
            return b""


class _Samples16:
    """Samples of 16 bits, as libsndfile gives them.

    That asks Python for 8 KB at a time: where many recordings are read beside a model,
    each of a hundred times it waits for all others.
    """

    format, subtype = "RAW", "PCM_16"

    def __init__(self, window: _Window, rate: int, channels: int) -> None:
        self._window, self.samplerate, self.channels = window, rate, channels
        self.frames = window.size // (2 * channels)

    def read(self, count: int, **form: Any) -> np.ndarray:
        """The next float32 (frames, channels), at most ``count``."""
        content = self._window.read(2 * self.channels * count) or b""
        whole = len(content) // (2 * self.channels) * self.channels
        samples = np.frombuffer(content, "<i2", whole).astype(np.float32)
        samples *= 2.0**-15
        return samples.reshape(-1, self.channels)


class SoundSource:
    """An open recording; ``warnings`` are complete when its blocks were read."""

    def __init__(
        self,
        name: str,
        sound: soundfile.SoundFile | _Samples16,
        *,
        kind: str | None = None,
        num_frames: int | None = None,
        packets: Packets | None = None,
    ) -> None:
        """``num_frames`` are taken and no more, or all that there are."""
        self._name, self._sound = name, sound
        self._packets = packets or Packets()
        self.rate, self.channels = sound.samplerate, sound.channels
        self.format, self.subtype = kind or sound.format, sound.subtype
        estimate = self._packets.num_frames if self._is_mpeg else None
        self.num_frames: int = sound.frames if estimate is None else estimate
        if num_frames is not None:
            self.num_frames = min(self.num_frames, num_frames)
        self.warnings: list[str] = []
        if self._packets.left_over:
            self.warn_left_over(self._packets.left_over)
        if self._packets.lacks_start:
            self.warnings.append(
                f"{name} begins with a frame that needs those before it: its start may "
                "be cut off"
            )

    @property
    def _is_mpeg(self) -> bool:
        return str(self.subtype).startswith("MPEG")

    def warn_left_over(self, count: int) -> None:
        """Say that so many bytes are no part of the sound."""
        self.warnings.append(left_over(self._name, count))

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield float32 (frames, channels); refuse what ends before its promise."""
        size = max(1, _BLOCK_SAMPLES // self.channels)
        limit = None if self._is_mpeg else self.num_frames
        faults: list[str] = []
        done = 0
        while limit is None or done < limit:
            count = size if limit is None else min(size, limit - done)
            try:
                block = self._read(count, faults)
            except (soundfile.LibsndfileError, RuntimeError) as e:
                reason = getattr(e, "error_string", None) or e
                raise PplexError(
                    f"{self._name} is damaged or truncated: it cannot be decoded "
                    f"beyond {done / self.rate:.2f} s ({reason})"
                ) from e
            if not len(block):
                break
            done += len(block)
            yield block
        if done < self.num_frames:
            raise _too_few(self._name, self.num_frames, done)
        if faults:
            times = f"{len(faults)} times" if len(faults) > 1 else "once"
            self.warnings.append(
                f"{self._name} is damaged: its MPEG decoder complained {times} "
                f"({faults[0]})"
            )

    def _read(self, count: int, faults: list[str]) -> np.ndarray:
        block: np.ndarray
        if not self._is_mpeg:
            block = self._sound.read(count, dtype="float32", always_2d=True)
            return block
        with decoder_lines() as lines:
            block = self._sound.read(count, dtype="float32", always_2d=True)
        faults += lines
        return block


@contextmanager
def open_source(path: Path) -> Iterator[SoundSource]:
    """Open a recording, or refuse it by what can be seen without decoding it."""
    name = str(path)
    _check_file(path)
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        size = os.fstat(file.fileno()).st_size
        start = file.read(12)
        file.seek(0)
        if start[:4] in WAV_MAGIC and start[8:] == b"WAVE":
            source = _open_wav(stack, file, size, name, start[:4])
        else:
            source = _open_other(stack, file, size, name)
        check_format(name, source.rate, source.channels)
        yield source


def _open_wav(
    stack: ExitStack, file: BinaryIO, size: int, name: str, magic: bytes
) -> SoundSource:
    header = read_wav_header(FileSource(file, size), name)
    start = file.tell()
    num_bytes = size - start if header.num_bytes is None else header.num_bytes
    if start + num_bytes > size:
        raise _truncated(name, start + num_bytes - size)
    surplus = 0
    if header.num_bytes is not None:
        file.seek(start + num_bytes)
        surplus = bytes_left_over(FileSource(file, size), num_bytes, name)
    kind = "WAV" if magic == b"RIFF" else "RF64"
    window = _Window(file, start, num_bytes)
    if header.encoding is not None:
        source = SoundSource(name, _open_bare(stack, name, window, header), kind=kind)
        surplus += num_bytes % (SUBTYPES[header.encoding][1] * header.channels)
    elif header.tag in MPEG_TAGS and num_bytes:
        source = _open_mpeg(stack, file, start, num_bytes, name, kind)
    else:
        source = SoundSource(name, _open_sound(stack, name, name))
    if surplus:
        source.warn_left_over(surplus)
    if header.is_unfinished:
        source.warnings.append(unfinished(name))
    return source


def left_over(name: str, count: int) -> str:
    """What is said of bytes that are no part of the sound."""
    bytes_are = "byte is" if count == 1 else "bytes are"
    return f"{name}: {count} {bytes_are} left over behind its sound"


def unfinished(name: str) -> str:
    """What is said of a header whose length was never filled in."""
    return f"{name}: its header has no length; all that follows it was taken"


def _open_other(stack: ExitStack, file: BinaryIO, size: int, name: str) -> SoundSource:
    sound = _open_sound(stack, name, name)
    kind = sound.format
    if kind == "MP3":
        return _open_mpeg(stack, file, 0, size, name, kind)
    if kind == "OGG":
        return SoundSource(name, sound, packets=walk_ogg(file, size, name))
    if kind == "FLAC":
        return _open_flac(stack, file, size, name)
    found = extent(file, size, name)
    if found is None:
        raise PplexError(
            f"{name} is {kind}, of which nobody can tell whether all of it is there; "
            f"convert it (ffmpeg -i {name} OUTPUT.wav)"
        )
    num_frames = None
    if found.end is not None:
        if found.end > size:
            raise _truncated(name, found.end - size)
        if width := _WIDTHS.get(sound.subtype):
            num_frames = (found.end - found.start) // (width * sound.channels)
    source = SoundSource(name, sound, num_frames=num_frames)
    if found.left_over:
        source.warn_left_over(found.left_over)
    if found.end is None:
        source.warnings.append(unfinished(name))
    return source


def _open_mpeg(
    stack: ExitStack, file: BinaryIO, start: int, size: int, name: str, kind: str
) -> SoundSource:
    packets = walk_mpeg(_Window(file, start, size), size, name)
    factor = _GUESS_FACTOR if packets.is_estimated else 1
    window = _Window(file, start, size, factor=factor)
    sound = _open_sound(stack, name, window)
    return SoundSource(name, sound, kind=kind, packets=packets)


def _open_flac(stack: ExitStack, file: BinaryIO, size: int, name: str) -> SoundSource:
    packets = walk_flac(file, size, name)
    assert packets.num_frames is not None
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    promised = flac_total(head)
    if promised > packets.num_frames:
        raise _too_few(name, promised, packets.num_frames)
    window = _Window(file, 0, size, head=with_total(head, packets.num_frames))
    source = SoundSource(name, _open_sound(stack, name, window), packets=packets)
    if 0 < promised < packets.num_frames:
        source.warnings.append(
            f"{name}: its header names {promised} samples a channel and "
            f"{packets.num_frames} are there; all were taken"
        )
    return source


def _open_bare(
    stack: ExitStack, name: str, window: _Window, header: WavHeader
) -> soundfile.SoundFile | _Samples16:
    assert header.encoding is not None
    if header.encoding == "s16le":
        return _Samples16(window, header.rate, header.channels)
    layout = {
        "format": "RAW",
        "subtype": SUBTYPES[header.encoding][0],
        "samplerate": header.rate,
        "channels": header.channels,
        "endian": "LITTLE",
    }
    return _open_sound(stack, name, window, **layout)


def _open_sound(
    stack: ExitStack, name: str, file: str | _Window, **layout: Any
) -> soundfile.SoundFile:
    try:
        with decoder_lines():
            return stack.enter_context(soundfile.SoundFile(file, **layout))
    except (soundfile.LibsndfileError, TypeError) as e:
        reason = getattr(e, "error_string", None) or "bare samples"
        raise PplexError(
            f"{name} is not an audio file that can be read ({reason}); convert it "
            f"(ffmpeg -i {name} OUTPUT.wav)"
        ) from e


def _too_few(name: str, promised: int, found: int) -> PplexError:
    return PplexError(
        f"{name} is damaged or truncated: it promises {promised} samples a channel and "
        f"holds {found}; copy or record it again"
    )


def _truncated(name: str, missing: int) -> PplexError:
    return PplexError(
        f"{name} is truncated: it lacks {counted(missing, 'byte')} that its header "
        "promises; copy or record it again"
    )


def _check_file(path: Path) -> None:
    """Refuse, with its own sentence each, what libsndfile would only call bad."""
    try:
        with open(path, "rb", opener=open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode):
                file.read(1)  # a disk that fails shows here
    except FileNotFoundError as e:
        raise PplexError(f"{path} does not exist; check the name") from e
    except IsADirectoryError as e:
        raise PplexError(
            f"{path} is a folder; give one recording in it, or answer all with "
            "pplex batch"
        ) from e
    except PermissionError as e:
        raise PplexError(
            f"{path} cannot be read: no permission; change its rights or copy it"
        ) from e
    except OSError as e:
        raise PplexError(f"{path} cannot be read: {e.strerror or e}") from e
    if not stat.S_ISREG(status.st_mode):
        raise PplexError(
            f"{path} is a device or pipe; give an ordinary file, or pipe WAV into "
            "pplex respond, whose INPUT - is stdin"
        )
    if status.st_size == 0:
        raise PplexError(f"{path} is empty (0 bytes); give a recording with sound")
    if path.suffix.lower() == ".raw":
        raise PplexError(
            f"{path} is raw PCM, whose rate and format are unknown; convert it to WAV, "
            "or pipe it into pplex respond - with --raw and --rate"
        )
