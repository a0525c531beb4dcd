"""Write a recording to stdout at the rate at which it was spoken, as a microphone does.

    python tests/pace.py call.wav | pplex respond - -o reply.wav --stats stats.json

writes 20 ms at a time, each when its last sample would have been heard, as WAV of
unknown length; ``--raw`` leaves the header out. What the reader kept waiting is told on
stderr at the end: how late a piece left at most, and how many were over a frame late.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import soundfile

from pplex.audio.streams import wav_header

PIECE_S = 0.02
LATE_S = 0.08


def write(content: bytes) -> None:
    """Write all of it to stdout at once, without a buffer of ours."""
    view = memoryview(content)
    while view:
        view = view[os.write(1, view) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--raw", action="store_true", help="samples only, s16le")
    parser.add_argument("--speed", type=float, default=1.0, help="times real time")
    parser.add_argument("--repeat", type=int, default=1, help="play it so many times")
    args = parser.parse_args()
    samples, rate = soundfile.read(args.recording, dtype="int16", always_2d=True)
    if not args.raw:
        write(wav_header(None, samples.shape[1], rate))
    size = round(PIECE_S * rate)
    pieces = [samples[i : i + size] for i in range(0, len(samples), size)]
    start, sent, delays = time.monotonic(), 0, []
    for piece in pieces * args.repeat:
        sent += len(piece)
        due = start + sent / rate / args.speed
        time.sleep(max(0.0, due - time.monotonic()))
        try:
            write(piece.astype("<i2").tobytes())
        except BrokenPipeError:
            sys.exit(f"the reader left after {sent / rate:.1f} s")
        delays.append(time.monotonic() - due)
    late = sum(delay > LATE_S for delay in delays)
    print(
        f"{sent / rate:.1f} s sent in {time.monotonic() - start:.1f} s; at most "
        f"{1000 * max(delays):.1f} ms late, {late} of {len(delays)} pieces over "
        f"{1000 * LATE_S:.0f} ms",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
