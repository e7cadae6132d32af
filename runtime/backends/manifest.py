"""`manifest.json`, what an exported folder says of itself: enough for another program to run the parts."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

FORMAT = "vitrail-onnx"
VERSION = 1
MANIFEST = "manifest.json"
PARTS = ("vision", "decoder", "contrastive", "contrastive_g", "text")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: dtype as torch calls it ("uint8", "float32"), a number or a name for each axis of its shape.

    Axes of one name are of one size throughout a call.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Parameters:
    """The checkpoint's tensors that a part holds: how many, and SHA-256 over their sorted names and contents."""

    count: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """One ONNX graph.

    file: its name in the folder; data: that of its weights. dtype: of weights and activations. quantization: method of
    the layers that have one, None where none has. limits: largest extents of named axes. group_size: inputs that share
    a scale, of int4.
    """

    name: str
    file: str
    data: str
    dtype: str
    quantization: str | None
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    limits: Mapping[str, int]
    parameters: Parameters
    group_size: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    checkpoint: what was exported, as the caller named it. model: the kind, "chat" or "contrastive", and sizes.
    preprocessing: how an image becomes tiles. prompt: template, special tokens and ids. cache: shape of keys and
    values. files: SHA-256 of each file. versions: of what wrote it.
    """

    folder: Path
    checkpoint: str
    model: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    prompt: Mapping[str, Any]
    cache: Mapping[str, Any]
    parts: Mapping[str, Part]
    files: Mapping[str, str]
    versions: Mapping[str, str] = field(default_factory=dict)

    def part(self, name: str) -> Part:
        """The part called `name`. Raises `CheckpointError` where the folder has none."""
        if name not in self.parts:
            raise CheckpointError(f"{self.folder}: holds no {name} part, only {', '.join(self.parts)}")
        return self.parts[name]

    def path(self, part: str) -> Path:
        """The ONNX file of a part."""
        return self.folder / self.part(part).file

    def check_files(self, *names: str) -> None:
        """Raise `CheckpointError` for a file, of `names` or of all, that is missing or not the one that was written."""
        for name in names or self.files:
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: is missing")
            if file_sha256(path) != self.files[name]:
                raise CheckpointError(f"{path}: is not the file that was exported (its SHA-256 differs)")

    def to_json(self) -> dict[str, Any]:
        """What `manifest.json` says."""
        values = asdict(self)
        del values["folder"]
        return {"format": FORMAT, "version": VERSION, **values}


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of an exported folder, or of the folder that a file of it lies in. Raises `CheckpointError`."""
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    file = folder / MANIFEST
    if not path.exists() or not file.is_file():
        raise CheckpointError(f"{path}: is no exported folder; it has no {MANIFEST}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT or values["version"] != VERSION:
            raise CheckpointError(
                f"{file}: is {values['format']} version {values['version']}, known is {FORMAT} version {VERSION}"
            )
        parts = {name: read_part(part) for name, part in values["parts"].items()}
        rest = {key: values[key] for key in ("checkpoint", "model", "preprocessing", "prompt", "cache", "files")}
        return Manifest(folder=folder, parts=parts, versions=values["versions"], **rest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: is not readable as a manifest ({type(error).__name__}: {error})") from None


def read_part(values: Mapping[str, Any]) -> Part:
    """A part as `asdict` wrote it. Raises for entries that are missing, or no file names."""
    specs = {
        key: tuple(TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in values[key])
        for key in ("inputs", "outputs")
    }
    part = Part(**{**values, **specs, "parameters": Parameters(**values["parameters"])})
    for name in (part.file, part.data):  # files lie beside the manifest: a path would let it read others
        if Path(name).name != name:
            raise ValueError(f"{name!r} is no file name")
    return part


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
