"""The one compiled part: an optional shim that gives MLX a fast BLAS on Linux CPUs."""

import sys

from setuptools import Extension, setup

# Optional: without a C compiler everything works, only slower on CPUs.
shim = Extension(
    "pplex._blas",
    sources=["pplex/_blas.c"],
    depends=["pplex/_rows.h"],
    extra_compile_args=["-O3", "-fno-math-errno", "-Wno-psabi"],
    optional=True,
)

setup(ext_modules=[shim] if sys.platform == "linux" else [])
