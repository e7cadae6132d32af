"""What is built and installed: the wheel holds the package and nothing else, under one name."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "runtime", "export", "bench")
NOT_COPIED = (".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "results")


def build(folder: Path, *steps: str, **variables: str) -> str:
    """What steps of the build backend print; they run on a copy of the tree, without network, into folder/out."""
    # A copy, because setuptools leaves a build/ behind whose old files would slip into the next wheel.
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True)
    (folder / "out").mkdir()
    code = "from setuptools.build_meta import *; " + "; ".join(f"{step}('../out')" for step in steps)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder / "tree",
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, without the C++ extension, and the source distribution."""
    folder = tmp_path_factory.mktemp("packaging")
    printed = build(folder, "build_wheel", "build_sdist", VITRAIL_NO_EXTENSION="1")
    assert "vitrail: the C++ extension is not built: VITRAIL_NO_EXTENSION is set" in printed
    return folder / "out"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel, and nothing else, was installed."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile")
    done = subprocess.run([*pip, "--target", target, wheel], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


def run_bare(installed: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with the standard library and `installed` alone: no site-packages, no current folder."""
    prefix = f"import sys; sys.path.append({str(installed)!r}); "
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", prefix + code], capture_output=True, text=True, check=False, cwd=installed
    )


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_every_module_of_the_rooms(wheel: Path) -> None:
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    expected = {f"vitrail/{file.relative_to(ROOT).as_posix()}" for file in files}
    assert expected <= names(wheel)


def test_the_wheel_holds_the_bundled_model_the_fonts_and_the_type_marker(wheel: Path) -> None:
    data = [*(ROOT / "runtime/assets").rglob("*"), *(ROOT / "bench/nano").glob("*.ttf"), ROOT / "py.typed"]
    data += [ROOT / "runtime/server/page.html"]
    expected = {f"vitrail/{file.relative_to(ROOT).as_posix()}" for file in data if file.is_file()}
    assert expected <= names(wheel)


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    info = f"vitrail-{importlib.metadata.version('vitrail')}.dist-info/"
    places = ("vitrail/__init__.py", "vitrail/py.typed", *(f"vitrail/{room}/" for room in ROOMS), info)
    assert [name for name in sorted(names(wheel)) if not name.startswith(places)] == []


def test_the_source_distribution_can_be_built_from_and_tested(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE", "tests/conftest.py"} <= held
    assert {f"examples/{file.name}" for file in (ROOT / "examples").glob("*.*")} <= held
    assert {f"csrc/cpu/{file.name}" for file in (ROOT / "csrc/cpu").glob("[!.]*")} <= held
    assert not {name for name in held if "__pycache__" in name}


def test_only_the_name_vitrail_is_put_on_the_import_path(installed: Path) -> None:
    code = (
        "import importlib.util as u, json; "
        f"print(json.dumps([n for n in {(*ROOMS, 'tests', 'tools', 'setup', 'vitrail.setup')} if u.find_spec(n)]))"
    )
    done = run_bare(installed, code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_the_runtime_is_found_without_any_dependency_installed(installed: Path) -> None:
    done = run_bare(installed, "from vitrail import runtime; print(runtime.__file__, 'torch' in sys.modules)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(installed / "vitrail/runtime/__init__.py"), "False"]


def test_the_version_is_told_once(wheel: Path) -> None:
    import vitrail

    assert wheel.name.split("-")[1] == vitrail.__version__ == importlib.metadata.version("vitrail")


def test_the_command_is_installed(wheel: Path) -> None:
    entry = next(name for name in names(wheel) if name.endswith("entry_points.txt"))
    assert "vitrail = vitrail.runtime.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()


def test_without_the_extension_the_wheel_is_for_every_machine(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")


def test_what_cannot_be_compiled_costs_the_extension_alone(tmp_path: Path) -> None:
    printed = build(tmp_path, "build_wheel", CC="no-such-compiler", CXX="no-such-compiler", VITRAIL_WERROR="0")
    assert "vitrail: the C++ extension is not built: " in printed
    assert not {name for name in names(next((tmp_path / "out").glob("*.whl"))) if name.endswith(".so")}


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("pybind11"), reason="pybind11 is not installed")
def test_the_wheel_with_the_extension_holds_it_and_none_of_its_sources(wheel: Path, tmp_path: Path) -> None:
    build(tmp_path, "build_wheel", VITRAIL_WERROR="1")
    full = next((tmp_path / "out").glob("*.whl"))
    (binary,) = {name for name in names(full) if name not in names(wheel)}
    assert binary.startswith("vitrail/_cpu.")
    zipfile.ZipFile(full).extractall(tmp_path / "installed")
    code = (
        "import sys; sys.path.insert(0, '.'); from vitrail import _cpu; print(_cpu.__file__, *_cpu.instruction_sets())"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path / "installed", capture_output=True, text=True, check=False
    )
    assert done.stdout.split()[:2] == [str(tmp_path / "installed" / binary), "portable"], done.stderr
