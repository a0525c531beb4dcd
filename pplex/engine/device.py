"""What computes here: its name, how much memory it has, and how fast that is."""

from __future__ import annotations

import functools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np

from pplex.engine.cuda import driver
from pplex.errors import PplexError

_COPY_BYTES = 256 << 20
_COPY_SHARE = 64  # a copy takes at most one part in so many of the device's memory
_COPIES = 8  # launched together, so that launching does not count
_ROUNDS = 5
_MAX_THREADS = 8


def on_cpu() -> bool:
    """Whether MLX's default device is a CPU."""
    return mx.default_device() == mx.Device(mx.cpu)


def compute_dtype(on_gpu: bool) -> mx.Dtype:
    """What is computed in: float32 on a CPU, bfloat16 on a GPU."""
    return mx.bfloat16 if on_gpu else mx.float32


@functools.cache
def streams() -> list[mx.Stream]:
    """Where work that comes in pieces is done: a CPU's two threads, a GPU's queue."""
    device = mx.default_device()
    if not on_cpu():
        return [mx.default_stream(device)]
    return [mx.new_stream(device) for _ in range(2)]


def _has_cuda() -> bool:
    return not on_cpu() and mx.cuda.is_available()


def num_gpus() -> int:
    """How many GPUs could compute here; 0 on a CPU, and one where nobody counts."""
    if on_cpu():
        return 0
    return driver.num_devices() if _has_cuda() else 1


def device_name() -> str:
    """The device that MLX computes on, with its name where MLX knows one."""
    device = mx.default_device()
    kind = "cpu" if on_cpu() else "gpu"
    name = mx.device_info(device).get("device_name", "")
    return f"{kind} ({name})" if name else kind


@functools.cache
def num_cores() -> int:
    """Cores that this process may use, all of their time.

    A container that is given the time of a few has many to see.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # not on Linux, or no limit
        pass
    return cores


def memory_gb() -> tuple[float | None, float | None]:
    """Total and free memory of what computes, in GB; None where nobody says."""
    if not on_cpu():
        mx.clear_cache()  # memory that MLX only keeps for later is free
        info = mx.device_info(mx.default_device())
        total = info.get("total_memory") or info.get("memory_size")
        free = info.get("free_memory")
        if free is None and (most := info.get("max_recommended_working_set_size")):
            free = int(most) - mx.get_active_memory()
        return tuple(int(x) / 1e9 if x else None for x in (total, free))  # type: ignore
    if sys.platform != "linux":
        return host_memory_gb(), None
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    sizes = {
        key: int(rest.split()[0]) for key, _, rest in (x.partition(":") for x in lines)
    }
    return tuple(
        sizes[key] * 1024 / 1e9 if key in sizes else None
        for key in ("MemTotal", "MemAvailable")
    )  # type: ignore


def available_gb() -> float | None:
    """Memory in GB that a model may have here: what is free, or all that there is."""
    total, free = memory_gb()
    return total if free is None else free


def host_memory_gb() -> float | None:
    """Memory of this machine in GB, where the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (AttributeError, ValueError, OSError):
        return None


def bound_memory(kept_bytes: int) -> None:
    """On a Mac: MLX keeps no more for later than so much, and models stay in memory.

    Without, it keeps what it once had, and the system may take weights that wait.
    """
    if mx.metal.is_available():
        mx.set_cache_limit(kept_bytes)
        info = mx.device_info(mx.Device(mx.gpu))
        mx.set_wired_limit(int(info["max_recommended_working_set_size"]))


def peak_memory_gb() -> float:
    """The most that was held so far: by MLX on a GPU, by this process on a CPU."""
    if on_cpu() and (peak := peak_process_gb()) is not None:
        return peak
    return mx.get_peak_memory() / 1e9


def reset_peak_memory() -> None:
    """Count what MLX holds at most from now on; of a process nobody can."""
    mx.reset_peak_memory()


def is_out_of_memory(error: Exception) -> bool:
    """Whether MLX, on any of its backends, or Python could not get memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        sign in text
        for sign in (
            "out of memory",
            "outofmemory",
            "unable to allocate",
            "malloc",
            "bad_alloc",
            "cudaerrormemoryallocation",
            "insufficient memory",
            "maximum allowed buffer size",
        )
    )


def peak_process_gb() -> float | None:
    """The most that this process has held so far, in GB; None where nobody says."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def copy_bandwidth_gb_s() -> float:
    """GB/s of copies of large arrays, read and written bytes both counted.

    The best of some rounds; on a CPU with a thread a core.
    """
    total_gb, _ = memory_gb()
    size = _COPY_BYTES
    if total_gb is not None:
        size = min(size, int(total_gb * 1e9) // _COPY_SHARE)
    seconds = _copies_on_cpu(size) if on_cpu() else _copies_on_gpu(size)
    return 2 * _COPIES * size / measurable(seconds) / 1e9


def measurable(seconds: float) -> float:
    """Seconds that something took, by which figures are divided."""
    if seconds <= 0:
        raise PplexError("the clock of this machine stands still: nothing is measured")
    return seconds


def _copies_on_gpu(size: int) -> float:
    plain = driver.copy_seconds(size, _COPIES, _ROUNDS) if _has_cuda() else None
    if plain is not None:
        return plain
    source = mx.zeros((size // 4,), mx.int32)
    mx.eval(source)
    spent = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        # Nothing of MLX is a plain copy but this: read everything, write everything.
        mx.eval([source + i for i in range(_COPIES)])
        mx.synchronize()
        spent.append(time.perf_counter() - start)
    mx.clear_cache()
    return min(spent)


def _copies_on_cpu(size: int) -> float:
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    shape = (threads, size // 4 // threads)
    source, target = np.ones(shape, np.int32), np.zeros(shape, np.int32)
    spent = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            for _ in range(_COPIES):
                list(pool.map(np.copyto, target, source))
            spent.append(time.perf_counter() - start)
    return min(spent)
