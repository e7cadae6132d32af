"""A vision half as a TensorRT engine: a CUDA graph for each number of tiles, in memory that torch sees."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, UnsupportedError
from .cuda_stream import CudaStream
from .engine_file import Engine, find_engine, read_engine
from .session import VisionSession
from .tensorrt_api import TensorRT, find_tensorrt, make_logger


class TensorRTSession(VisionSession):
    """An engine that `vitrail export tensorrt` built, on the GPU it was built for.

    path: the engine, or a folder with `vision.engine`. device: a CUDA device, the current one if None.
    Raises, before the engine is read: `CheckpointError` where files are missing or cut off, `UnsupportedError` where
    TensorRT is not installed, is of another version, or where the GPU is another.
    """

    def __init__(self, path: str | Path, device: str | torch.device | None = None) -> None:
        self.engine = _vision_engine(find_engine(path))
        super().__init__(self.engine.part)
        tensorrt = find_tensorrt(self.engine.product)
        self.device = _cuda_device(device)
        self.engine.check_file()
        self.engine.check_runs(tensorrt, torch.cuda.get_device_capability(self.device))
        self.max_tiles = max(profile["tiles"][2] for profile in self.engine.profiles.values())
        self._complaints: list[str] = []
        self._stream: CudaStream | None = CudaStream(self.device)
        try:
            self._load(tensorrt, self._stream)
        except BaseException:
            self.close()
            raise

    def _load(self, tensorrt: TensorRT, stream: CudaStream) -> None:
        api = tensorrt.api
        # Owners are kept in attributes: TensorRT's objects hold no references to what they were made by.
        self._logger = make_logger(api, self._note)
        self._runtime = api.Runtime(self._logger)
        plan = self.engine.path.read_bytes()
        if tensorrt.portable:
            _check_validity(api, self._runtime, plan, self.engine)
        self._plan = self._runtime.deserialize_cuda_engine(plan)
        if self._plan is None:
            raise UnsupportedError(f"{self.engine.path}: TensorRT does not load it: {self._reason()}")
        self._contexts: dict[int, Any] = {}
        self._replays: dict[int, Callable[[], None]] = {}
        self._tiles = stream.empty((self.max_tiles, *self.tile_shape), torch.uint8)
        self._tokens = stream.empty((self.max_tiles, self.tokens_per_tile, self.hidden_size), self.dtype)
        # TensorRT-RTX specialises kernels to shapes while it runs, and knows itself when a graph is worth capturing.
        self._captures = not tensorrt.portable
        if self._captures:
            size = self._plan.device_memory_size_v2
            self._scratch = stream.empty((size,), torch.uint8)
            self._strategy = api.ExecutionContextAllocationStrategy.USER_MANAGED
        else:
            config = self._plan.create_runtime_config()
            config.cuda_graph_strategy = api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._contexts = dict.fromkeys(range(1, self.max_tiles + 1), self._prepared(config))

    def _prepared(self, how: Any) -> Any:
        """An execution context that reads and writes the session's memory."""
        context = self._plan.create_execution_context(how)
        if context is None:
            raise UnsupportedError(f"{self.engine.path}: there is no memory to run it: {self._reason()}")
        context.set_tensor_address(self.part.inputs[0].name, self._tiles.data_ptr())
        context.set_tensor_address(self.part.outputs[0].name, self._tokens.data_ptr())
        return context

    def _context(self, count: int) -> Any:
        """The context of a number of tiles: a graph holds on to the state of the one it was captured from.

        They share the memory between layers, for only one runs at a time.
        """
        if count not in self._contexts:
            context = self._prepared(self._strategy)
            context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
            self._contexts[count] = context
        return self._contexts[count]

    def _run(self, tiles: Tensor) -> Tensor:
        stream = self._stream
        assert stream is not None  # `encode` refuses before
        count = tiles.shape[0]
        with stream.in_order():
            self._tiles[:count].copy_(tiles)
            self._replay(stream, count)
        return self._tokens[:count].clone()

    def _replay(self, stream: CudaStream, count: int) -> None:
        """Run the engine on the first tiles of its memory: as a graph, from the second time of that number on."""
        replay = self._replays.get(count)
        if replay is not None:
            replay()
            return
        context = self._context(count)
        if not context.set_input_shape(self.part.inputs[0].name, (count, *self.tile_shape)):
            raise UnsupportedError(f"{self.engine.path}: does not take {count} tiles: {self._reason()}")

        def enqueue(handle: int) -> None:
            if not context.execute_async_v3(handle):
                raise UnsupportedError(f"{self.engine.path}: TensorRT does not run it: {self._reason()}")

        enqueue(stream.handle)  # what a new shape asks for beside the kernels is done now, and not captured
        if self._captures:
            self._replays[count] = stream.record(enqueue)

    def inspect(self) -> dict[str, Any]:
        """What the engine says of its layers: kernels, types, shapes, as TensorRT's inspector gives it."""
        import json

        inspector = self._plan.create_engine_inspector()
        inspector.execution_context = self._context(1)
        api = find_tensorrt(self.engine.product).api
        found: dict[str, Any] = json.loads(inspector.get_engine_information(api.LayerInformationFormat.JSON))
        return found

    def close(self) -> None:
        """Give the engine's memory back."""
        super().close()
        stream, self._stream = self._stream, None
        if stream is None:
            return
        stream.sync()
        # Users before what they use; those that were not made yet are not there.
        for name in ("_replays", "_contexts", "_plan", "_runtime", "_tiles", "_tokens", "_scratch"):
            self.__dict__.pop(name, None)
        stream.close()

    def _note(self, severity: str, message: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self._complaints.append(message)

    def _reason(self) -> str:
        return self._complaints[-1] if self._complaints else "it gives no reason"


def _vision_engine(path: Path) -> Engine:
    engine = read_engine(path)
    if engine.part.name != "vision":
        raise CheckpointError(f"{path}: is a {engine.part.name} engine, and a vision half is wanted")
    return engine


def _cuda_device(device: str | torch.device | None) -> torch.device:
    if not torch.cuda.is_available():
        raise UnsupportedError("a TensorRT engine needs an NVIDIA GPU, and this machine shows none")
    chosen = torch.device("cuda" if device is None else device)
    if chosen.type != "cuda":
        raise UnsupportedError(f"a TensorRT engine runs on a CUDA device, not on {chosen}")
    return torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)


def _check_validity(api: Any, runtime: Any, plan: bytes, engine: Engine) -> None:
    """TensorRT-RTX looks at the header itself: drivers and memory are beyond what was written down."""
    validity, diagnostics = runtime.get_engine_validity(plan)
    if validity == api.EngineValidity.INVALID:
        kinds = api.EngineInvalidityDiagnostics.__members__.items()
        reasons = [name.lower().replace("_", " ") for name, kind in kinds if int(kind) & int(diagnostics)]
        raise UnsupportedError(f"{engine.path}: TensorRT refuses it: {', '.join(reasons) or 'no reason given'}")
