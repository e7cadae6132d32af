"""Visual tokens of images seen before, and the keys that name an image: what the model sees of it, and nothing else.

An image's key is the SHA-256 of its tiles as the model gets them, their shape, the model's own name and revision and
the tenant's salt: equal keys are equal inputs, whatever file, array or upload they came from. Where the tiles come from
a file or an array, the SHA-256 of that and of how it is cut remembers the key, so that an image known by now is neither
decoded nor cut.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..image import ImageSource, local_file

MAX_NAMES = 65536  # images whose keys are remembered: 64 bytes each and little more
MAX_READ_BYTES = 64 * 2**20  # of a file; one that is larger is decoded before its key is known


@dataclass
class LoadedImage:
    """An image ready for the model: its tiles (n, tile, tile, 3) uint8, or else the visual tokens (tokens, hidden)
    that they became once. `key` is empty where nothing is cached.
    """

    key: bytes = b""
    tiles: npt.NDArray[np.uint8] | None = None
    tokens: Any = None
    decode_ms: float = 0.0
    tile_ms: float = 0.0


def read_once(source: ImageSource, *, name: str) -> ImageSource:
    """A file as its bytes, so that what is hashed is what is decoded; large files and other sources as they are."""
    if isinstance(source, (str, PathLike)) and not (isinstance(source, str) and source[:5].lower() == "data:"):
        path: Path = local_file(source, name)
        with suppress(OSError):  # whoever opens it will say so
            if path.stat().st_size <= MAX_READ_BYTES:
                return path.read_bytes()
    return source


def source_digest(source: ImageSource) -> bytes | None:
    """SHA-256 of a file's bytes, of a data URL or of an array, unlike one another even if the bytes are the same.

    None for what is told apart by its pixels only.
    """
    if isinstance(source, np.ndarray):
        kind = f"array {source.dtype} {source.shape}"
        return _digest(kind, np.ascontiguousarray(source).data if source.size else b"")
    if isinstance(source, bytes):
        return _digest("file", source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _digest("url", source.encode("utf-8", "surrogatepass"))
    return None


def tiles_key(tiles: npt.NDArray[np.uint8], domain: bytes) -> bytes:
    """The key of an image by its tiles; `domain` names the model, its revision and the tenant."""
    return _digest(f"tiles {tiles.shape}", domain, np.ascontiguousarray(tiles).data)


def domain_key(*names: str) -> bytes:
    """32 bytes for what keys hold for, e.g. a model, its revision and a tenant's salt."""
    return _digest("domain", *(_digest("name", name.encode("utf-8", "surrogatepass")) for name in names))


def _digest(kind: str, *contents: Any) -> bytes:
    digest = sha256(kind.encode() + b"\0")
    for content in contents:
        digest.update(content)
    return digest.digest()


class VisionCache:
    """Visual tokens by the key of their image, the least recently used ones forgotten beyond `max_bytes`. Thread-safe.

    Holds whatever is put in; its size is what the one who puts it says.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()
        self._names: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Any:
        """The visual tokens of an image, None if they are not there."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: bytes, tokens: Any, num_bytes: int) -> bool:
        """Keep the tokens of an image; returns whether they are kept now, which too large ones are not."""
        with self._lock:
            if num_bytes > self.max_bytes:
                return False
            if key not in self._entries:
                self._entries[key] = (tokens, num_bytes)
                self.num_bytes += num_bytes
            self._entries.move_to_end(key)
            while self.num_bytes > self.max_bytes:
                _, (_, freed) = self._entries.popitem(last=False)
                self.num_bytes -= freed
            return True

    def load(self, digest: bytes | None, domain: bytes, cut: Callable[[], LoadedImage]) -> LoadedImage:
        """An image by what is known of it, and by `cut`, which decodes and cuts it, where that is not enough.

        digest: of the source and of how it is cut, if there is one; domain: see `domain_key`.
        """
        name = None if digest is None else _digest("named", domain, digest)
        with self._lock:
            known = None if name is None else self._names.get(name)
        tokens = None if known is None else self.get(known)
        if known is not None and tokens is not None:
            self._count(hit=True)
            return LoadedImage(known, tokens=tokens)
        image = cut()
        assert image.tiles is not None
        image.key = tiles_key(image.tiles, domain)
        if name is not None:
            with self._lock:
                self._names[name] = image.key
                if len(self._names) > MAX_NAMES:
                    self._names.popitem(last=False)
        tokens = self.get(image.key)
        self._count(hit=tokens is not None)
        if tokens is not None:
            image.tiles, image.tokens = None, tokens
        return image

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._names.clear()
            self.num_bytes = 0

    def _count(self, *, hit: bool) -> None:
        with self._lock:
            self.hits += hit
            self.misses += not hit

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless the sizes add up and keep within the limit."""
        with self._lock:
            assert self.num_bytes == sum(size for _, size in self._entries.values()) <= max(self.max_bytes, 0)
