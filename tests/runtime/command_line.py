"""The `vitrail` command run in this process: what the installed script does, without its two seconds of start-up."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest

from vitrail.runtime.cli import main


@dataclass
class Ran:
    """How a command ended and what it wrote."""

    status: int
    out: str
    err: str


def vitrail(*arguments: object, stdin: bytes = b"") -> Ran:
    """Run `vitrail ARGUMENTS` with `stdin` as a pipe."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["vitrail", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            main()
    assert isinstance(ended.value.code, int)
    return Ran(ended.value.code, out.getvalue(), err.getvalue())
