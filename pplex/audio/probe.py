"""How long a recording is, from its header: a quick look before the real reading."""

from dataclasses import dataclass
from pathlib import Path

from pplex.audio.files import Channel, check_channel
from pplex.audio.source import open_source


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    rate: int
    channels: int
    duration_s: float


def probe(path: Path, channel: Channel = 1) -> Header:
    """Read a recording's header, refusing what can be seen to be wrong with it."""
    with open_source(Path(path)) as source:
        check_channel(str(path), source.channels, channel)
        return Header(source.rate, source.channels, source.num_frames / source.rate)
