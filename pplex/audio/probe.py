"""How long a recording is, from its header: a quick look before the real reading."""

from dataclasses import dataclass
from pathlib import Path

from pplex.audio.files import UNKNOWN_FRAMES, Channel, open_recording


@dataclass(frozen=True)
class Header:
    """What a file says of itself; `duration_s` is None where it does not know."""

    rate: int
    channels: int
    duration_s: float | None


def probe(path: Path, channel: Channel = 1) -> Header:
    """Read a recording's header, refusing what `read_pcm` would refuse for it."""
    with open_recording(Path(path), channel) as source:
        known = source.frames < UNKNOWN_FRAMES
        seconds = source.frames / source.samplerate if known else None
        return Header(source.samplerate, source.channels, seconds)
