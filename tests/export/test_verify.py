"""`vitrail export verify`: it passes what is right, and fails for each thing that can be wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from vitrail.export.full_precision import in_float32
from vitrail.export.verification import REPORT, Comparison
from vitrail.runtime.backends.manifest import MANIFEST, file_sha256, read_manifest
from vitrail.runtime.weights import NANO

from ..runtime.command_line import vitrail
from .exported import check


@pytest.fixture
def copy(nano_onnx: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(nano_onnx, tmp_path / "copy"))


def sign_again(folder: Path) -> None:
    """Hashes of changed files, as an exporter with a fault would have written them."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {name: file_sha256(folder / name) for name in manifest["files"]}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_the_exported_bundled_model_passes_with_its_answers(copy: Path) -> None:
    ran = vitrail("export", "verify", copy, "--num-samples", 2, "--json")
    assert ran.status == 0, ran.err
    report = json.loads(ran.out)
    assert report == json.loads((copy / REPORT).read_text())
    assert report["answers"]["equal"] == report["answers"]["asked"] == 2
    assert set(report["parts"]["decoder"]["outputs"]) == {
        *("logits", "present keys", "present values", "logits of a decode step", "logits of a batch"),
    }
    for part in report["parts"].values():
        for output in part["outputs"].values():
            assert output["cosine"] > 0.999999
            assert output["max_error"] < 1e-3 * output["max_value"]


def test_int8_graphs_round_as_the_runtimes_modules_do_with_the_same_scales(nano_int8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano_int8, tmp_path / "copy"))
    report = check(folder, NANO)
    assert report.failed == []
    assert report.parts["vision"]["outputs"]["visual_tokens"]["cosine"] > 0.9999


def negate_a_weight(folder: Path) -> None:
    initializer = ir.load(folder / "decoder.onnx").graph.initializers["language_model.layers.1.mlp.down.weight"]
    stored = initializer.const_value
    assert isinstance(stored, ir.ExternalTensor)
    data = bytearray((folder / "decoder.data").read_bytes())
    begin, end = stored.offset, stored.offset + stored.length
    data[begin:end] = (-np.frombuffer(data[begin:end], np.float32)).tobytes()
    (folder / "decoder.data").write_bytes(data)


def drop_the_softmax(folder: Path) -> None:
    model = onnx.load(folder / "vision.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "Softmax":
            node.op_type = "Identity"
            node.ClearField("attribute")
            break
    onnx.save(model, folder / "vision.onnx")


def turn_a_position(folder: Path) -> None:
    """Wrong only where keys of an earlier call are read: what a prompt at once does not show."""
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    concat = next(node for node in model.graph.node if node.output[0] == "present.0.key")
    model.graph.initializer.append(numpy_helper.from_array(np.float32(-1), "wrong"))
    scaled = onnx.helper.make_node("Mul", [concat.input[0], "wrong"], ["scaled"])
    model.graph.node.insert(list(model.graph.node).index(concat), scaled)
    concat.input[0] = "scaled"
    onnx.save(model, folder / "decoder.onnx")


@pytest.mark.parametrize(
    ("damage", "complaints"),
    [
        (negate_a_weight, ["cosine of logits is", "cosine of logits of a batch is", "greedy answers differ"]),
        (drop_the_softmax, ["vision: the cosine of visual_tokens is"]),
        (turn_a_position, ["decoder: the cosine of logits of a decode step is"]),
    ],
)
def test_a_graph_that_computes_something_else_fails_its_gates(
    copy: Path, damage: Callable[[Path], None], complaints: list[str]
) -> None:
    damage(copy)
    sign_again(copy)
    ran = vitrail("export", "verify", copy, "--num-samples", 2, "--min-cosine", 0.9999)
    assert ran.status == 1
    assert "failed" in ran.out
    for complaint in complaints:
        assert complaint in ran.err


def test_a_checkpoint_with_other_weights_is_not_what_was_exported(copy: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(NANO, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["vision_model.encoder.layers.0.ls1"][0] *= 2
    save_file(weights, other / "model.safetensors")
    report = check(copy, other)
    assert any("vision: was exported from other weights" in reason for reason in report.failed)
    assert not any("decoder: was exported" in reason for reason in report.failed)


def test_a_part_that_lacks_tensors_of_the_checkpoint_fails(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["parts"]["decoder"]["parameters"]["count"] -= 1
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert any("decoder: has 30 tensors, the checkpoint 31 for it" in reason for reason in check(copy, NANO).failed)


def test_a_damaged_file_is_an_error_and_no_report_is_written(copy: Path) -> None:
    (copy / "vision.onnx").write_bytes(b"no graph")
    ran = vitrail("export", "verify", copy)
    assert ran.status == 2
    assert "vision.onnx: is not the file that was exported" in ran.err
    assert not (copy / REPORT).exists()


def test_a_graph_that_onnx_calls_invalid_is_refused(copy: Path) -> None:
    model = onnx.load(copy / "vision.onnx", load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, copy / "vision.onnx")
    sign_again(copy)
    ran = vitrail("export", "verify", copy)
    assert ran.status == 2
    assert "vision: is no valid ONNX graph" in ran.err


def test_an_output_of_numbers_that_are_not_finite_has_no_good_cosine() -> None:
    found = Comparison()
    found.add(np.array([1.0, np.nan]), torch.tensor([1.0, 2.0]))
    assert found.cosine == -1


def test_a_16_bit_graph_is_computed_in_fp32_with_the_weights_it_holds(tmp_path: Path) -> None:
    weight = np.linspace(-1, 1, 12, dtype=np.float16).reshape(4, 3)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Cast", ["x"], ["half"], to=onnx.TensorProto.FLOAT16),
            onnx.helper.make_node("MatMul", ["half", "w"], ["y"]),
        ],
        "graph",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, ["n", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "half.onnx")
    in_float32(tmp_path / "half.onnx", tmp_path / "full.onnx")
    from onnxruntime import InferenceSession

    x = np.full((1, 4), 1 / 3, np.float32)
    got = InferenceSession(tmp_path / "full.onnx").run(None, {"x": x})[0]
    np.testing.assert_allclose(got, x @ weight.astype(np.float32), rtol=1e-6, atol=1e-6)


def test_the_folder_that_was_verified_still_loads(copy: Path) -> None:
    check(copy, NANO)
    read_manifest(copy).check_files()
