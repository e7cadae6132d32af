"""What the tests ask of processes."""

import os
from pathlib import Path


def alive(pid: int) -> bool:
    """Whether a process is there and has not ended; one that nobody has asked how it ended still has a number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int | str = "self") -> set[int]:
    """Processes of a process's own, whichever thread started them, that have not ended."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {pid for task in tasks for pid in map(int, (task / "children").read_text().split()) if alive(pid)}


def open_files() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))
