"""The models that have a short name; apart, for each command's help to load fast."""

from dataclasses import dataclass

DEFAULT_MODEL = "8bit"


@dataclass(frozen=True)
class KnownModel:
    """A model with a short name; sizes in GB (1e9 bytes), 0 for nothing to download."""

    repo: str | None
    description: str
    download_gb: float
    memory_gb: float


KNOWN_MODELS: dict[str, KnownModel] = {
    "8bit": KnownModel(
        "aufklarer/PersonaPlex-7B-MLX-8bit",
        "PersonaPlex 7B in 8 bits: close to the original (default)",
        9.8,
        12.0,
    ),
    "4bit": KnownModel(
        "aufklarer/PersonaPlex-7B-MLX-4bit",
        "PersonaPlex 7B in 4 bits: smallest and fastest, less faithful",
        5.8,
        8.0,
    ),
    "bf16": KnownModel(
        "nvidia/personaplex-7b-v1",
        "PersonaPlex 7B as NVIDIA published it; accept its licence first",
        17.2,
        20.0,
    ),
    "mini": KnownModel(
        None,
        "small built-in model for trying things out; needs no download",
        0.0,
        1.0,
    ),
}
