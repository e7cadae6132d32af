"""The example that needs neither torch nor vitrail answers the demo question from the exported bundled model."""

import subprocess
import sys
from pathlib import Path

from .exported import EXAMPLES

CODE = """
import runpy, sys
for name in ("torch", "vitrail", "transformers", "onnx"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_onnxruntime_alone_reads_the_total_of_the_receipt(nano_onnx: Path) -> None:
    script, picture = EXAMPLES / "onnx_only.py", EXAMPLES / "receipt.png"
    command = [sys.executable, "-P", "-c", CODE, script, nano_onnx, picture, "What is the total?"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "$25.90"
