"""What the tests ask of processes that are not their own children."""

from pathlib import Path


def alive(pid: int) -> bool:
    """Whether a process is there and has not ended; one that nobody has asked how it ended still has a number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
