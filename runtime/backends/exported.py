"""A chat model whose vision half is a session: the engine runs it as it runs any other."""

from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..config import InternVLConfig
from ..errors import ConfigError, UnsupportedError
from ..models.internvl import InternVLModel
from .session import VisionSession


class ExportedVisionModel(InternVLModel):
    """The language half of a model with an exported vision half; the model's own leaves memory with it."""

    def __init__(self, model: InternVLModel, session: VisionSession) -> None:
        nn.Module.__init__(self)  # not InternVLModel's, which would make a vision half
        self.config = model.config
        self.language_model = model.language_model
        self.projector = nn.Identity()  # it is in the session
        self.session = session

    @property
    def vision_model(self) -> NoReturn:  # type: ignore[override]
        """What hidden states would come from."""
        raise UnsupportedError("an exported vision half has no hidden states; load with vision_backend='torch'")

    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """tiles: (n, tile_size, tile_size, 3) uint8. Returns (n, tokens_per_tile, llm hidden) visual tokens."""
        embedding = self.language_model.embedding
        return self.session.encode(tiles).to(embedding.device, embedding.dtype)


def open_session(backend: str, path: str | Path, device: torch.device) -> VisionSession:
    """A session of a backend by its name, "onnxruntime" or "tensorrt"."""
    if backend == "onnxruntime":
        from .onnx_session import OnnxSession

        return OnnxSession(path, device)
    from .tensorrt_session import TensorRTSession

    return TensorRTSession(path, device)


def check_session(session: VisionSession, config: InternVLConfig, name: str) -> None:
    """Raise `ConfigError` for a vision half of another model."""
    for what, there, here in (
        ("tiles of", session.tile_shape[0], config.tile_size),
        ("visual tokens a tile:", session.tokens_per_tile, config.tokens_per_tile),
        ("visual tokens of", session.hidden_size, config.llm.hidden_size),
    ):
        if there != here:
            raise ConfigError(f"vision_engine has {what} {there}, {name} {here}: it was exported from another model")
