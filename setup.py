"""Package mapping: the repository root is the import package `vitrail`. And what is compiled, which is optional.

That is the C++ extension (csrc/cpu), which `VITRAIL_NO_EXTENSION=1` leaves out, and, where there is nvcc, the CUDA
kernels (csrc/cuda), which `VITRAIL_NO_CUDA=1` leaves out. `VITRAIL_WERROR=1` makes the extension's warnings, and any
failure, errors.
"""

import os
import platform
import runpy
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build import build
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


class BuildCubins(Command):
    """Compiles csrc/cuda into the package: beside the sources for an editable installation, else into the build."""

    description = "compile the CUDA kernels"
    user_options: ClassVar[list[tuple[str, str, str]]] = []
    editable_mode = False
    build_lib: str | None

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        script = runpy.run_path(str(ROOT / "csrc/cuda/build.py"))
        checkout: Path = script["CHECKOUT"]
        folder = checkout if self.editable_mode else Path(str(self.build_lib), "vitrail/kernels/cubin")
        nvcc = script["find_nvcc"]()
        if os.environ.get("VITRAIL_NO_CUDA") == "1" or nvcc is None:
            # What stands beside the sources may be old; build_py has taken it along.
            if not self.editable_mode and script["index_of"](folder).get("sources") != script["sources_digest"]():
                shutil.rmtree(folder, ignore_errors=True)
            return
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            script["build"](folder, nvcc)
        except (RuntimeError, OSError) as error:
            if WERROR:
                raise
            print(f"vitrail: the CUDA kernels are not built: {error}")

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in names them

    def get_outputs(self) -> list[str]:
        return []  # build_py's package data cover them

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """`build` with the CUDA kernels."""

    sub_commands: ClassVar = [*build.sub_commands, ("build_cubins", None)]


class BuildPy(build_py):
    """`build_py` without the root's `setup.py`, which is no module of the package."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] != ("vitrail", "setup")]


COMMANDS = {"build": Build, "build_cubins": BuildCubins, "build_ext": BuildExt, "build_py": BuildPy}
setup(packages=packages(), ext_modules=extensions(), cmdclass=COMMANDS)
