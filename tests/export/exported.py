"""Exports that tests share, and tiny checkpoints to export."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from vitrail.export.onnx import Options, export_onnx
from vitrail.export.verification import Cases, Report, verify
from vitrail.runtime.config import InternVLConfig, load_any_config, load_config
from vitrail.runtime.export_check import calibration_prompts
from vitrail.runtime.models.internvl import InternVLModel
from vitrail.runtime.quantization.config import QuantizationConfig
from vitrail.runtime.quantization.model import quantize_model
from vitrail.runtime.weights import NANO, checkpoint_tensors, load_model

from ..random_checkpoints import chat_config, random_weights, write_checkpoint
from ..runtime.quantization.test_foreign_checkpoints import FORMATS, quantised

QUIET = Options(progress=False)
# One block of each half: tracing takes a second a layer.
TINY_VISION, TINY_LLM = {"num_hidden_layers": 1}, {"num_hidden_layers": 1, "vocab_size": 640}
TINY = chat_config(vision=TINY_VISION, llm=TINY_LLM, dynamic_image_size=True, max_dynamic_patch=2)
EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def export_once(factory: pytest.TempPathFactory, kind: str) -> Path:
    """nano in "float32" or a quantisation, written by the first process that needs it."""
    folder = factory.getbasetemp()
    shared = folder.parent if folder.name.startswith("popen-") else folder  # of all pytest-xdist workers
    target = shared / f"nano-{kind}"
    with FileLock(shared / f"nano-{kind}.lock"):
        if not target.is_dir():
            quantization = None if kind == "float32" else kind
            options = Options(quantization=quantization, progress=False)
            export_onnx("nano", target, options, lambda: calibration_prompts("nano", None, 3, 2))
    return target


def write_tiny(folder: Path, config: Mapping[str, Any]) -> Path:
    """A random checkpoint of a config, with nano's tokenizer."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        shutil.copy(NANO / name, folder)
    write_checkpoint(folder, dict(config), random_weights(config))
    return folder


def write_int4(folder: Path) -> InternVLModel:
    """A tiny model, its language half in asymmetric int4 as `vitrail quantize` writes it; and the model."""
    write_tiny(folder, TINY)
    config = QuantizationConfig(llm="int4", group_size=16, symmetric=False)
    model = load_model(folder, load_config(folder), dtype=torch.float32, device=torch.device("cpu"), progress=False)
    quantize_model(model, llm="int4", group_size=16, symmetric=False, packed=False)
    save_file(dict(checkpoint_tensors(model)), folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": config.to_json()}))
    return model


def write_quantised(folder: Path, name: str) -> str:
    """A tiny Qwen2 model, its language half in a format of `FORMATS`; returns the method of its layers."""
    section, pack, method = FORMATS[name]
    base = chat_config("Qwen2ForCausalLM", TINY_VISION, TINY_LLM)
    write_tiny(folder, base)
    config, tensors, _ = quantised(base, section, pack)
    write_checkpoint(folder, config, tensors)
    return method


def check(folder: Path, source: Path, samples: int = 2) -> Report:
    """Verify a chat model's export on shipped pictures, without answers."""
    assert isinstance(load_any_config(source), InternVLConfig)
    return verify(folder, source, Cases(calibration_prompts(source, None, samples, 2, answers=False)))


def initializers(file: Path) -> dict[str, npt.NDArray[np.generic]]:
    """Name -> value of a graph's weights and constants, 4-bit integers as bytes of their own."""
    found = ir.load(file).graph.initializers
    return {name: value.const_value.numpy() for name, value in found.items() if value.const_value is not None}
