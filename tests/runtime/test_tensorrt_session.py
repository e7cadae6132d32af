"""The TensorRT session: what is refused before an engine is read, and the order of its work, by a TensorRT of Python.

The GPU is a CPU here: `HostStream` stands for the CUDA stream, `Api` for the package. What an engine really computes
is tested where there is a GPU.
"""

import ctypes
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vitrail.runtime.backends import tensorrt_api, tensorrt_session
from vitrail.runtime.backends.engine_file import PORTABLE, Engine, find_engine, metadata_path, read_engine
from vitrail.runtime.backends.manifest import Parameters, Part, TensorSpec, file_sha256
from vitrail.runtime.backends.tensorrt_session import TensorRTSession
from vitrail.runtime.errors import CheckpointError, InvalidRequestError, UnsupportedError

PLAN = b"an engine"
MAX_TILES = 5
SIDE, TOKENS, HIDDEN = 4, 3, 2


class HostStream:
    """Memory of the host, and work recorded as calls."""

    def __init__(self, device: torch.device) -> None:
        self.log: list[str] = []
        self.handle = 7

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        self.log.append("begin")
        yield
        self.log.append("end")

    def record(self, work: Callable[[int], None]) -> Callable[[], None]:
        self.log.append("record")

        def replay() -> None:
            self.log.append("replay")
            work(-1)

        return replay

    def sync(self) -> None:
        self.log.append("sync")

    def close(self) -> None:
        self.log.append("close")


class Context:
    """Adds up the tiles it is shown, by addresses alone."""

    def __init__(self, api: "Api", how: Any) -> None:
        self.api, self.how = api, how
        self.addresses: dict[str, int] = {}
        self.count = 0
        self.runs: list[int] = []

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def set_device_memory(self, address: int, size: int) -> None:
        self.api.scratch.add((address, size))

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert (name, shape[1:]) == ("tiles", (SIDE, SIDE, 3))
        self.count = shape[0]
        return not self.api.refuses_shapes

    def execute_async_v3(self, handle: int) -> bool:
        if self.api.fails:
            self.api.logger.log(_Severity("ERROR"), "out of luck")
            return False
        self.runs.append(handle)
        tiles = _memory(self.addresses["tiles"], self.count * SIDE * SIDE * 3, ctypes.c_uint8).reshape(self.count, -1)
        out = _memory(self.addresses["visual_tokens"], self.count * TOKENS * HIDDEN, ctypes.c_float)
        out.reshape(self.count, -1)[:] = tiles.sum(1, dtype=np.float32)[:, None]
        return True


class _Severity:
    def __init__(self, name: str) -> None:
        self.name = name


class _Plan:
    device_memory_size_v2 = 1024

    def __init__(self, api: "Api") -> None:
        self.api = api

    def create_execution_context(self, how: Any) -> Context | None:
        if self.api.no_memory:
            return None
        self.api.contexts.append(Context(self.api, how))
        return self.api.contexts[-1]

    def create_runtime_config(self) -> Any:
        return type("RuntimeConfig", (), {"cuda_graph_strategy": None})()


class Api:
    """What the session asks of TensorRT's package. rtx: as TensorRT-RTX has it."""

    def __init__(self, version: str = "11.1.0", rtx: bool = False) -> None:
        self.__version__ = version
        self.contexts: list[Context] = []
        self.scratch: set[tuple[int, int]] = set()
        self.read: list[bytes] = []
        self.fails = self.no_memory = self.refuses_shapes = self.refuses_plan = False
        self.logger: Any = None
        self.diagnostics = 0
        api = self

        class ILogger:
            def __init__(self) -> None:
                api.logger = self

        class Runtime:
            def __init__(self, logger: Any) -> None: ...

            def deserialize_cuda_engine(self, plan: bytes) -> _Plan | None:
                api.read.append(plan)
                return None if api.refuses_plan else _Plan(api)

        class Strategy:
            USER_MANAGED = "user managed"

        class Kinds(IntEnum):
            OLD_CUDA_DRIVER = 4
            INSUFFICIENT_GPU_MEMORY = 16

        self.ILogger, self.Runtime, self.ExecutionContextAllocationStrategy = ILogger, Runtime, Strategy
        if rtx:
            self.CudaGraphStrategy = type("CudaGraphStrategy", (), {"WHOLE_GRAPH_CAPTURE": "whole graph"})
            self.EngineValidity = type("EngineValidity", (), {"INVALID": 2, "VALID": 0})
            self.EngineInvalidityDiagnostics = Kinds
            Runtime.get_engine_validity = lambda _, plan: (2 if api.diagnostics else 0, api.diagnostics)  # type: ignore[attr-defined]


