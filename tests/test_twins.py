"""Twins of the published repositories: the files are as published, and all is used."""

from __future__ import annotations

from pathlib import Path

import pytest
from twins import REPOS, SIZES, write_twin

# Read off the published files by others.
PUBLISHED_BYTES = {
    "bf16": {
        "model.safetensors": 16_742_874_000,
        "tokenizer-e351c8d8-checkpoint125.safetensors": 384_644_900,
        "tokenizer_spm_32k_3.model": 552_778,
        "voices.tgz": 6_095_521,
    },
    "8bit": {
        "config.json": 1_462,
        "temporal.safetensors": 6_988_291_888,
        "depformer.safetensors": 1_381_596_968,
        "embeddings.safetensors": 988_459_536,
        "mimi.safetensors": 384_644_900,
        "tokenizer_spm_32k_3.model": 552_778,
        "voices/NATF2.safetensors": 418_216,
        "voices/VARM0.safetensors": 352_680,
        "voices/VARM2.safetensors": 565_672,
    },
    "moshiko-bf16": {"model.safetensors": 15_375_697_208},
}


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> Path:
    """Empty caches, of this project and of Hugging Face; the latter's folder."""
    from huggingface_hub import constants

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """The folder of each twin, small, made when it is asked for."""
    top = tmp_path_factory.mktemp("twins")

    def folder(name: str) -> Path:
        if not (top / name).is_dir():
            write_twin(top / name, REPOS[name])
        return top / name

    return folder


@pytest.mark.parametrize("name", PUBLISHED_BYTES)
def test_files_of_full_size_are_as_long_as_the_published_ones(name, tmp_path):
    write_twin(tmp_path, REPOS[name], SIZES["7b"], sparse=True)
    sizes = {file: (tmp_path / file).stat().st_size for file in PUBLISHED_BYTES[name]}
    assert sizes == PUBLISHED_BYTES[name]


@pytest.mark.parametrize("name", REPOS)
def test_a_twin_is_verified_without_a_doubt(name, twins, run):
    result = run("models", "verify", twins(name), "-q")
    lines = [] if REPOS[name].voices else ["warning  voices: none; give one with"]
    assert result.exit_code == 0
    assert [line[: len(lines[0])] for line in result.stdout.splitlines()] == lines
