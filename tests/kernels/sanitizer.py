"""NVIDIA's compute-sanitizer over code that launches kernels, where the tool is installed."""

import shutil
import subprocess
import sys
import textwrap

import pytest


def assert_clean(tool: str, code: str) -> None:
    """Run `code`, which finds torch imported, in a process under a tool: memcheck, racecheck or synccheck."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    whole = "import torch\n" + textwrap.dedent(code)
    command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", sys.executable, "-P", "-c", whole]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
