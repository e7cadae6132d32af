"""What every loaded model has, whatever it can do: a name, a device, a life."""

from typing import Any, Self

import torch

from .config import ContrastiveConfig, InternVLConfig, ModelConfig
from .errors import InvalidRequestError, UnsupportedError
from .image import ImageLimits
from .tokenizer import Tokenizer
from .weights import Model


class LoadedModel:
    """A model in memory. Use it as a context manager, or `close` it.

    `tokenizer` is None for a vision encoder on its own; `load_ms` is how long loading took.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer | None, *, name: str, limits: ImageLimits, load_ms: float
    ) -> None:
        self._model = model
        self.tokenizer = tokenizer
        self.name = name
        self.limits = limits
        self.load_ms = load_ms
        self._closed = False

    @property
    def model(self) -> Any:
        """The module itself: an `InternVLModel` where it chats, a `ContrastiveModel` or a `VisionTower`."""
        self._check_open()
        return self._model

    @property
    def device(self) -> torch.device:
        return next(self._model.parameters()).device

    def close(self) -> None:
        """Let go of the model. Later calls raise `InvalidRequestError`."""
        if not self._closed:
            self._closed = True
            del self._model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidRequestError("this Runtime is closed")


def require_chat(config: ModelConfig, name: str) -> None:
    """Raise `UnsupportedError` unless the model generates. To be asked before weights are read, where it can."""
    if not isinstance(config, InternVLConfig):
        what = "vision encoder on its own, which has features"
        if isinstance(config, ContrastiveConfig):
            what = "contrastive model (InternVL-C/G), which has embed, score, classify, match, caption and features"
        raise UnsupportedError(f"{name} is a {what}; this needs a chat model")


def require_contrastive(config: ModelConfig, name: str, call: str) -> None:
    """Raise `UnsupportedError` unless the model embeds. To be asked before weights are read, where it can."""
    if not isinstance(config, ContrastiveConfig):
        what = "chat model" if isinstance(config, InternVLConfig) else "vision encoder on its own"
        raise UnsupportedError(f"{call}: {name} is a {what}; only contrastive models (InternVL-C/G) have this")
