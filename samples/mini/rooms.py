"""What rooms and microphones do to a voice."""

import torch
from torch import Tensor


def colour_noise(shape: tuple[int, int], where: torch.device) -> Tensor:
    """Noise of unit power between white and brown, another for each row."""
    spectrum = torch.fft.rfft(torch.randn(shape, device=where))
    bins = torch.arange(1, spectrum.shape[1] + 1, device=where).float()
    slope = -torch.rand(shape[0], 1, device=where)
    noise = torch.fft.irfft(spectrum * bins**slope, shape[1])
    return noise / noise.square().mean(1, keepdim=True).sqrt()


def roughen(pcm: Tensor, noisy: bool) -> Tensor:
    """Levels, noise and narrow bands as microphones have them."""
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
