"""The compiled parts: optional libraries that make Linux CPUs fast."""

import sys

from setuptools import Extension, setup


def library(name: str, *headers: str) -> Extension:
    """Library ``pplex/NAME.c``. Without a C compiler everything works, only slower."""
    return Extension(
        f"pplex.{name}",
        sources=[f"pplex/{name}.c"],
        depends=[f"pplex/{header}" for header in headers],
        extra_compile_args=["-O3", "-fno-math-errno", "-Wno-psabi"],
        extra_link_args=["-pthread"],
        libraries=["m"],
        optional=True,
    )


libraries = [
    library("_blas", "_rows.h", "_each_cpu.h"),
    library("_lm", "_lm.h", "_each_cpu.h"),
    library("_codec", "_codec.h", "_each_cpu.h"),
]

setup(ext_modules=libraries if sys.platform == "linux" else [])