def _memory(address: int, count: int, kind: Any) -> Any:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(kind)), (count,))


def part(name: str = "vision") -> Part:
    return Part(
        name=name,
        file=f"{name}.onnx",
        data=f"{name}.data",
        dtype="float32",
        quantization=None,
        opset=21,
        inputs=(TensorSpec("tiles", "uint8", ("tiles", SIDE, SIDE, 3)),),
        outputs=(TensorSpec("visual_tokens", "float32", ("tiles", TOKENS, HIDDEN)),),
        limits={"tiles": 40},
        parameters=Parameters(0, ""),
    )


def write_engine(folder: Path, **changes: Any) -> Path:
    path = folder / "vision.engine"
    path.write_bytes(PLAN)
    values: dict[str, Any] = {
        "path": path,
        "part": part(),
        "product": "tensorrt",
        "version": "11.1.0",
        "compute_capabilities": ("8.0",),
        "precision": "fp32",
        "profiles": {"tiles": {"tiles": (1, 2, MAX_TILES)}},
        "bytes": len(PLAN),
        "sha256": file_sha256(path),
        "onnx": {"vision.onnx": "0"},
    }
    metadata_path(path).write_text(json.dumps(Engine(**{**values, **changes}).to_json()), encoding="utf-8")
    return path


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    """Classic TensorRT 11.1.0, on a machine with one A100."""
    return install(monkeypatch, Api())


def install(monkeypatch: pytest.MonkeyPatch, api: Api, module: str = "tensorrt") -> Api:
    def only(name: str) -> Any:
        if name == module:
            return api
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(tensorrt_api, "import_module", only)
    monkeypatch.setattr(tensorrt_session, "CudaStream", HostStream)
    monkeypatch.setattr(tensorrt_session, "_cuda_device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    return api


def tiles_of(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.manual_seed(seed))


def expected(tiles: Tensor) -> Tensor:
    return tiles.flatten(1).float().sum(1)[:, None, None].expand(-1, TOKENS, HIDDEN)


def log_of(session: TensorRTSession) -> list[str]:
    stream = session._stream
    assert isinstance(stream, HostStream)
    return stream.log


@pytest.mark.parametrize("count", [1, MAX_TILES, MAX_TILES + 1, 2 * MAX_TILES + 3])
def test_tiles_are_encoded_in_order_in_runs_of_what_the_profile_takes(api: Api, tmp_path: Path, count: int) -> None:
    with TensorRTSession(write_engine(tmp_path)) as session:
        assert (session.max_tiles, session.dtype, session.hidden_size) == (MAX_TILES, torch.float32, HIDDEN)
        tiles = tiles_of(count)
        assert torch.equal(session.encode(tiles), expected(tiles))
    sizes = {context.count for context in api.contexts}
    assert sizes == {min(count, MAX_TILES), *([count % MAX_TILES] if count > MAX_TILES else [])}


def test_a_number_of_tiles_is_captured_once_in_a_context_of_its_own_and_then_replayed(api: Api, tmp_path: Path) -> None:
    with TensorRTSession(tmp_path if write_engine(tmp_path) else "") as session:
        for count, seed in ((2, 0), (3, 1), (2, 2), (2, 3)):
            tiles = tiles_of(count, seed)
            assert torch.equal(session.encode(tiles), expected(tiles))
        order = ["begin", "record", "end"] * 2 + ["begin", "replay", "end"] * 2
        assert log_of(session) == order
    # The first run of a shape is not captured; the graph of 2 tiles outlives the context of 3.
    assert [(context.count, context.runs) for context in api.contexts] == [(2, [7, -1, -1]), (3, [7])]
    assert len(api.scratch) == 1, "contexts share one piece of memory"


def test_answers_are_the_callers_to_keep(api: Api, tmp_path: Path) -> None:
    with TensorRTSession(write_engine(tmp_path)) as session:
        first = session.encode(tiles_of(2, 0))
        session.encode(tiles_of(2, 1))
        assert torch.equal(first, expected(tiles_of(2, 0)))


def test_tensorrt_rtx_captures_graphs_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    api = install(monkeypatch, Api("1.7.1", rtx=True), "tensorrt_rtx_bindings")
    path = write_engine(tmp_path, product="tensorrt-rtx", version="1.7.1")
    with TensorRTSession(path) as session:
        for count in (2, 3, 2):
            assert torch.equal(session.encode(tiles_of(count)), expected(tiles_of(count)))
        assert "record" not in log_of(session)
    assert [context.how.cuda_graph_strategy for context in api.contexts] == ["whole graph"]


def test_a_closed_session_says_so_and_frees_its_stream(api: Api, tmp_path: Path) -> None:
    session = TensorRTSession(write_engine(tmp_path))
    log = log_of(session)
    session.close()
    session.close()
    assert log == ["sync", "close"]
    with pytest.raises(InvalidRequestError, match="closed"):
        session.encode(tiles_of(1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "10.9.0"}, "built by tensorrt 10.9.0, and tensorrt 11.1.0 is installed"),
        ({"compute_capabilities": ("9.0",)}, "for compute capability 9.0, and this GPU has 8.0; build it again"),
        ({"product": "tensorrt-rtx"}, "tensorrt-rtx is asked for. TensorRT is not installed"),
        ({"product": "other"}, "'other' is no TensorRT"),
    ],
)
def test_an_engine_for_another_version_or_gpu_is_refused_before_it_is_read(
    api: Api, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    path = write_engine(tmp_path, **changes)
    with pytest.raises(UnsupportedError) as refused:
        TensorRTSession(path)
    assert reason in str(refused.value)
    assert api.read == []


def test_a_portable_engine_runs_from_8_0_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = read_engine(write_engine(tmp_path, compute_capabilities=(PORTABLE,), product="tensorrt-rtx"))
    tensorrt = tensorrt_api.TensorRT(None, "tensorrt-rtx", engine.version)
    engine.check_runs(tensorrt, (8, 6))
    with pytest.raises(UnsupportedError, match=r"this GPU has 7\.5"):
        engine.check_runs(tensorrt, (7, 5))


def test_an_engine_that_was_cut_off_or_has_no_metadata_is_refused(api: Api, tmp_path: Path) -> None:
    path = write_engine(tmp_path)
    path.write_bytes(PLAN[:-1])
    with pytest.raises(CheckpointError, match="has 8 bytes, was built with 9"):
        TensorRTSession(path)
    path.write_bytes(PLAN[::-1])
    read_engine(path).check_file()
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_engine(path).check_file(contents=True)
    metadata_path(path).write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="says nothing of an engine"):
        TensorRTSession(path)
    metadata_path(path).unlink()
    with pytest.raises(CheckpointError, match=r"has no vision\.engine\.json"):
        TensorRTSession(path)
    with pytest.raises(CheckpointError, match="no such engine"):
        find_engine(tmp_path / "elsewhere.engine")
    assert api.read == []


