"""The divergence of each stream as bars, in SVG."""

from __future__ import annotations

import html
import math

from pplex.quantization.compare_models import Comparison

WIDTH, HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 44, 40
_LEAST = 1e-6  # nats; smaller is shown as this


def plot(comparison: Comparison) -> str:
    """One bar a stream: mean divergence in nats, on a logarithmic scale."""
    streams = comparison.streams
    values = [max(_LEAST, stream.kl) for stream in streams]
    low = math.floor(math.log10(min(values)))
    high = max(low + 1, math.ceil(math.log10(max(values))))
    inner = HEIGHT - _TOP - _BOTTOM
    slot = (WIDTH - _LEFT - _RIGHT) / len(streams)

    def y(value: float) -> float:
        share = (math.log10(value) - low) / (high - low)
        return _TOP + inner * (1 - share)

    title = f"{comparison.b.name} against {comparison.a.name}"
    under = (
        f"divergence in nats, {comparison.frames} frames; "
        f"{comparison.b.lm_bytes / 1e9:.3g} GB against "
        f"{comparison.a.lm_bytes / 1e9:.3g} GB"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-size="14">{html.escape(title)}</text>',
        f'<text x="{_LEFT}" y="34" fill="#555">{html.escape(under)}</text>',
    ]
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" '
            'stroke="#ddd"/>'
            f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>'
        )
    for idx, (stream, value) in enumerate(zip(streams, values, strict=True)):
        x, top = _LEFT + idx * slot, y(value)
        parts.append(
            f'<rect x="{x + slot / 6:.1f}" y="{top:.1f}" width="{slot * 2 / 3:.1f}" '
            f'height="{HEIGHT - _BOTTOM - top:.1f}" fill="#3b6ea5">'
            f"<title>{stream.stream}: {stream.kl:.3g}, top-1 {stream.top1:.1%}</title>"
            "</rect>"
            f'<text x="{x + slot / 2:.1f}" y="{HEIGHT - _BOTTOM + 16}" '
            f'text-anchor="middle">{stream.stream}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
