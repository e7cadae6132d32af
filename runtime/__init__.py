"""The runtime: `runtime.generate(prompt, images=...)` and everything behind it.

Names are resolved on first use (PEP 562): importing `vitrail.runtime` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors, image, pdf, video
    from .api import Runtime, generate
    from .request import (
        GenerationConfig,
        GenerationOutput,
        SamplingParams,
        StreamDelta,
        Usage,
        VisionFeatures,
        VisualTokens,
    )
    from .weights import expected_tensors
    from .zero_shot import Classification

_SOURCES = {
    "Classification": "zero_shot",
    "Runtime": "api",
    "generate": "api",
    "expected_tensors": "weights",
    "GenerationConfig": "request",
    "GenerationOutput": "request",
    "SamplingParams": "request",
    "StreamDelta": "request",
    "Usage": "request",
    "VisionFeatures": "request",
    "VisualTokens": "request",
}
_MODULES = ("errors", "image", "pdf", "video")

__all__ = [
    "Classification",
    "GenerationConfig",
    "GenerationOutput",
    "Runtime",
    "SamplingParams",
    "StreamDelta",
    "Usage",
    "VisionFeatures",
    "VisualTokens",
    "errors",
    "expected_tensors",
    "generate",
    "image",
    "pdf",
    "video",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _SOURCES:
        return getattr(import_module(f".{_SOURCES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