def test_the_engine_of_another_part_is_refused(api: Api, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a decoder engine"):
        TensorRTSession(write_engine(tmp_path, part=part("decoder")))


def test_what_tensorrt_itself_refuses_is_said(api: Api, tmp_path: Path) -> None:
    path = write_engine(tmp_path)
    api.refuses_plan = True
    with pytest.raises(UnsupportedError, match="does not load it: it gives no reason"):
        TensorRTSession(path)
    api.refuses_plan, api.no_memory = False, True
    with TensorRTSession(path) as session, pytest.raises(UnsupportedError, match="no memory to run it"):
        session.encode(tiles_of(1))
    api.no_memory, api.fails = False, True
    with TensorRTSession(path) as session, pytest.raises(UnsupportedError, match="does not run it: out of luck"):
        session.encode(tiles_of(1))
    api.fails, api.refuses_shapes = False, True
    with TensorRTSession(path) as session, pytest.raises(UnsupportedError, match="does not take 1 tiles"):
        session.encode(tiles_of(1))


def test_what_tensorrt_rtx_diagnoses_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    api = install(monkeypatch, Api("1.7.1", rtx=True), "tensorrt_rtx")
    api.diagnostics = 4 | 16
    path = write_engine(tmp_path, product="tensorrt-rtx", version="1.7.1")
    with pytest.raises(UnsupportedError, match="refuses it: old cuda driver, insufficient gpu memory"):
        TensorRTSession(path)
    assert api.read == []


def test_without_tensorrt_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, Api(), "something else")
    with pytest.raises(UnsupportedError, match="pip install tensorrt"):
        TensorRTSession(write_engine(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_session_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tensorrt_api, "import_module", lambda name: Api())
    with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU"):
        TensorRTSession(write_engine(tmp_path))


def test_tiles_of_another_size_are_refused(api: Api, tmp_path: Path) -> None:
    with TensorRTSession(write_engine(tmp_path)) as session:
        with pytest.raises(InvalidRequestError, match="uint8 tiles"):
            session.encode(torch.zeros(1, SIDE, SIDE + 1, 3, dtype=torch.uint8))
        with pytest.raises(InvalidRequestError, match="uint8 tiles"):
            session.encode(torch.zeros(1, SIDE, SIDE, 3))
