"""An .npz of embeddings that is written piece by piece and survives being killed.

Beside `FILE.npz` stands a folder `FILE.npz.partial` while it is made: what is made, with which settings
(`settings.json`), the rows so far (`rows.f32`), and a line for every batch that is complete (`progress.jsonl`). Rows
are on the disk before their line is; what stands behind the last whole line is thrown away, so that a later run goes
on from there and comes to the same bytes. Only at the end does the file take its place, in one step.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidRequestError

_COPIED_AT_ONCE = 2**24  # bytes
_NAMES_AT_ONCE = 2**14

Rows = npt.NDArray[np.float32]


class EmbeddingFile:
    """Rows of `dim` numbers for some of `names`, and for the others why there are none.

    settings: whatever decides the rows; a file begun with others is not gone on with. `done`: how many of the names
    are dealt with.
    """

    def __init__(self, path: Path, names: Sequence[str], settings: Mapping[str, Any], dim: int) -> None:
        self.path = path
        self.names = names
        self.settings = dict(settings)
        self.dim = dim
        self.done = 0
        self.failed: dict[int, str] = {}
        self._rows = 0
        self._folder = path.with_name(path.name + ".partial")
        if self._folder.is_dir():
            self._check_same()
        else:
            self._begin()
        self._recover()

    def append(self, outcomes: Sequence[Rows | str]) -> None:
        """What came of the next names, in order: a row each, or why there is none."""
        rows = [outcome for outcome in outcomes if not isinstance(outcome, str)]
        failed = {self.done + offset: outcome for offset, outcome in enumerate(outcomes) if isinstance(outcome, str)}
        if rows:
            _append(self._folder / "rows.f32", np.stack(rows).astype("<f4").tobytes())
        self.done += len(outcomes)
        self._rows += len(rows)
        self.failed |= failed
        line = {"done": self.done, "rows": self._rows, "failed": failed}
        _append(self._folder / "progress.jsonl", json.dumps(line).encode() + b"\n")

    def finish(self) -> None:
        """Put the whole file in its place. Every name must be dealt with."""
        if self.done != len(self.names):
            raise ValueError(f"{self.path}: {self.done} of {len(self.names)} are done")
        made = self._folder / "made.npz"
        good = [index for index in range(len(self.names)) if index not in self.failed]
        with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
            with (self._folder / "rows.f32").open("rb") as rows:
                pieces = iter(lambda: rows.read(_COPIED_AT_ONCE), b"")
                _write_array(archive, "embeddings", "<f4", (len(good), self.dim), pieces)
            _write_strings(archive, "names", [self.names[index] for index in good])
            _write_strings(archive, "failed", [self.names[index] for index in self.failed])
            _write_strings(archive, "errors", list(self.failed.values()))
            _write_strings(archive, "settings", [json.dumps(self.settings, sort_keys=True)])
        with made.open("rb+") as file:
            os.fsync(file.fileno())
        made.replace(self.path)
        shutil.rmtree(self._folder)

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256("\0".join(self.names).encode("utf-8", "surrogatepass")).hexdigest()
        return {**self.settings, "images": len(self.names), "names": digest}

    def _begin(self) -> None:
        """Lay out the folder under another name first: half a folder is never gone on with."""
        fresh = self._folder.with_name(f"{self._folder.name}.{os.getpid()}")
        try:
            fresh.mkdir(parents=True)
            (fresh / "settings.json").write_text(json.dumps(self._identity()), encoding="utf-8")
            (fresh / "rows.f32").touch()
            (fresh / "progress.jsonl").touch()
            fresh.rename(self._folder)
        except OSError as error:
            raise InvalidRequestError(f"{self._folder}: cannot be made ({error.strerror})") from None

    def _check_same(self) -> None:
        try:
            begun = json.loads((self._folder / "settings.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InvalidRequestError(f"{self._folder}: is no run to go on with; remove it") from None
        wanted = self._identity()
        if begun != wanted:
            odd = next((key for key in wanted if begun.get(key) != wanted[key]), "settings")
            raise InvalidRequestError(
                f"{self._folder}: was begun with {odd}={begun.get(odd)!r}, not {wanted.get(odd)!r}; "
                "remove it to begin anew, or give the same settings to go on"
            )

    def _recover(self) -> None:
        """Read what is complete, and cut off what is not."""
        row_bytes = 4 * self.dim
        rows, progress = self._folder / "rows.f32", self._folder / "progress.jsonl"
        written, whole = rows.stat().st_size, 0
        with progress.open("rb") as lines:
            for line in lines:
                entry = _parsed(line)
                if entry is None or entry["rows"] * row_bytes > written:
                    break
                self.done, self._rows = entry["done"], entry["rows"]
                self.failed |= {int(index): reason for index, reason in entry["failed"].items()}
                whole += len(line)
        os.truncate(progress, whole)
        os.truncate(rows, self._rows * row_bytes)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A whole line of progress, None for one that was cut short."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return entry


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _write_array(
    archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[bytes]
) -> None:
    """An array as `numpy.savez` writes it, from pieces that need not be in memory together."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(file, header)
        for piece in pieces:
            file.write(piece)


def _write_strings(archive: zipfile.ZipFile, name: str, values: Sequence[str]) -> None:
    dtype = f"<U{max(map(len, values), default=1)}"

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(values), _NAMES_AT_ONCE):
            yield np.array(values[start : start + _NAMES_AT_ONCE], dtype).tobytes()

    _write_array(archive, name, dtype, (len(values),), pieces())
