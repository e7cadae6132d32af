"""Images and videos with their captions or labels: from a folder, a table or a webdataset, one at a time.

- A folder: every image and video below it, in the order of their paths. The first folder on the way to one is its
  label; the lines of a text file of the same name beside it are its captions.
- A table, `.csv` or `.tsv` with a header: `image` or `video` (paths from the table's own folder), `caption`, `label`.
  Rows of one image are one sample with several captions.
- A webdataset: one `.tar`, or a folder of them. Members that differ only behind the first dot of their names are one
  sample: an image or video, captions in `.txt`, a label in `.cls`.
"""

import csv
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .errors import InvalidRequestError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv"})
_TABLES = {".csv": ",", ".tsv": "\t"}
_MAX_FIELD = 2**20  # characters of one cell


@dataclass(frozen=True)
class Sample:
    """An image or a video, `source` being its file or its bytes, and what the data set says of it."""

    name: str
    source: Path | bytes
    is_video: bool = False
    label: str | None = None
    captions: tuple[str, ...] = ()


def read_samples(path: str | Path) -> Iterator[Sample]:
    """The samples of a data set, lazily. Raises `InvalidRequestError` where there is none, or it cannot be read."""
    path = Path(path)
    if path.is_dir():
        shards = sorted(path.rglob("*.tar"))
        return _of_shards(shards) if shards else _of_folder(path)
    if not path.is_file():
        raise InvalidRequestError(f"{path}: no such file or folder")
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        return _of_table(path, _TABLES[suffix])
    if suffix == ".tar":
        return _of_shards([path])
    raise InvalidRequestError(f"{path}: a folder, a .csv or .tsv table or a .tar is expected")


def media_files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """All files below a folder with one of the suffixes, in the order of their paths, which no file system decides."""
    found = [
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in suffixes
    ]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _of_folder(folder: Path) -> Iterator[Sample]:
    for path in media_files(folder, IMAGE_SUFFIXES | VIDEO_SUFFIXES):
        relative = path.relative_to(folder)
        beside = path.with_suffix(".txt")
        captions = _lines(_text(beside)) if beside.is_file() else ()
        label = relative.parts[0] if len(relative.parts) > 1 else None
        yield Sample(relative.as_posix(), path, _is_video(path.suffix), label, captions)


@dataclass
class _Row:
    """What the rows of a table say of one image."""

    is_video: bool
    label: str | None = None
    captions: list[str] = field(default_factory=list)


def _of_table(path: Path, delimiter: str) -> Iterator[Sample]:
    rows: dict[str, _Row] = {}
    csv.field_size_limit(_MAX_FIELD)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            columns = reader.fieldnames or ()
            kind = next((column for column in ("image", "video") if column in columns), None)
            if kind is None:
                raise InvalidRequestError(f"{path}: its header has no column named image or video")
            for number, cells in enumerate(reader, start=2):
                name = cells[kind]
                if not name:
                    raise InvalidRequestError(f"{path}: row {number} names no {kind}")
                row = rows.setdefault(name, _Row(kind == "video"))
                row.captions += filter(None, [(cells.get("caption") or "").strip()])
                row.label = cells.get("label") or row.label
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(f"{path}: not readable as a table ({error})") from None
    return iter(
        [Sample(name, path.parent / name, row.is_video, row.label, tuple(row.captions)) for name, row in rows.items()]
    )


def _of_shards(shards: list[Path]) -> Iterator[Sample]:
    for shard in shards:
        try:
            with tarfile.open(shard) as tar:
                key, parts = "", dict[str, bytes]()
                for member in tar:
                    if not member.isfile():
                        continue
                    path = PurePosixPath(member.name)
                    stem, _, suffix = path.name.partition(".")
                    if str(path.with_name(stem)) != key:
                        yield from _of_parts(key, parts)
                        key, parts = str(path.with_name(stem)), {}
                    suffix = "." + suffix.lower()
                    file = tar.extractfile(member)
                    if file is not None and suffix in _MEMBERS:
                        parts[suffix] = file.read()
                yield from _of_parts(key, parts)
        except (OSError, tarfile.TarError) as error:
            raise InvalidRequestError(f"{shard}: not readable as a tar file ({error})") from None


_MEMBERS = IMAGE_SUFFIXES | VIDEO_SUFFIXES | {".txt", ".cls"}


def _of_parts(key: str, parts: dict[str, bytes]) -> Iterator[Sample]:
    """The sample of one key, if there is an image or a video among its members."""
    for suffix, data in parts.items():
        if suffix not in (".txt", ".cls"):
            label = parts[".cls"].decode(errors="replace").strip() if ".cls" in parts else None
            captions = _lines(parts.get(".txt", b"").decode(errors="replace"))
            yield Sample(key + suffix, data, _is_video(suffix), label, captions)
            return


def _is_video(suffix: str) -> bool:
    return suffix.lower() in VIDEO_SUFFIXES


def _lines(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, text.splitlines())))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise InvalidRequestError(f"{path}: not readable as text") from None
