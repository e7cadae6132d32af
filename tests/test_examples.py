"""The runnable examples run, and say what they should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(("script", "expected"), [("ask.py", ["$25.90", "493", "yellow"]), ("messages.py", ["$25.90"])])
def test_an_example_answers_from_its_pictures(script: str, expected: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [answer for answer in expected if answer not in done.stdout] == []
