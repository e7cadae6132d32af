"""The manifest of an exported folder, under the name that exporters import; its reader also serves the sessions."""

from ..runtime.backends.manifest import (
    MANIFEST,
    PARTS,
    Manifest,
    Parameters,
    Part,
    TensorSpec,
    file_sha256,
    read_manifest,
)

__all__ = ["MANIFEST", "PARTS", "Manifest", "Parameters", "Part", "TensorSpec", "file_sha256", "read_manifest"]
