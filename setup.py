"""The one compiled part: an optional shim that gives MLX a fast BLAS on Linux CPUs."""

import sys

from setuptools import Extension, setup

# Optional: without a C compiler everything works, only slower on CPUs.
shim = Extension("pplex._blas", sources=["pplex/_blas.c"], optional=True)

setup(ext_modules=[shim] if sys.platform == "linux" else [])
