"""A TensorRT engine and the JSON beside it, which says what it is and where it can run.

An engine is only deserialised after that: TensorRT's own refusal of another version names neither version, and comes
when gigabytes have been read.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .manifest import Part, file_sha256, read_part
from .tensorrt_api import TensorRT

FORMAT = "vitrail-engine"
VERSION = 1
SUFFIX = ".engine"
PORTABLE = "portable"  # in place of compute capabilities: 8.0 and all above that TensorRT-RTX knows

Extent = tuple[int, int, int]  # of a named axis in a profile: least, best, most


@dataclass(frozen=True)
class Engine:
    """What the JSON says.

    compute_capabilities: of the GPUs it was built for, or `PORTABLE`. profiles: name -> axis -> extents.
    onnx: SHA-256 of the files it was built from. products: weights of matrix products in the network, elements by
    type; layers: the same in the engine, as the build log has them, empty where it has none; fallbacks: where they
    differ to the worse.
    """

    path: Path
    part: Part
    product: str
    version: str
    compute_capabilities: tuple[str, ...]
    precision: str
    profiles: Mapping[str, Mapping[str, Extent]]
    bytes: int
    sha256: str
    onnx: Mapping[str, str]
    products: Mapping[str, int] = field(default_factory=dict)
    layers: Mapping[str, int] = field(default_factory=dict)
    fallbacks: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        del values["path"]
        return {"format": FORMAT, "format_version": VERSION, "file": self.path.name, **values}

    def check_file(self, *, contents: bool = False) -> None:
        """Raise `CheckpointError` where the engine is missing, cut off, or, with `contents`, another than was built."""
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from None
        if size != self.bytes:
            raise CheckpointError(f"{self.path}: has {size} bytes, was built with {self.bytes}; build it again")
        if contents and file_sha256(self.path) != self.sha256:
            raise CheckpointError(f"{self.path}: is not the engine that was built (its SHA-256 differs)")

    def check_runs(self, tensorrt: TensorRT, capability: tuple[int, int]) -> None:
        """Raise `UnsupportedError` where this TensorRT, or a GPU of this compute capability, cannot run it."""
        again = f"build it again: vitrail export tensorrt ... --compute-capability {_dotted(capability)}"
        if (tensorrt.product, tensorrt.version) != (self.product, self.version):
            raise UnsupportedError(
                f"{self.path}: was built by {self.product} {self.version}, "
                f"and {tensorrt.product} {tensorrt.version} is installed; install that version or {again}"
            )
        fits = _dotted(capability) in self.compute_capabilities
        if not fits and not (PORTABLE in self.compute_capabilities and capability >= (8, 0)):
            raise UnsupportedError(
                f"{self.path}: was built for compute capability {', '.join(self.compute_capabilities)}, "
                f"and this GPU has {_dotted(capability)}; {again}"
            )


def metadata_path(engine: Path) -> Path:
    """The JSON beside an engine."""
    return engine.with_name(engine.name + ".json")


def find_engine(path: str | Path, part: str = "vision") -> Path:
    """The engine that a path means: itself, or that of `part` in a folder. Raises `CheckpointError`."""
    path = Path(path).expanduser()
    engine = path / f"{part}{SUFFIX}" if path.is_dir() else path
    if not engine.is_file():
        raise CheckpointError(f"{engine}: there is no such engine; `vitrail export tensorrt` builds one")
    return engine


def read_engine(path: Path) -> Engine:
    """What is written beside an engine. Raises `CheckpointError` where that is missing or not readable."""
    file = metadata_path(path)
    if not file.is_file():
        raise CheckpointError(f"{path}: has no {file.name} beside it, so that nothing says where it can run")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if (values.pop("format"), values.pop("format_version")) != (FORMAT, VERSION):
            raise ValueError("it is of another format")
        values.pop("file")
        values["part"] = read_part(values["part"])
        values["profiles"] = {
            name: {axis: (int(extents[0]), int(extents[1]), int(extents[2])) for axis, extents in profile.items()}
            for name, profile in values["profiles"].items()
        }
        for key in ("compute_capabilities", "fallbacks"):
            values[key] = tuple(values[key])
        return Engine(path=path, **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file}: says nothing of an engine ({type(error).__name__}: {error})") from None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
