"""The models that have a short name; apart, for each command's help to load fast."""

from dataclasses import dataclass

DEFAULT_MODEL = "8bit"
AUTO_MODEL = "auto"  # what is best here

NVIDIA = "NVIDIA Open Model License"
_KYUTAI = "CC-BY 4.0"
# What the conversions' pages say; the base that they were made of is NVIDIA's.
_CONVERTED = f"CC BY-NC 4.0, the base {NVIDIA}"


@dataclass(frozen=True)
class KnownModel:
    """A model with a short name; sizes in GB (1e9 bytes), 0 for nothing to download.

    ``licence`` is what the page says of the weights, and of what they were made of.
    """

    repo: str | None
    description: str
    download_gb: float
    memory_gb: float
    licence: str

    @property
    def speaks_published_voices(self) -> bool:
        """Whether the voices that NVIDIA published belong to it; a Moshi has none."""
        return self.repo is not None and "personaplex" in self.repo.lower()

    @property
    def is_gated(self) -> bool:
        """Whether a licence must be accepted before it can be downloaded."""
        return "accept its licence" in self.description

    @property
    def terms(self) -> str:
        """What to know of the licence before a download, in a clause or two."""
        if self.licence != _CONVERTED:
            return self.licence
        return (
            f"{self.licence}; for commercial use pull bf16, accept its licence, and "
            "make your own by `pplex models convert`"
        )


KNOWN_MODELS: dict[str, KnownModel] = {
    "8bit": KnownModel(
        "aufklarer/PersonaPlex-7B-MLX-8bit",
        "PersonaPlex 7B in 8 bits: close to the original (default)",
        9.8,
        12.0,
        _CONVERTED,
    ),
    "4bit": KnownModel(
        "aufklarer/PersonaPlex-7B-MLX-4bit",
        "PersonaPlex 7B in 4 bits: smallest and fastest, less faithful",
        5.8,
        8.0,
        _CONVERTED,
    ),
    "bf16": KnownModel(
        "nvidia/personaplex-7b-v1",
        "PersonaPlex 7B as NVIDIA published it; accept its licence first",
        17.2,
        20.0,
        NVIDIA,
    ),
    "mini": KnownModel(
        None,
        "small built-in model for trying things out; needs no download",
        0.0,
        1.0,
        "MIT",
    ),
    **{
        f"{name}-{form}": KnownModel(
            f"kyutai/{name}-mlx-{published}",
            f"Kyutai's Moshi, {voice} voice, in {bits} bits; no roles, no login",
            download_gb,
            memory_gb,
            _KYUTAI,
        )
        for name, voice in (("moshika", "a woman's"), ("moshiko", "a man's"))
        for form, published, bits, download_gb, memory_gb in (
            ("4bit", "q4", 4, 5.2, 7.5),
            ("8bit", "q8", 8, 8.6, 10.8),
            ("bf16", "bf16", 16, 15.8, 18.5),
        )
    },
    "personaplex-rl": KnownModel(
        "kyutai/personaplex-rl-seamless",
        "PersonaPlex 7B, trained further; accept its licence first",
        17.2,
        20.0,
        f"CC BY-NC 4.0 and {NVIDIA}",
    ),
    "moshika-rl": KnownModel(
        "kyutai/moshika-rl-seamless",
        "Moshi, a woman's voice, trained further; accept its licence",
        15.8,
        18.5,
        "CC BY-NC 4.0",
    ),
}

# Of the published conversions of the 7B, and of itself.
PUBLISHED_BITS = {"4bit": 4, "8bit": 8, "bf16": 16}


def known_repo(repo: str | None) -> KnownModel | None:
    """The known model that lies in this repository."""
    models = (known for known in KNOWN_MODELS.values() if known.repo == repo)
    return next(models, None) if repo else None
