"""What every loaded model has, whatever it can do: a name, a device, a life."""

from typing import Any, Self

import torch

from .errors import InvalidRequestError
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
