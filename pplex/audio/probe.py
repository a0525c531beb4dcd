"""How long a recording is, from its header: a quick look before the real reading."""

from dataclasses import dataclass
from pathlib import Path

import soundfile

from pplex.audio.files import UNKNOWN_FRAMES, Channel, check_file, check_header
from pplex.errors import PplexError


@dataclass(frozen=True)
class Header:
    """What a file says of itself; `duration_s` is None where it does not know."""

    rate: int
    channels: int
    duration_s: float | None


def probe(path: Path, channel: Channel = 1) -> Header:
    """Read a recording's header, refusing what `read_pcm` would refuse for it."""
    path = Path(path)
    check_file(path)
    try:
        source = soundfile.SoundFile(str(path))
    except soundfile.LibsndfileError as e:
        raise PplexError(
            f"{path} is not an audio file that can be read ({e.error_string})"
        ) from e
    with source:
        check_header(path, source, channel)
        known = source.frames < UNKNOWN_FRAMES
        seconds = source.frames / source.samplerate if known else None
        return Header(source.samplerate, source.channels, seconds)
