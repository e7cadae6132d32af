"""What is built and installed: the wheel holds the package and nothing else, under one name."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "runtime", "export", "bench")
NOT_COPIED = (".*", "build", "dist", "*.egg-info", "__pycache__", "results")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution, built without network from a copy of the tree."""
    folder = tmp_path_factory.mktemp("packaging")
    # A copy, because setuptools leaves a build/ behind whose old files would slip into the next wheel.
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True)
    code = "from setuptools.build_meta import *; build_wheel('../out'); build_sdist('../out')"
    (folder / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder / "tree", capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
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
