"""The compiled part: an optional library that makes CPUs fast."""

import platform
import sys

from setuptools import Extension, setup

if sys.platform == "darwin" and platform.machine() != "arm64":
    sys.exit(
        f"pplex needs a Mac with Apple silicon, and {sys.executable} is a Python for "
        "Intel: MLX is not made for it. On Apple silicon take one for arm64."
    )

FOLDER = "pplex/engine/c"

# Without a C compiler MLX does its work.
library = Extension(
    "pplex.engine.c._native",
    sources=[f"{FOLDER}/{name}.c" for name in ("lm", "codec", "threads")],
    depends=[
        f"{FOLDER}/{name}.h" for name in ("lm", "codec", "threads", "simd", "each_cpu")
    ],
    extra_compile_args=["-O3", "-fno-math-errno", "-Wno-psabi"],
    extra_link_args=["-pthread"],
    libraries=["m"],
    optional=True,
)

setup(ext_modules=[library] if sys.platform in ("linux", "darwin") else [])
