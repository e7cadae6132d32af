"""A folder that is there when it is whole: written under another name, with nothing in it that would load before."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtime.errors import InvalidRequestError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to that becomes `path` when the block is done, and is removed when that fails.

    Raises `InvalidRequestError` where it cannot be written, with the reason, or where `path` exists.
    """
    if path.exists():
        raise InvalidRequestError(f"{path}: exists already")
    partial = path.with_name(path.name + ".partial")
    if not path.parent.is_dir():
        raise InvalidRequestError(f"{path}: its folder does not exist")
    if partial.exists():
        raise InvalidRequestError(f"{partial}: is left of an export that was killed, or still runs; remove it")
    try:
        partial.mkdir()
    except OSError as error:
        raise InvalidRequestError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        yield partial
        partial.rename(path)
    except OSError as error:
        raise InvalidRequestError(f"{error.filename or path}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_space(folder: Path, needed: int) -> None:
    """Raise `InvalidRequestError` where the disk has less than `needed` bytes free: better before than after hours."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InvalidRequestError(
            f"{folder}: {needed / 2**30:.1f} GiB of weights are to be written, {free / 2**30:.1f} GiB are free"
        )
