"""TensorRT's Python API, from whichever package has it: classic `tensorrt`, or TensorRT-RTX, which shares it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..errors import UnsupportedError

# Modules of each product, the one that users import first. Classic TensorRT is made for servers, hence the order.
MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_INSTALL = (
    "TensorRT is not installed: `pip install tensorrt` on the GPU machine, "
    "or `pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings` for TensorRT-RTX"
)


@dataclass(frozen=True)
class TensorRT:
    """An installed TensorRT. api: the module; product: a key of `MODULES`."""

    api: Any
    product: str
    version: str

    @property
    def portable(self) -> bool:
        """Whether engines are built for named compute capabilities, with no GPU, instead of for the GPU at hand.

        By the product: the classic API has these names in some versions too, and does not follow them.
        """
        return self.product == "tensorrt-rtx"


def find_tensorrt(product: str | None = None) -> TensorRT:
    """The installed TensorRT: that product, or the first there is. Raises `UnsupportedError` where there is none."""
    if product is not None and product not in MODULES:
        raise UnsupportedError(f"{product!r} is no TensorRT; known are {' and '.join(MODULES)}")
    for name in MODULES if product is None else (product,):
        for module in MODULES[name]:
            try:
                api = import_module(module)
            except (ImportError, OSError):  # the second where the bindings are there and the libraries are not
                continue
            return TensorRT(api, name, str(api.__version__))
    raise UnsupportedError(_INSTALL if product is None else f"{product} is asked for. {_INSTALL}")


def make_logger(api: Any, write: Callable[[str, str], None]) -> Any:
    """A logger of the API's kind that hands (severity, message) to `write`."""

    class Logger(api.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            write(severity.name, message)

    return Logger()
