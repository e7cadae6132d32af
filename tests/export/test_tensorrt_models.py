"""Engines of real graphs for compute capability 8.0: of nano, of a slice of InternVL-Chat-V1.5 at its full width."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vitrail.export.onnx import Options, export_onnx
from vitrail.export.tensorrt import EngineOptions, build_engine, log_path
from vitrail.export.tensorrt_profiles import Sizes
from vitrail.runtime.backends.engine_file import PORTABLE, Engine, read_engine
from vitrail.runtime.backends.manifest import read_manifest
from vitrail.runtime.backends.tensorrt_session import TensorRTSession
from vitrail.runtime.config import load_config
from vitrail.runtime.export_check import calibration_prompts
from vitrail.runtime.weights import NANO, expected_tensors, load_model

from ..official_configs import INTERNVL_CHAT_V1_5
from ..random_checkpoints import random_tiles
from ..runtime.command_line import vitrail

trt = pytest.importorskip("tensorrt_rtx_bindings")
MALFORMED = int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)


def build(folder: Path, part: str, engine: Path, **sizes: int) -> Engine:
    return build_engine(read_manifest(folder), part, engine, EngineOptions(sizes=Sizes(**sizes), progress=False))


def check_sound(engine: Engine, weights: int) -> str:
    """What holds of every engine, of so many bytes of weights. Returns the build log."""
    engine.check_file(contents=True)
    assert engine.compute_capabilities == ("8.0",)
    assert weights < engine.bytes < 1.2 * weights + 12e6, "the rest is code, for nano several times its weights"
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    with engine.path.open("rb") as file:
        assert not int(runtime.get_engine_validity(file.read(runtime.engine_header_size))[1]) & MALFORMED
    assert engine.fallbacks == ()
    return log_path(engine.path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def nano_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts of nano in bf16, and their engines, by the command from the checkpoint."""
    folder = tmp_path_factory.mktemp("nano") / "bf16"
    ran = vitrail(
        *("export", "tensorrt", "nano", folder, "--compute-capability", "8.0"),
        *("--precision", "bf16", "--max-tiles", 2, "--json"),
    )
    assert (ran.status, ran.err) == (0, "")
    reports = json.loads(ran.out)["engines"]
    assert [report["file"] for report in reports] == ["vision.engine", "decoder.engine"]
    assert {report["precision"] for report in reports} == {"bf16"}
    return folder


def test_nano_is_built_in_bf16(nano_bf16: Path) -> None:
    vision, decoder = (read_engine(nano_bf16 / f"{part}.engine") for part in ("vision", "decoder"))
    log = check_sound(vision, (nano_bf16 / "vision.data").stat().st_size)
    assert set(vision.products) == set(vision.layers) == {"BF16"}
    assert vision.profiles == {"tiles": {"tiles": (1, 2, 2)}}
    depth = load_config(NANO).vision_depth
    assert len(re.findall(r"^Name: _gemm_mha", log, re.MULTILINE)) == depth, "attention is one kernel in each block"
    check_sound(decoder, (nano_bf16 / "decoder.data").stat().st_size)
    assert set(decoder.products) == set(decoder.layers) == {"BF16"}
    assert list(decoder.profiles) == ["prefill", "decode"]


