"""CUDA sources of ours to kernels that MLX launches.

They are compiled by NVRTC, which MLX itself needs, and include no header: reading those
is what takes MLX's own kernels two seconds each to compile.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import mlx.core as mx
import numpy as np

from pplex.errors import PplexError
from pplex.files import atomic_write, cache_folder, read_regular

NVRTC = "libnvrtc.so.13", "libnvrtc.so.12"
_DIGEST_BYTES = 32
_MAX_KEPT_BYTES = 1 << 28
MIN_CAPABILITY = 8  # bfloat16, and 100 KB of shared memory


@functools.cache
def is_usable() -> bool:
    """Whether there is a CUDA device that can run these kernels."""
    return mx.cuda.is_available() and capability()[0] >= MIN_CAPABILITY


def capability() -> tuple[int, int]:
    """The GPU's compute capability."""
    info = mx.device_info(mx.Device(mx.gpu))
    major, minor = (info[f"compute_capability_{name}"] for name in ("major", "minor"))
    return int(major), int(minor)


Output = tuple[tuple[int, ...], mx.Dtype]


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel ``name`` with ``threads`` to a block."""

    name: str
    code: bytes
    threads: int
    shared_memory: int = 0

    @classmethod
    def of(cls, name: str, source: str, threads: int, shared_memory: int = 0) -> Kernel:
        """The kernel ``name`` of ``source``, compiled.

        MLX knows a kernel by its name alone, and a process may have several models.
        """
        unique = f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
        code = compile_cuda(f"#define {name} {unique}\n{source}")
        return cls(unique, code, threads, shared_memory)

    def __call__(
        self,
        inputs: Sequence[mx.array],
        outputs: Sequence[Output],
        scalars: Sequence[int | float],
        blocks: tuple[int, int],
        init_value: float | None = None,
    ) -> list[mx.array]:
        """The outputs; the kernel is given inputs, outputs, scalars in this order."""
        return mx.fast.precompiled_cuda_kernel(
            name=self.name,
            compiled_source=self.code,
            inputs=inputs,
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
            # MLX 0.32 refuses floats; a parameter takes the bits as they are.
            scalars=[_bits(x) if isinstance(x, float) else x for x in scalars],
            grid=(blocks[0] * self.threads, blocks[1], 1),
            threadgroup=(self.threads, 1, 1),
            shared_memory=self.shared_memory,
            init_value=init_value,
            ensure_row_contiguous=True,
        )


def _bits(x: float) -> int:
    return int(np.float32(x).view(np.int32))


def read_source(name: str) -> str:
    """The text of a CUDA file beside this module."""
    return resources.files("pplex.engine.cuda").joinpath(name).read_text()


def with_constants(constants: dict[str, int], *sources: str) -> str:
    """``sources`` one after the other, with integers that they know by name."""
    lines = [f"constexpr int {name} = {value};" for name, value in constants.items()]
    return "\n".join([*lines, *sources])


def compile_cuda(source: str) -> bytes:
    """Machine code of ``source`` for this GPU, kept on disk for the next time.

    Raises RuntimeError with the compiler's words, which only a mistake in the source
    or an installation of CUDA without NVRTC brings about.
    """
    nvrtc, versions = _nvrtc(), (ctypes.c_int(), ctypes.c_int())
    nvrtc.nvrtcVersion(*map(ctypes.byref, versions))
    target = capability()
    made_of = source, target, [version.value for version in versions]
    name = hashlib.sha256(repr(made_of).encode()).hexdigest()
    kept = read_kept(name)
    if kept is not None:
        return kept
    code, _ = compile_for(nvrtc, source, target)
    keep(name, code)
    return code


def read_kept(name: str) -> bytes | None:
    """The machine code that was kept under a name, if it is whole and ours."""
    try:
        content = read_regular(_own_folder() / f"{name}.cubin", _MAX_KEPT_BYTES)
    except (OSError, PplexError):
        return None
    digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def keep(name: str, code: bytes) -> None:
    """Keep machine code behind its SHA-256; without a place it is compiled again."""
    try:
        with (
            atomic_write(_own_folder() / f"{name}.cubin") as temporary,
            temporary.open("wb") as file,
        ):
            file.write(hashlib.sha256(code).digest() + code)
            file.flush()
            # Before it has its name: a power cut must not leave half of it there.
            os.fsync(file.fileno())
    except (OSError, PplexError):
        return


def _own_folder() -> Path:
    """Where machine code is kept: a folder that only this user can write to.

    The GPU runs what lies there. Where others can write, nothing is kept.
    """
    folder = cache_folder() / "cuda-kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PplexError(f"{folder} is not a folder of this user")
    if stat.S_IMODE(status.st_mode) & 0o022:
        raise PplexError(f"{folder} can be written to by others")
    return folder


def compile_for(
    nvrtc: ctypes.CDLL, source: str, target: tuple[int, int]
) -> tuple[bytes, str]:
    """Machine code of ``source`` for a compute capability; what the compiler says."""
    program = ctypes.c_void_p()
    major, minor = target
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17"]
    options.append("--device-as-default-execution-space")  # lambdas, before NVRTC 13.5
    texts = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"pplex.cu", 0, None, None
    )
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(options), texts)
        said = _bytes_of(nvrtc, "ProgramLog", program).decode().rstrip("\0")
        if failed:
            raise RuntimeError(f"CUDA's compiler refuses a kernel: {said}")
        return _bytes_of(nvrtc, "CUBIN", program), said
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes_of(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The library that MLX has loaded, whichever of them it is."""
    for name in NVRTC:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError(f"none of {', '.join(NVRTC)} can be loaded; MLX needs one too")
