"""What rooms, microphones and lines do to a voice.

A `Room` stays the same through a recording: its noise, hum and offset. What microphone
and line do to one voice in it (`carry`) is drawn for each clip.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sizes import FRAME_SIZE
from torch import Tensor

RATE = 24000
LOWEST_DB = -48.0
WINDOW, SMOOTH = 1024, 50  # of spectra, and of what is smooth in them


@dataclass(frozen=True)
class Room:
    """Noise and hum in dBFS (None for none) and a constant offset of the samples."""

    noise_db: float | None = None
    hum_db: float | None = None
    offset: float = 0.0

    def digital(self) -> bool:
        """Whether there is nothing to hear in it."""
        return self.noise_db is None and self.hum_db is None

    def lowest(self) -> float:
        """How quiet the loudest sample of a voice may be (dBFS), to be heard here."""
        noise = -100.0 if self.noise_db is None else self.noise_db + 24
        return max(LOWEST_DB, noise, -100.0 if self.hum_db is None else self.hum_db + 6)

    def sound(self, count: int, samples: int, where: torch.device) -> Tensor:
        """The room alone, (count, samples); every row another colour of noise."""
        pcm = torch.full((count, samples), self.offset, device=where)
        if self.noise_db is not None:
            spread = 6 * torch.rand(count, 1, device=where) - 3
            level = 10 ** ((self.noise_db + spread) / 20)
            pcm = pcm + level * colour_noise((count, samples), where)
        if self.hum_db is not None:
            time = torch.arange(samples, device=where) / RATE
            hertz = 50 + 10 * torch.randint(2, (count, 1), device=where)
            phase = 2 * math.pi * hertz * time
            pcm = pcm + 10 ** (self.hum_db / 20) * (
                phase.sin() + 0.4 * (3 * phase).sin()
            )
        return pcm


ROOMS = (
    Room(),
    Room(),
    Room(-66),
    Room(-66),
    Room(-52),
    Room(-40),
    Room(offset=0.02),
    Room(-60, offset=-0.01),
    Room(-52, offset=0.05),
    Room(-60, hum_db=-46),
    Room(-48, hum_db=-40, offset=0.004),
    Room(-70, offset=-0.04),
)


def colour_noise(shape: tuple[int, int], where: torch.device) -> Tensor:
    """Noise of unit power between white and brown, another for each row."""
    spectrum = torch.fft.rfft(torch.randn(shape, device=where))
    bins = torch.arange(1, spectrum.shape[1] + 1, device=where).float()
    slope = -torch.rand(shape[0], 1, device=where)
    noise = torch.fft.irfft(spectrum * bins**slope, shape[1])
    return noise / noise.square().mean(1, keepdim=True).sqrt()


def _some(rows: int, share: float, where: torch.device) -> Tensor:
    return torch.rand(rows, 1, device=where) < share


def carry(pcm: Tensor, lowest_db: float) -> Tensor:
    """Voices (rows, samples) as microphones and lines bring them, each in its own way.

    Other spectra, bands of telephones and old microphones, echoes of a room, hard
    limits, 8 bits of a telephone; the loudest sample from `lowest_db` to 5 dB too high.
    """
    rows, samples = pcm.shape
    where = pcm.device
    spectrum = torch.fft.rfft(pcm, 2 * samples)
    hertz = torch.linspace(0, RATE / 2, spectrum.shape[1], device=where)
    spectrum = spectrum * _colour(rows, hertz)
    narrow = _some(rows, 0.3, where)
    above, below = torch.rand(2, rows, 1, device=where)
    top = torch.where(narrow, 3300 + 3000 * above.square(), 12000.0)
    bottom = torch.where(narrow, 320 * below, 0.0)
    spectrum = spectrum * torch.sigmoid((top - hertz) / 150)
    spectrum = spectrum * torch.sigmoid((hertz - bottom) / 20 + 3)
    echo = torch.fft.rfft(_echo(rows, where), 2 * samples)
    spectrum = torch.where(_some(rows, 0.3, where), spectrum * echo, spectrum)
    pcm = torch.fft.irfft(spectrum, 2 * samples)[:, :samples]
    peak = pcm.abs().amax(1, keepdim=True).clamp(min=1e-4)
    gain_db = lowest_db + (5 - lowest_db) * torch.rand(rows, 1, device=where)
    pcm = (pcm / peak * 10 ** (gain_db / 20)).clamp(-1, 1)
    mu = 255.0
    short = pcm.sign() * torch.log1p(mu * pcm.abs()) / math.log1p(mu)
    short = (short * 127).round() / 127
    short = short.sign() * torch.expm1(short.abs() * math.log1p(mu)) / mu
    return torch.where(narrow & _some(rows, 0.4, where), short, pcm)


def _colour(rows: int, hertz: Tensor) -> Tensor:
    """Smooth gains (rows, bins): a tilt, and some decibels up or down an octave."""
    where = hertz.device
    octave = (hertz.clamp(min=60) / 60).log2()
    low = octave.long().clamp(max=6)
    points = 3 * torch.randn(rows, 8, device=where)
    points += torch.randn(rows, 1, device=where) * torch.arange(8, device=where)
    between = (octave - low).clamp(max=1)
    gain_db = points[:, low] * (1 - between) + points[:, low + 1] * between
    return 10 ** (gain_db / 20)


def _echo(rows: int, where: torch.device) -> Tensor:
    """Answers of small rooms (rows, samples): the direct sound and a fading tail."""
    length = RATE // 3
    time = torch.arange(length, device=where) / RATE
    fade = 0.05 + 0.25 * torch.rand(rows, 1, device=where)  # to -60 dB
    tail = torch.randn(rows, length, device=where) * 10 ** (-3 * time / fade)
    tail[:, : RATE // 200] = 0
    share = 0.02 + 0.08 * torch.rand(rows, 1, device=where)
    tail = share * tail
    tail[:, 0] = 1
    return tail


def tract(pcm: Tensor, factor: Tensor) -> Tensor:
    """Voices (rows, samples) with formants `factor` (rows, 1) times as high.

    Above 1 a shorter vocal tract; pitch and tempo stay.
    """
    rows, samples = pcm.shape
    hop = WINDOW // 4
    window = torch.hann_window(WINDOW, device=pcm.device)
    rest = -samples % hop
    frames = F.pad(pcm, (WINDOW - hop, WINDOW - hop + rest)).unfold(1, WINDOW, hop)
    spectrum = torch.fft.rfft(frames * window)
    log = spectrum.abs().clamp(min=1e-4).log()
    quefrency = torch.fft.irfft(log)
    quefrency[..., SMOOTH : WINDOW - SMOOTH + 1] = 0
    envelope = torch.fft.rfft(quefrency).real
    bins = log.shape[2]
    source = torch.arange(bins, device=pcm.device) / factor
    low = source.long().clamp(max=bins - 2)
    share = (source - low).clamp(max=1)[:, None]
    low = low[:, None].expand(-1, frames.shape[1], -1)
    below, above = envelope.gather(2, low), envelope.gather(2, low + 1)
    moved = below + share * (above - below)
    gain = (moved - envelope).clamp(-3, 3).exp()
    frames = torch.fft.irfft(spectrum * gain) * window / 1.5
    total = frames.shape[1] * hop + WINDOW - hop
    sound = F.fold(frames.transpose(1, 2), (1, total), (1, WINDOW), stride=(1, hop))
    return sound.view(rows, total)[:, WINDOW - hop :][:, :samples]


def roughen(pcm: Tensor, noisy: bool) -> Tensor:
    """Levels, noise and narrow bands of the first evaluations, kept as they were."""
    n, length = pcm.shape
    where = pcm.device
    gain = 10 ** (torch.rand(n, 1, device=where) * 0.9 - 0.65)
    pcm = pcm * gain
    if not noisy:
        return pcm
    band = torch.rand(n, 1, device=where)
    top = torch.where(band < 0.2, 3400 + 20000 * band, 12000.0)
    hertz = torch.linspace(0, 12000, length // 2 + 1, device=where)
    pass_band = torch.sigmoid((top - hertz) / 200)
    pcm = torch.fft.irfft(torch.fft.rfft(pcm) * pass_band, length)
    level = 10 ** (-1.7 - 3.0 * torch.rand(n, 1, device=where))
    level = level * (torch.rand(n, 1, device=where) < 0.75)
    return (pcm + level * gain.clamp(max=1) * colour_noise((n, length), where)).clamp(
        -1, 1
    )


def babble(pcm: Tensor, level_db: float) -> Tensor:
    """Other rows' voices far behind each row."""
    behind = pcm.roll(1, 0).roll(7 * FRAME_SIZE, 1) + pcm.roll(2, 0).flip(1)
    return pcm + 10 ** (level_db / 20) * F.pad(behind, (40, 0))[:, :-40]
