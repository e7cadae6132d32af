"""Package mapping: the repository root is the import package `vitrail`. And its C++ extension, which is optional.

`VITRAIL_NO_EXTENSION=1` leaves the extension out; `VITRAIL_WERROR=1` makes its warnings, and its failure, errors.
"""

import os
import platform
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CCompilerError, ExecError, PlatformError

ROOT = Path(__file__).parent
ROOMS = ("kernels", "runtime", "export", "bench")
WERROR = os.environ.get("VITRAIL_WERROR") == "1"

# Contraction of a * b + c would make results differ between instruction sets, and from Pillow's.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))]
# GCC 12 warns about its own headers of AVX-512 wherever they are inlined; Clang does not know the second name.
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
# What the files whose names end so are compiled with, by processor; the others get FLAGS alone.
INSTRUCTION_SETS = {
    "x86_64": {"avx2": AVX2, "avx512": AVX512},
    "aarch64": {"neon": ["-march=armv8.2-a+dotprod"]},
    "arm64": {"neon": []},  # Apple's processors all have it
}


def packages() -> list[str]:
    """`vitrail` and every folder of its rooms that holds an `__init__.py`."""
    inits = [init for room in ROOMS for init in sorted((ROOT / room).rglob("__init__.py"))]
    return ["vitrail", *(".".join(("vitrail", *init.parent.relative_to(ROOT).parts)) for init in inits)]


def extensions() -> list[Extension]:
    """The extension, or nothing and one line that says why."""
    if os.environ.get("VITRAIL_NO_EXTENSION") == "1":
        return skipped("VITRAIL_NO_EXTENSION is set")
    if find_spec("pybind11") is None:
        return skipped("pybind11 is not installed")
    if os.name == "nt":
        return skipped("it is written for GCC and Clang")
    import pybind11

    return [
        Extension(
            "vitrail._cpu",
            sources=sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc/cpu").glob("*.cpp")),
            depends=sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc/cpu").glob("*.h")),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=[*FLAGS, *(["-Werror"] if WERROR else [])],
            extra_link_args=["-pthread"],
            language="c++",
            optional=not WERROR,
        )
    ]


def skipped(reason: str) -> list[Extension]:
    print(f"vitrail: the C++ extension is not built: {reason}")
    return []


class BuildExt(build_ext):
    """`build_ext` with flags by file; a failure costs the extension and not the installation."""

    def build_extension(self, ext: Extension) -> None:
        special = INSTRUCTION_SETS.get(platform.machine(), {})
        known = {name for names in INSTRUCTION_SETS.values() for name in names}
        sources, objects = [], []
        try:
            for source in ext.sources:
                name = Path(source).stem.rpartition("_")[2]
                if name in special:
                    objects += self.compiler.compile(
                        [source],
                        output_dir=self.build_temp,
                        include_dirs=ext.include_dirs,
                        extra_postargs=[*ext.extra_compile_args, *special[name]],
                        depends=ext.depends,
                    )
                elif name not in known:
                    sources.append(source)
            ext.sources, ext.extra_objects = sources, objects
            super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError) as error:
            if not ext.optional:
                raise
            skipped(str(error))


class BuildPy(build_py):
    """`build_py` without the root's `setup.py`, which is no module of the package."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] != ("vitrail", "setup")]


setup(packages=packages(), ext_modules=extensions(), cmdclass={"build_ext": BuildExt, "build_py": BuildPy})
