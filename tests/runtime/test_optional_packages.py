"""What is optional is optional: the base install answers on a CPU."""

import subprocess
import sys
from pathlib import Path

RECEIPT = Path(__file__).parent.parent.parent / "examples" / "receipt.png"
OPTIONAL = ("triton", "cuda", "bitsandbytes", "av", "pypdfium2", "transformers", "onnx", "onnxruntime", "vitrail._cpu")
CODE = """
import sys
for name in {missing}:
    sys.modules[name] = None
from vitrail import runtime
print(runtime.generate("What is the total?", {image!r}, runtime_options={{"device": "cpu"}}).text)
"""


def answer(missing: tuple[str, ...]) -> str:
    command = (sys.executable, "-P", "-c", CODE.format(missing=missing, image=str(RECEIPT)))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


def test_without_any_optional_package_the_answer_is_the_same() -> None:
    without = answer(OPTIONAL)
    assert without.strip()
    assert without == answer(())
