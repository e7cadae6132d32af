"""The folder that a Ray of our own keeps its files in: deleted when it ends, or at a later start if it was killed."""

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

# Not in TMPDIR, which may be long: the names of sockets may have 107 characters.
PLACE = Path("/tmp")
_PREFIX = "vitrail-"
_LOCK = "owner.lock"


@contextmanager
def ray_folder(place: Path = PLACE) -> Iterator[str]:
    """A new folder in `place`, there as long as the block runs. Deletes those whose owners have been killed."""
    _sweep(place)
    with ExitStack() as undo:
        folder = tempfile.mkdtemp(prefix=_PREFIX, dir=place)
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        # The kernel frees the lock when this process ends, however it does. Nobody sees the file before it is locked.
        unlocked = os.path.join(folder, f".{_LOCK}")
        lock = os.open(unlocked, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        undo.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(unlocked, os.path.join(folder, _LOCK))
        yield folder


def _sweep(place: Path) -> None:
    """Delete folders of this user whose lock is there and free."""
    for folder in place.glob(f"{_PREFIX}*"):
        with suppress(OSError), ExitStack() as undo:
            found = os.lstat(folder)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
                continue  # a link, somebody else's, or one that others may write to
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            undo.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
