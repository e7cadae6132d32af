"""What `vision_backend` and `vision_engine` mean: an exported vision half, opened, or made first."""

import hashlib
import os
import shutil
from pathlib import Path

import torch

from ..kernels.dispatch import cache_folder
from .backends.exported import check_session, open_session
from .backends.session import VisionSession
from .config import InternVLConfig, ModelConfig
from .errors import ConfigError, UnsupportedError
from .weights import find_shards

BACKENDS = ("torch", "onnxruntime", "tensorrt")


def check_backend(backend: str, engine: str | Path | None, vision_quantization: str | None) -> None:
    """Raise `ConfigError` for options that do not go together."""
    if backend not in BACKENDS:
        raise ConfigError(f"vision_backend {backend!r} is not known; known: {', '.join(BACKENDS)}")
    if backend == "torch" and engine is not None:
        raise ConfigError("vision_engine goes with vision_backend 'onnxruntime' or 'tensorrt'")
    if backend != "torch" and vision_quantization is not None:
        raise ConfigError(f"vision_quantization={vision_quantization!r}: an exported vision half has what it was given")
    if backend == "tensorrt" and engine is None:
        raise ConfigError("vision_backend 'tensorrt' needs vision_engine, a file that `vitrail export tensorrt` wrote")


def open_vision(
    backend: str,
    engine: str | Path | None,
    folder: Path,
    config: ModelConfig,
    device: torch.device,
    name: str,
    progress: bool | None,
) -> VisionSession | None:
    """The session that runs the vision half of a checkpoint folder; None where the model's own modules do."""
    if backend == "torch":
        return None
    if not isinstance(config, InternVLConfig):
        raise UnsupportedError(f"vision_backend={backend!r} is for chat models, which {name} is not")
    if engine is None:
        if device.type != "cpu":
            raise ConfigError(
                f"vision_backend={backend!r} on {device} needs vision_engine: "
                f"vitrail export onnx {name} FOLDER --part vision --dtype float16"
            )
        engine = exported_vision(folder, progress)
    session = open_session(backend, engine, device)
    check_session(session, config, name)
    return session


def exported_vision(folder: Path, progress: bool | None = None) -> Path:
    """The folder with the vision half of a checkpoint in fp32, exported when it is asked for the first time."""
    from ..export.onnx import Options, export_onnx

    files = [folder / "config.json", *find_shards(folder)]
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    target = cache_folder() / "onnx" / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        mine = target.with_name(f"{target.name}-{os.getpid()}")
        export_onnx(folder, mine, Options(part="vision", progress=progress))
        try:
            mine.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(mine, ignore_errors=True)
    return target
