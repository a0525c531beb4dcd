"""What is known of PersonaPlex 7B as it was published: hashes, ids, norms, entries.

Collected from public repositories of people who had the files. Lengths, hashes, the ids
of the tokenizer and the voice come from several sources that do not know of each other;
the first step is NVIDIA's weights in Kyutai's own code, from one source; what is
``Unconfirmed`` is one port's, of its 4-bit files. None was read off the weights here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pplex.checkpoint.folder import VOICES_ARCHIVE
from pplex.model.config import LmConfig

LM, CODEC, TOKENIZER = "language model", "codec", "tokenizer"


@dataclass(frozen=True)
class StoredFile:
    """A published file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredVoice:
    """A published voice: frames of its embeddings, SHA-256 of them as float32."""

    frames: int
    sha256: str | None = None


@dataclass(frozen=True)
class FirstStep:
    """Greedy, in bfloat16, from the initial ids and nothing before.

    ``entries`` are the first of the sum of all tables, ``norm`` is its length.
    """

    entries: tuple[float, ...]
    norm: float
    text: int
    codes: tuple[int, ...]


@dataclass(frozen=True)
class Unconfirmed:
    """One frame of silence and sine from an empty cache, in files of ``bits``.

    ``moments`` has the mean and the deviation after the sum of the tables (0), after so
    many layers, and after the last norm (-1); ``inputs`` and ``outputs`` are the first
    entries of the sum and after the last norm; ``codes`` what a depformer in 16 bits,
    and in 4, draws greedily after ``text``.
    """

    bits: int
    moments: Mapping[int, tuple[float, float]]
    inputs: tuple[float, ...]
    outputs: tuple[float, ...]
    text: int
    text_logit: float
    text_mean: float
    codes: tuple[tuple[int, ...], ...]


# From Kyutai's `moshi` with NVIDIA's weights: sts-web, its integration tests.
_FIRST = FirstStep(
    entries=(
        *(-0.0229, -0.0028, -0.0334, 0.0101, -0.0163),
        *(0.0230, -0.0202, 0.0113, 0.0329, -0.0248),
    ),
    norm=2.4808,
    text=3,
    codes=(1049, 1948, 936, 1297, 1999, 136, 595, 986),
)
# From `Tests/PersonaPlexTests` of ivan-digital/qwen3-asr-swift.
_UNCONFIRMED = Unconfirmed(
    bits=4,
    moments={
        0: (-0.000383, 0.031235),
        1: (-0.000494, 0.018814),
        2: (-0.000756, 0.024948),
        32: (-0.000849, 0.574707),
        -1: (-0.002991, 1.497070),
    },
    inputs=(0.042, -0.012, 0.018, -0.011, -0.048),
    outputs=(-0.619, -1.014, 2.18, 2.605, -2.598),
    text=21855,
    text_logit=3.7305,
    text_mean=-1.175781,
    codes=(
        (1676, 1515, 1626, 1562, 306, 478, 326, 101),
        (653, 1515, 1626, 1562, 306, 478, 326, 101),
    ),
)
# By what the file is for; the codec's is Kyutai's own.
_FILES = {
    LM: StoredFile(
        16_742_874_000,
        "db1290db583cdaa6cb4de444ed279e0b586ca2a372b41434b07a7461c8c0e2f4",
    ),
    CODEC: StoredFile(
        384_644_900, "09b782f0629851a271227fb9d36db65c041790365f11bbe5d3d59369cf863f50"
    ),
    TOKENIZER: StoredFile(
        552_778, "78d4336533ddc26f9acf7250d7fb83492152196c6ea4212c841df76933f18d2d"
    ),
    VOICES_ARCHIVE: StoredFile(
        6_095_521, "8564e9ca7a06ca723b07c3a77c623f0faa5937d04b2647b3a727b06c5ca0b7bb"
    ),
    "dist.tgz": StoredFile(
        598_195, "8de47fe2477491fac3dca404185d0430c8d39f9e0daf4c90ada5f03fdf830f45"
    ),
}
PUBLISHED_VOICES = {
    **{"NATF0": 51, "NATF1": 48, "NATF2": 51, "NATF3": 51},
    **{"NATM0": 50, "NATM1": 51, "NATM2": 50, "NATM3": 46},
    **{"VARF0": 68, "VARF1": 50, "VARF2": 51, "VARF3": 62, "VARF4": 57},
    **{"VARM0": 43, "VARM1": 46, "VARM2": 69, "VARM3": 46, "VARM4": 55},
}
_HASHED = {"NATF2": "07aa61115fa147df5a9dd11510aab0d811f46a86aca24000a742e2ad57cc905a"}
# From the conversion's own downloader; a voice's is its frames in float16.
_LENGTHS = {
    "config.json": 1_462,
    "temporal.safetensors": 6_988_291_888,
    "depformer.safetensors": 1_381_596_968,
    "embeddings.safetensors": 988_459_536,
    "mimi.safetensors": 384_644_900,
    "tokenizer_spm_32k_3.model": 552_778,
    **{
        f"voices/{name}.safetensors": 424 + 8192 * frames
        for name, frames in PUBLISHED_VOICES.items()
    },
}
_TEXTS = {
    "Hello, world!": (11725, 261, 671, 430),
    "  two  spaces and 1234 digits": (
        *(260, 260, 368, 260, 3697, 267, 260, 265, 270, 278, 281, 11535),
    ),
    "na\u00efve caf\u00e9 \u2014 \u6771\u4eac \U0001f642": (
        *(572, 16650, 518, 29301, 729, 260, 234, 161, 181, 232, 190, 176, 260, 244),
        *(163, 157, 134),
    ),
    "<system> You are Tom. <system>": (
        *(607, 4831, 578, 493, 298, 2608, 263, 607, 4831, 578),
    ),
    "end.\nnew line": (606, 263, 14, 2706, 619),
    "don't let it sit, it's done": (
        *(551, 286, 303, 1131, 296, 6485, 261, 296, 286, 266, 954),
    ),
    "<system> You are a wise and friendly teacher. Answer questions or provide advice "
    "in a clear and engaging way. <system>": (
        *(607, 4831, 578, 493, 298, 272, 11821, 267, 7514, 3290, 263, 506, 1292, 307),
        *(775, 3574, 271, 272, 1195, 267, 12250, 488, 263, 607, 4831, 578),
    ),
}


@dataclass(frozen=True)
class Reference:
    """What one model's files and first step are; by default the published 7B's.

    ``files`` go by what they are for; ``lengths`` are the bytes of the files of the
    repository ``lengths_of``; ``texts`` have the ids that the tokenizer gives.
    """

    name: str = "PersonaPlex"
    lm: LmConfig = LmConfig()
    num_tensors: int = 475
    files: Mapping[str, StoredFile] = field(default_factory=lambda: _FILES)
    lengths_of: str = "aufklarer/PersonaPlex-7B-MLX-8bit"
    lengths: Mapping[str, int] = field(default_factory=lambda: _LENGTHS)
    texts: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: _TEXTS)
    voices: Mapping[str, StoredVoice] = field(
        default_factory=lambda: {
            name: StoredVoice(frames, _HASHED.get(name))
            for name, frames in PUBLISHED_VOICES.items()
        }
    )
    first: FirstStep = _FIRST
    unconfirmed: Unconfirmed = _UNCONFIRMED


PERSONAPLEX = Reference()
