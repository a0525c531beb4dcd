"""Compiling CUDA kernels, which needs no GPU; what they compute: test_cuda.py.

By the compiler that pip serves, for GPUs of two generations.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pplex.engine.cuda import (
    compiler,
    convolutions,
    depformer,
    exchange,
    frame,
    rows,
)
from pplex.model.config import LmConfig

CAPABILITIES = [(8, 0), (9, 0)]
# Bits and group size of the temporal transformer's and the depformer's weights, and of
# the tables.
FORMS = {
    "4/64": ((4, 64), (16, 1)),
    "8/32": ((8, 32), (8, 32)),
    "16": ((16, 1), (16, 1)),
}
TABLES = "text", "audio", "dep_text", "dep_audio"


def sources() -> Iterator[tuple[str, str]]:
    """A name and the text of every kernel that is compiled at run time."""
    lm = LmConfig()  # the published 7B
    for head_dim in rows.WIDTHS:
        sizes = {"HEAD_DIM": head_dim, "WINDOW": lm.window}
        for name in ("attend_prompts", "join_parts"):
            yield f"{name} {head_dim}", rows.source(name, **sizes)
        for bits in (8, 16):
            text = rows.source("attend", **sizes, KV_BITS=bits)
            yield f"attend {head_dim} {bits}", text
    latents = rows.source("attend_latents", HEAD_DIM=rows.LATENTS_WIDTH)
    yield "attend_latents", latents
    for name in rows.THREADS:
        if not name.startswith(("attend", "join")):
            yield name, rows.source(name)
    yield "elu_behind", convolutions.source()
    yield "exchange", exchange.source()
    for least in depformer.TILES:
        text = depformer.source(lm, least, depformer.LEAST_SHARED)
        yield f"depformer {least}", text
    for form, (matrices, tables) in FORMS.items():
        forms = dict.fromkeys(frame.MATRICES, matrices)
        forms |= dict.fromkeys(TABLES, tables)
        yield f"frame {form}", frame.source(lm, forms, splits=4)[0]
    yield "frame kv8", frame.source(lm, forms, splits=4, kv_bits=8)[0]


@pytest.fixture(scope="module")
def nvrtc() -> ctypes.CDLL:
    """CUDA's compiler: of the package in the extra ``dev``, or this machine's."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvrtc") or []
    except importlib.metadata.PackageNotFoundError:
        try:
            return compiler._nvrtc()
        except RuntimeError as e:
            pytest.skip(str(e))
    (path,) = (f.locate() for f in files if f.match("libnvrtc.so.*"))
    # It looks for this one by its bare name.
    for builtins in Path(path).parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(path))


def cases() -> Iterator[object]:
    """Those of a frame, which take long, for the newer kind of GPU in one form only."""
    for name, text in sources():
        is_like_another = name.startswith("frame") and name != "frame 4/64"
        for target in CAPABILITIES[:1] if is_like_another else CAPABILITIES:
            yield pytest.param(text, target, id=f"{name}-{target}")


@pytest.mark.parametrize(("text", "target"), [*cases()])
def test_kernels_compile_without_a_warning(nvrtc, text, target):
    code, said = compiler.compile_for(nvrtc, text, target)
    assert code[:4] == b"\x7fELF"
    assert not said.strip()


def test_kernels_are_compiled_once_and_kept(tmp_path, monkeypatch):
    class Nvrtc:
        @staticmethod
        def nvrtcVersion(major, minor):  # noqa: N802
            return 0

    compiled = []

    def compile_it(_, source, target):
        compiled.append(source)
        return b"code of " + source.encode(), ""

    monkeypatch.setattr(compiler, "_nvrtc", Nvrtc)
    monkeypatch.setattr(compiler, "compile_for", compile_it)
    monkeypatch.setattr(compiler, "capability", lambda: (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for source in ("one", "two", "one"):
        assert compiler.compile_cuda(source) == b"code of " + source.encode()
    assert compiled == ["one", "two"]
    monkeypatch.setattr(compiler, "capability", lambda: (8, 0))
    compiler.compile_cuda("one")
    assert compiled == ["one", "two", "one"]  # for another GPU
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert compiler.compile_cuda("one") == b"code of one"
    assert len(compiled) == 4


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Where the machine code of the kernel "k" is kept, b"code"."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler.keep("k", b"code")
    assert compiler.read_kept("k") == b"code"
    (path,) = tmp_path.rglob("*.cubin")
    return path


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_kept_code_that_is_torn_is_not_used(kept, damage):
    content = kept.read_bytes()
    torn = {"cut": content[:-1], "changed": content[:-1] + b"x", "empty": b""}
    kept.write_bytes(torn[damage])
    assert compiler.read_kept("k") is None
    compiler.keep("k", b"code")
    assert compiler.read_kept("k") == b"code"


def test_code_is_on_the_disk_before_it_has_its_name(kept, monkeypatch):
    done = []
    sync, place = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (sync(fd), done.append("sync")))
    monkeypatch.setattr(os, "replace", lambda a, b: (place(a, b), done.append("name")))
    compiler.keep("k", b"new")
    assert done == ["sync", "name"]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o703])
def test_where_others_can_write_nothing_is_kept(kept, mode):
    """Else somebody else's code would run on the GPU."""
    kept.parent.chmod(mode)
    assert compiler.read_kept("k") is None
    kept.unlink()
    compiler.keep("k", b"code")
    assert not kept.exists()


def test_a_folder_of_another_user_is_not_used(kept, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert compiler.read_kept("k") is None


def test_a_link_is_no_folder_of_ours(kept, tmp_path):
    kept.parent.rename(tmp_path / "elsewhere")
    kept.parent.symlink_to(tmp_path / "elsewhere")
    assert compiler.read_kept("k") is None
