"""The exported vision half in onnxruntime, on a CPU or on a CUDA device."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, UnsupportedError
from .manifest import read_manifest
from .session import VisionSession

MAX_TILES = 16  # of one call: enough to fill the matrix products, few enough to bound the scores in memory
_ELEMENT_TYPES = {torch.float32: 1, torch.uint8: 2, torch.float16: 10, torch.bfloat16: 16}  # ONNX's numbers


def onnxruntime() -> Any:
    """The package. Raises `UnsupportedError` where it is not installed."""
    try:
        found = find_spec("onnxruntime")
    except ValueError:  # made unimportable
        found = None
    if found is None:
        raise UnsupportedError("running an ONNX file needs the package onnxruntime: pip install vitrail[export]")
    return import_module("onnxruntime")


class OnnxSession(VisionSession):
    """`vision.onnx` of an exported folder. Inputs and outputs are memory of torch tensors: nothing is copied.

    Raises `CheckpointError` for a file that is no vision half or not what was exported, `UnsupportedError` where
    onnxruntime is missing, was built without the device, or cannot run the file.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        ort = onnxruntime()
        manifest = read_manifest(path)
        part = manifest.part("vision")
        super().__init__(part)
        manifest.check_files(part.file)
        self.device = torch.device(device)
        self.max_tiles = MAX_TILES
        provider = "CUDAExecutionProvider" if self.device.type == "cuda" else "CPUExecutionProvider"
        if provider not in ort.get_available_providers():
            raise UnsupportedError(f"{device}: this onnxruntime has no {provider}; pip install onnxruntime-gpu")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        index = {"device_id": str(self.device.index or 0)} if self.device.type == "cuda" else {}
        try:
            self._session: Any = ort.InferenceSession(
                str(manifest.path("vision")), options, providers=[provider], provider_options=[index]
            )
        except Exception as error:  # onnxruntime has a class of its own for each reason, none of them public
            reason = " ".join(str(error).split())
            kind = UnsupportedError if "NotImplemented" in type(error).__name__ else CheckpointError
            raise kind(f"{manifest.path('vision')}: onnxruntime does not load it ({reason[:300]})") from None

    def _run(self, tiles: Tensor) -> Tensor:
        tokens = torch.empty((len(tiles), self.tokens_per_tile, self.hidden_size), dtype=self.dtype, device=self.device)
        binding = self._session.io_binding()
        for bind, name, tensor in (
            (binding.bind_input, self.part.inputs[0].name, tiles),
            (binding.bind_output, self.part.outputs[0].name, tokens),
        ):
            place = (self.device.type, self.device.index or 0)
            bind(name, *place, _ELEMENT_TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr())
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # onnxruntime runs on a stream of its own
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return tokens

    def close(self) -> None:
        """Let go of the file and its memory."""
        super().close()
        self._session = None
