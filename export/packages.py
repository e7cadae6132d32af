"""Packages that only exporting needs."""

from importlib.util import find_spec

from ..runtime.errors import UnsupportedError


def require(*names: str) -> None:
    """Raise `UnsupportedError` for the first package that is not installed, saying which extra brings it."""
    for name in names:
        try:
            found = find_spec(name) is not None
        except ValueError:  # one that was made unimportable
            found = False
        if not found:
            raise UnsupportedError(f"exporting needs the package {name}: pip install vitrail[export]")
