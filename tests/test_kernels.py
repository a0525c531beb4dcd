"""Compiling CUDA kernels, which needs no GPU; what they compute: test_cuda.py."""

from __future__ import annotations

from pplex.layers.cuda import compiler


def test_kernels_are_compiled_once_and_kept(tmp_path, monkeypatch):
    class Nvrtc:
        @staticmethod
        def nvrtcVersion(major, minor):  # noqa: N802
            return 0

    compiled = []

    def compile_it(_, source):
        compiled.append(source)
        return b"code of " + source.encode()

    monkeypatch.setattr(compiler, "_nvrtc", Nvrtc)
    monkeypatch.setattr(compiler, "_compile", compile_it)
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
