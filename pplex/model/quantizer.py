"""Split residual vector quantizer: latents to codes and back.

Follows NVIDIA's PersonaPlex, ``quantization/vq.py`` and ``core_vq.py``. Both parts see
the same latent: the first codebook is the semantic one, the rest are acoustic.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class ResidualQuantizer(nn.Module):
    """Residual quantizer between two projections."""

    def __init__(
        self, width: int, dimension: int, num_codebooks: int, bins: int
    ) -> None:
        super().__init__()
        self.input_proj = nn.Linear(width, dimension, bias=False)
        self.output_proj = nn.Linear(dimension, width, bias=False)
        self.codebooks = mx.zeros((num_codebooks, bins, dimension))
        self._norms: tuple[mx.array, mx.array] | None = None

    def _halves(self) -> mx.array:
        """|e|^2 / 2 (codebooks, bins) of each row of the tables, computed once."""
        books = self.codebooks
        if self._norms is None or self._norms[0] is not books:
            halves = mx.stack([0.5 * mx.sum(e * e, axis=-1) for e in books])
            mx.eval(halves)
            self._norms = books, halves
        return self._norms[1]

    def encode(self, latent: mx.array) -> mx.array:
        """Latents (batch, t, width) to codes (batch, codebooks, t)."""
        residual = self.input_proj(latent)
        codes, halves = [], self._halves()
        for idx in range(self.codebooks.shape[0]):
            table = self.codebooks[idx]
            # Nearest row: |r - e|^2 = |r|^2 - 2 (r.e - |e|^2 / 2).
            code = mx.argmax(residual @ table.T - halves[idx], axis=-1)
            residual = residual - table[code]
            codes.append(code)
        return mx.stack(codes, axis=1)

    def decode(self, codes: mx.array) -> mx.array:
        """Codes (batch, codebooks, t) to latents (batch, t, width)."""
        total = self.codebooks[0][codes[:, 0]]
        for idx in range(1, self.codebooks.shape[0]):
            total = total + self.codebooks[idx][codes[:, idx]]
        return self.output_proj(total)


class SplitQuantizer(nn.Module):
    """One semantic codebook beside a residual quantizer of acoustic ones."""

    def __init__(
        self, width: int, dimension: int, num_codebooks: int, bins: int
    ) -> None:
        super().__init__()
        self.semantic = ResidualQuantizer(width, dimension, 1, bins)
        self.acoustic = ResidualQuantizer(width, dimension, num_codebooks - 1, bins)

    def encode(self, latent: mx.array) -> mx.array:
        """Latents (batch, t, width) to int32 codes (batch, codebooks, t)."""
        codes = [self.semantic.encode(latent), self.acoustic.encode(latent)]
        return mx.concatenate(codes, axis=1).astype(mx.int32)

    def decode(self, codes: mx.array) -> mx.array:
        """Codes (batch, codebooks, t) to latents (batch, t, width)."""
        return self.semantic.decode(codes[:, :1]) + self.acoustic.decode(codes[:, 1:])
