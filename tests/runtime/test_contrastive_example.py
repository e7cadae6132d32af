"""The example of the contrastive calls runs, with a model that it makes itself."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "contrastive.py"


def test_the_example_of_contrastive_models_runs(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, EXAMPLE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "embeddings (3, 32) (4, 32)"
    assert [line.split()[0] for line in lines[1:]] == [
        *["score"] * 3,
        "classes",
        "first",
        "match",
        "caption",
        "features",
    ]
    assert lines[-1] == "features {-1: (3, 8, 8, 64), -2: (3, 8, 8, 64)}"