@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_nano_is_built_in_int8(nano_int8: Path, tmp_path: Path, part: str) -> None:
    sizes = {"max_tiles": 1} if part == "vision" else {}
    engine = build(nano_int8, part, tmp_path / "nano.engine", **sizes)
    check_sound(engine, (nano_int8 / f"{part}.data").stat().st_size)
    assert engine.precision == "int8"
    # Embedding of patches, projector and head stay as they are, as in the runtime.
    assert engine.products["INT8"] > engine.products["FLOAT"]
    assert engine.layers["INT8"] >= engine.products["INT8"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--compute-capability", "9.0"), "builds for"),
        (("--compute-capability", "8.0", "--precision", "fp8"), "only those from 8.9 on"),
        (("--compute-capability", "8.0", "--max-tiles", "41"), "takes from 1 to 40"),
        (("--compute-capability", "8.0", "--max-length", "999999"), "the decoder part takes from 2 to"),
        (("--compute-capability", "8.0", "--part", "text"), "holds no text part"),
        (("--compute-capability", "8.0", "--precision", "int4"), "--quantization int4"),
    ],
)
def test_a_mistake_ends_the_command_with_status_2(
    nano_onnx: Path, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    ran = vitrail("export", "tensorrt", nano_onnx, tmp_path / "engines", *arguments)
    assert (ran.status, ran.out) == (2, "")
    assert reason in ran.err
    assert ran.err.count("\n") == 1
    assert not list(tmp_path.rglob("*.engine"))


# InternVL-Chat-V1.5, two blocks and two layers.


def write_slice(folder: Path) -> Path:
    """A checkpoint of random weights in bf16, with nano's tokenizer."""
    config: dict[str, Any] = copy.deepcopy(INTERNVL_CHAT_V1_5)
    config["vision_config"]["num_hidden_layers"] = 2
    config["llm_config"] |= {"num_hidden_layers": 2, "vocab_size": 4096}
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        shutil.copy(NANO / name, folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 20, generator=generator).bfloat16()  # drawing a billion numbers would take minutes
    weights = {}
    for index, (name, shape) in enumerate(expected_tensors(config).items()):
        size = torch.Size(shape).numel()
        # Each begins elsewhere: TensorRT keeps one copy of weights that are equal.
        values = noise.roll(997 * index).repeat(-(-size // len(noise)))[:size].view(shape)
        norm = len(shape) == 1 and name.endswith("weight")
        weights[name] = torch.ones_like(values) if norm else values * (1 / 64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def v1_5_slice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the slice, 2.4 GB."""
    return write_slice(tmp_path_factory.mktemp("slice") / "checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "quantization"), [("vision", "int8"), ("vision", None), ("decoder", None), ("decoder", "int4")]
)
def test_a_slice_of_v1_5_is_built(v1_5_slice: Path, tmp_path: Path, part: str, quantization: str | None) -> None:
    options = Options(part=part, dtype="bfloat16", quantization=quantization, progress=False)
    folder, engine_file = tmp_path / "onnx", tmp_path / f"{part}.engine"
    export_onnx(v1_5_slice, folder, options, lambda: calibration_prompts(v1_5_slice, None, 1, 1))
    engine = build(folder, part, engine_file)
    check_sound(engine, (folder / f"{part}.data").stat().st_size)
    assert engine.precision == (quantization or "bf16")
    assert "FLOAT" not in {*engine.products, *engine.layers}
    shutil.rmtree(tmp_path)  # gigabytes that pytest would keep


# On a GPU.


@pytest.fixture(scope="module")
def engine_here(nano_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vision half of nano for the GPU at hand, all numbers of tiles."""
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    known = hasattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}")
    target = tmp_path_factory.mktemp("engine") / "vision.engine"
    options = EngineOptions(compute_capabilities=(capability if known else PORTABLE,), product="tensorrt-rtx")
    build_engine(read_manifest(nano_bf16), "vision", target, options)
    return target


@pytest.mark.gpu
def test_an_engine_computes_what_the_runtime_computes(engine_here: Path) -> None:
    model = load_model(NANO, load_config(NANO), dtype=torch.float32, device=torch.device("cuda"), progress=False)
    with TensorRTSession(engine_here) as session:
        for count in (1, 7, 40, 1, 7, 43):  # the second time of a number is a graph
            tiles = random_tiles(count, session.tile_shape[0], seed=count).cuda()
            tokens = session.encode(tiles)
            assert (tokens.dtype, tokens.device.type) == (torch.bfloat16, "cuda")
            with torch.inference_mode():
                expected = model.encode_tiles(tiles)
            assert F.cosine_similarity(tokens.float(), expected, dim=-1).min() >= 0.999


@pytest.mark.gpu
def test_the_engine_itself_says_that_its_products_are_in_bf16(engine_here: Path) -> None:
    with TensorRTSession(engine_here) as session:
        layers = session.inspect()["Layers"]
    products = [layer for layer in layers if isinstance(layer, dict) and "gemm" in str(layer.get("LayerType"))]
    assert products
    assert all("BFloat16" in json.dumps(layer) for layer in products)
