"""How binaries of csrc/cuda are found, judged, loaded and launched; cuda-python is replaced by a stand-in."""

import ctypes
import json
import runpy
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vitrail.bench import cuda_resources
from vitrail.kernels import cubins, int4_decode, int8_gemm
from vitrail.kernels.cubins import CudaKernel
from vitrail.kernels.dispatch import ARCHS
from vitrail.runtime.errors import UnsupportedError

BUILD = runpy.run_path(str(cubins.SOURCES / "build.py"))
NVCC = BUILD["find_nvcc"]()
KERNEL = CudaKernel("file", "function", 128, 60_000)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the process looks for binaries, on a machine with an H200 and a 3080."""
    folder = tmp_path / "cubin"
    capabilities = [(9, 0), (8, 6), (7, 5)]
    monkeypatch.setattr(cubins, "FOLDER", folder)
    monkeypatch.setattr(cubins, "_loaded", {})
    for cached in (cubins._built, cubins._arch, cubins._most_shared, cubins.sources_digest):
        cached.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    limits = [232_448, 101_376, 65_536]
    properties = [SimpleNamespace(shared_memory_per_block_optin=limit) for limit in limits]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    yield folder
    for cached in (cubins._built, cubins._arch, cubins._most_shared):
        cached.cache_clear()


def write(folder: Path, **changes: Any) -> None:
    for arch in ARCHS:
        (folder / arch).mkdir(parents=True)
        (folder / arch / "file.cubin").write_bytes(arch.encode())
    index = {"nvcc": "13.0", "sources": BUILD["sources_digest"](), "archs": list(ARCHS)} | changes
    (folder / "index.json").write_text(json.dumps(index))


def test_where_nothing_was_built_nothing_is_available(folder) -> None:
    assert not cubins.available(torch.device("cuda"))
    with pytest.raises(UnsupportedError, match="no binary of function for GPU 0"):
        cubins._load(KERNEL, 0)


def test_a_gpu_takes_what_was_built_for_it_and_fits(folder) -> None:
    pytest.importorskip("cuda.core")
    write(folder)
    assert not cubins.available(torch.device("cpu"))
    assert cubins.available(torch.device("cuda"), 232_448)
    assert cubins.available(torch.device("cuda", 1), 101_376)
    assert not cubins.available(torch.device("cuda", 1), 101_377)
    assert not cubins.available(torch.device("cuda", 2))


def test_binaries_of_other_sources_are_left_alone_with_one_warning(folder) -> None:
    write(folder, sources="others")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not cubins.available(torch.device("cuda", 0))
        assert not cubins.available(torch.device("cuda", 1))
    assert len(caught) == 1
    assert "csrc/cuda has changed since; run csrc/cuda/build.py" in str(caught[0].message)


def test_a_damaged_index_is_an_error_that_names_it(folder) -> None:
    write(folder)
    (folder / "index.json").write_text("[]")
    with pytest.raises(UnsupportedError, match=rf"{folder}/index.json is damaged"):
        cubins.available(torch.device("cuda"))


def test_a_kernel_is_loaded_once_a_device_and_gets_its_arguments_in_their_widths(folder, monkeypatch) -> None:
    pytest.importorskip("cuda.core")
    write(folder)
    loaded, started = [], []
    monkeypatch.setattr(cubins, "load_kernel", lambda *args: loaded.append(args) or "kernel")
    monkeypatch.setattr(cubins, "start_kernel", lambda *args: started.append(args))
    x = torch.ones(3)
    for _ in range(2):
        cubins.launch(KERNEL, 7, x, None, 5, ctypes.c_int64(2**40))
    assert loaded == [(b"sm_90", "function", 60_000, 0)]
    kernel, _, values, grid, threads, shared = started[1]
    assert (kernel, grid, threads, shared) == ("kernel", (7,), 128, 60_000)
    assert values[:2] == (x.data_ptr(), 0)
    assert [type(value) for value in values[2:]] == [ctypes.c_int32, ctypes.c_int64]
    assert [value.value for value in values[2:]] == [5, 2**40]


def test_what_the_driver_refuses_is_an_error_that_names_the_binary(folder) -> None:
    pytest.importorskip("cuda.core")
    write(folder)
    (folder / "sm_80" / "file.cubin").unlink()
    with pytest.raises(UnsupportedError, match=rf"{folder}/sm_80/file.cubin cannot be loaded"):
        cubins._load(KERNEL, 1)


def test_the_committed_table_has_every_kernel_and_no_fault() -> None:
    tables = [json.loads(file.read_text()) for file in cuda_resources.TABLES.glob("nvcc-*.json")]
    assert tables
    kernels = {kernel.function: kernel for kernel in (*int4_decode.kernels(), *int8_gemm.kernels())}
    for table in tables:
        assert cuda_resources.faults(table["kernels"]) == []
        for arch in ARCHS:
            assert table["kernels"][arch].keys() == kernels.keys()
            assert all(row["shared"] == kernels[name].shared for name, row in table["kernels"][arch].items())


def test_spills_too_much_shared_memory_and_lost_tensor_cores_are_faults() -> None:
    row = {"stack": 0, "shared": 1000, "opcodes": {"IMMA": 64}}
    faulty = {
        "int8_gemm_stack": row | {"stack": 8},
        "int8_gemm_spills": row | {"opcodes": {"IMMA": 64, "STL": 1}},
        "int8_gemm_shared": row | {"shared": 166_913},
        "int4_decode": row,
    }
    found = cuda_resources.faults({"sm_80": faulty | {"int8_gemm": row, "int4_dequantize": row}, "sm_90": {}})
    assert [line.split()[1] for line in found] == [f"{name}:" for name in faulty]


needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@needs_nvcc
def test_a_warning_of_nvcc_is_an_error_and_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "warns.cu").write_text('extern "C" __global__ void kernel() { int unused = 1; }\n')
    monkeypatch.setitem(BUILD["build"].__globals__, "SOURCES", sources)
    folder = tmp_path / "cubin"
    write(folder, sources="others")
    with pytest.raises(RuntimeError, match=r"nvcc on warns.cu for sm_(80|90a):\n(.|\n)*unused"):
        BUILD["build"](folder, NVCC)
    assert (folder / "sm_80" / "file.cubin").read_bytes() == b"sm_80"
    assert sorted(tmp_path.iterdir()) == [folder, sources]


@needs_nvcc
def test_what_is_built_is_accepted_and_not_built_again(tmp_path, monkeypatch) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.cu").write_text('extern "C" __global__ void kernel(int* x) { *x = 1; }\n')
    monkeypatch.setitem(BUILD["build"].__globals__, "SOURCES", sources)
    folder = tmp_path / "cubin"
    assert BUILD["build"](folder, NVCC)
    assert not BUILD["build"](folder, NVCC)
    index = json.loads((folder / "index.json").read_text())
    assert index["sources"] == cubins.sources_digest(sources)
    assert sorted(file.name for file in folder.glob("*/*")) == ["one.cubin"] * 2
    (sources / "one.cu").write_text('extern "C" __global__ void kernel(int* x) { *x = 2; }\n')
    assert BUILD["build"](folder, NVCC)


def test_without_nvcc_the_script_says_so(tmp_path) -> None:
    environment = {"PATH": "/nowhere", "CUDA_HOME": str(tmp_path), "LC_ALL": "C"}
    code = (
        "import runpy, shutil, sys; shutil.which = lambda *args, **keywords: None; sys.argv = ['build.py']; "
        f"runpy.run_path({str(cubins.SOURCES / 'build.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "no nvcc found: set CUDA_HOME\n")
