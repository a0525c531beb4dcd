"""The compiled parts: optional libraries that make Linux CPUs fast."""

import sys

from setuptools import Extension, setup


def library(name: str) -> Extension:
    """Library ``NAME.c`` of the C engine. Without a C compiler MLX does its work."""
    folder = "pplex/engine/c"
    return Extension(
        f"pplex.engine.c._{name}",
        sources=[f"{folder}/{name}.c"],
        depends=[f"{folder}/{h}.h" for h in (name, "simd", "each_cpu")],
        extra_compile_args=["-O3", "-fno-math-errno", "-Wno-psabi"],
        extra_link_args=["-pthread"],
        libraries=["m"],
        optional=True,
    )


libraries = [library("lm"), library("codec")]

setup(ext_modules=libraries if sys.platform == "linux" else [])
