"""The model card that a conversion leaves beside its files."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass

from pplex.checkpoint.hub import LocalModel
from pplex.checkpoint.layouts import Matrix, form_name
from pplex.quantization.compare_models import Comparison
from pplex.quantization.recipe import Recipe, num_bytes, recipe_bytes
from pplex.units import Scale, percent


@dataclass(frozen=True)
class Card:
    """What a card says of the conversion itself."""

    source: LocalModel
    layout: str
    recipe_name: str
    made_by: str
    measured: Comparison | None = None


def card_text(
    card: Card,
    matrices: list[Matrix],
    recipe: Recipe,
    source_bytes: int,
    voices: Iterable[str],
) -> str:
    """The card, in Markdown."""
    local = card.source
    source = f"`{local.repo}`" if local.repo else f"`{local.path.name}`"
    if local.revision:
        source += f", revision `{local.revision}`"
    size = recipe_bytes(matrices, recipe)
    rows = "\n".join(
        f"| {file} | {bits} | {count} | {total / 1e6:.1f} |"
        for file, bits, count, total in _forms(matrices, recipe)
    )
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("pplex", "mlx")
    )
    return f"""---
library_name: mlx
tags: [personaplex, moshi, speech, full-duplex]
---

# A PersonaPlex model, recipe {card.recipe_name}

Made from {source} (layout {card.layout}) with {versions}:

    {card.made_by}

The language model takes {size / 1e9:.3f} GB; in the source it took
{source_bytes / 1e9:.3f} GB. The codec, the tokenizer and the voices are those of the
source.

| file | bits, group size | matrices | MB |
| --- | --- | --- | --- |
{rows}

Quantized matrices are in MLX's affine form: codes, and a scale and a bias a group.
{_costs(card.measured)}
`pplex models verify THIS` checks the files against `SHA256SUMS`.

Voices: {", ".join(voices) or "none"}. A voice belongs to a person: use it with their
consent.

The licence of the weights is that of the source; a conversion changes nothing about it.
"""


def _costs(found: Comparison | None) -> str:
    """What the rounding costs, or how to measure it."""
    if found is None:
        command = "pplex models compare SOURCE THIS RECORDING.wav"
        return f"What the rounding costs is measured by `{command}`."
    kl = Scale(figures.kl for figures in found.streams)
    lines = [
        "",
        "## What the rounding costs",
        "",
        f"The source answered recordings, and both read the "
        f"tokens of that, {found.frames} frames of 80 ms: "
        f"{found.mean_kl:.2g} nats a frame lie between their choices on average "
        f"(`pplex models compare`, seed {found.seed}, on a {found.device}). Perplexity "
        "is that of the source's own tokens.",
        "",
        f"| | same first choice | {kl.heading('KL', 'nats')} | perplexity: source "
        "| this |",
        "| --- | --- | --- | --- | --- |",
    ]
    named = [(figures.stream, figures) for figures in found.streams]
    for depth in found.depths if len(found.depths) > 1 else []:
        for figures in (depth.text, depth.agent):
            named.append((f"{figures.stream}, from {depth.start_s:.0f} s on", figures))
    for name, figures in named:
        lines.append(
            f"| {name} | {percent(figures.top1)} | {kl.text(figures.kl)} | "
            f"{figures.perplexity_a:.3f} | {figures.perplexity_b:.3f} |"
        )
    if (replies := found.replies) is not None:
        lines += [
            "",
            f"Right replies to recordings whose answer is known, greedily: "
            f"{replies.right_b} of {replies.asked}; of the source {replies.right_a}.",
        ]
    return "\n".join([*lines, ""])


def _forms(
    matrices: list[Matrix], recipe: Recipe
) -> Iterable[tuple[str, str, int, int]]:
    """Rows of the table: file, form, how many matrices, bytes."""
    groups: dict[tuple[str, str], list[int]] = {}
    for matrix in matrices:
        form = recipe[matrix.name]
        key = (matrix.split_file, form_name(form))
        groups.setdefault(key, []).append(num_bytes(matrix, form))
    for (file, name), sizes in sorted(groups.items()):
        yield file, name, len(sizes), sum(sizes)
