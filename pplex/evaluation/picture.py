"""Pictures of recordings as PNG files, drawn without a plotting library.

Above the user, below the agent: sound in bands of speech, time below in seconds. Lines
mark backchannels (green), pauses taken and interruptions (red), and the user's
interruptions of the agent (purple).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pplex.errors import PplexError
from pplex.evaluation.report_table import Entry
from pplex.evaluation.segments import Segment
from pplex.files import atomic_write

WIDTH, HEIGHT = 1200, 180
_MARGIN = 10
_USER, _AGENT = (36, 102, 194), (180, 83, 10)
_INK, _GRID = (93, 96, 105), (220, 221, 225)
_MARKS = {
    "backchannel": (27, 110, 60),
    "pause_taken": (179, 38, 30),
    "interruption": (179, 38, 30),
    "user_interruption": (138, 28, 124),
}
# Digits of 3 x 5 dots: an octal digit a row.
_GLYPHS = dict(
    zip(
        "0123456789",
        "75557 26227 71747 71717 55711 74717 74757 71122 75757 75717".split(),
        strict=True,
    )
)


def write_pictures(
    folder: Path, entries: Sequence[Entry], overwrite: bool = False
) -> list[Path]:
    """Write ``NAME.png`` for each entry that has sound; overwrite nothing unasked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise PplexError(f"cannot write to {folder}: {e.strerror or e}") from e
    planned: dict[Path, Entry] = {}
    for entry in entries:
        if entry.measured is None:
            continue
        name = entry.item.name.replace("/", "-").replace("\\", "-").lstrip(".-")
        path = folder / f"{name.removesuffix('.wav')}.png"
        if path in planned or (path.exists() and not overwrite):
            raise PplexError(
                f"{path} exists already; choose another folder or give --overwrite"
            )
        planned[path] = entry
    for path, entry in planned.items():
        with atomic_write(path) as temporary:
            temporary.write_bytes(png_bytes(draw(entry)))
    return list(planned)


def draw(entry: Entry) -> np.ndarray:
    """The picture as uint8 (height, width, 3)."""
    measured = entry.measured
    assert measured is not None
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    scale = (WIDTH - 2 * _MARGIN) / max(measured.duration_s, 0.1)

    def column(seconds: float) -> int:
        return min(WIDTH - 1, max(0, round(_MARGIN + seconds * scale)))

    steps = (0.5, 1, 2, 5, 10, 30, 60, 300, 600, 3600)
    step = next((s for s in steps if s * scale >= 60), steps[-1])
    for k in range(int(measured.duration_s / step) + 1):
        at = column(k * step)
        image[6:162, at] = _GRID
        if (k * step) == int(k * step):
            draw_number(image, int(k * step), at, 168)
    sides: tuple[tuple[Sequence[Segment], np.ndarray | None, int, tuple], ...] = (
        (measured.user or (), entry.user_peaks, 46, _USER),
        (measured.agent, entry.agent_peaks, 122, _AGENT),
    )
    for segments, peaks, middle, colour in sides:
        for segment in segments:
            left, right = column(segment.start_s), column(segment.end_s) + 1
            band = image[middle - 34 : middle + 34, left:right]
            band[:] = (0.85 * band + 0.15 * np.array(colour)).astype(np.uint8)
        if peaks is None:
            continue
        across = np.arange(_MARGIN, WIDTH - _MARGIN)
        index = (across - _MARGIN) * len(peaks) // (WIDTH - 2 * _MARGIN)
        for at, value in zip(across.tolist(), peaks[index].tolist(), strict=True):
            half = round(32 * value**0.6)
            image[middle - half : middle + half + 1, at] = colour
    for event in measured.turns.events if measured.turns else ():
        if event.kind in _MARKS:
            image[2:162, column(event.start_s)] = _MARKS[event.kind]
            image[2:6, column(event.start_s) : column(event.end_s)] = _MARKS[event.kind]
    return image


def png_bytes(image: np.ndarray) -> bytes:
    """Encode uint8 (height, width, 3) as a PNG file."""
    height, width, _ = image.shape
    lines = np.zeros((height, 1 + 3 * width), np.uint8)
    lines[:, 1:] = image.reshape(height, 3 * width)

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + checksum.to_bytes(4, "big")
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 6))
        + chunk(b"IEND", b"")
    )


def draw_number(image: np.ndarray, value: int, middle: int, top: int) -> None:
    """Write ``value`` into uint8 (height, width, 3), its digits round ``middle``."""
    text = str(value)
    left = min(max(0, middle - 4 * len(text)), WIDTH - 8 * len(text))
    for i, digit in enumerate(text):
        rows = [
            [int(row) >> shift & 1 for shift in (2, 1, 0)] for row in _GLYPHS[digit]
        ]
        dots = np.kron(np.array(rows, bool), np.ones((2, 2), bool))
        area = image[top : top + 10, left + 8 * i : left + 8 * i + 6]
        area[dots] = _INK
