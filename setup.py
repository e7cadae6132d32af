"""Package mapping: the repository root is the import package `vitrail`."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOMS = ("kernels", "runtime", "export", "bench")


def packages() -> list[str]:
    """`vitrail` and every folder of its rooms that holds an `__init__.py`."""
    root = Path(__file__).parent
    inits = [init for room in ROOMS for init in sorted((root / room).rglob("__init__.py"))]
    return ["vitrail", *(".".join(("vitrail", *init.parent.relative_to(root).parts)) for init in inits)]


class BuildPy(build_py):
    """`build_py` without the root's `setup.py`, which is no module of the package."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] != ("vitrail", "setup")]


setup(packages=packages(), cmdclass={"build_py": BuildPy})
