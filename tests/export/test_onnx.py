"""`export_onnx`: graphs of every kind of model compute what the runtime does, and the manifest says how to run them."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from vitrail.export.generation import OnnxChat
from vitrail.export.onnx import export_onnx
from vitrail.export.trace import MODULE
from vitrail.export.verification import Cases, verify
from vitrail.runtime import Runtime
from vitrail.runtime.backends.manifest import MANIFEST, read_manifest
from vitrail.runtime.config import load_config, parse_any_config
from vitrail.runtime.errors import CheckpointError
from vitrail.runtime.export_check import calibration_prompts
from vitrail.runtime.quantization.methods import quantize_weight
from vitrail.runtime.quantization.model import linear_layers
from vitrail.runtime.texts import EncodedText
from vitrail.runtime.weights import NANO, load_model

from ..random_checkpoints import INTERNVIT_300M, chat_config, contrastive_config, llava_config, random_tiles
from ..runtime.command_line import vitrail
from .exported import QUIET, TINY, check, initializers, write_int4, write_quantised, write_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def nano():
    return load_model(NANO, load_config(NANO), dtype=torch.float32, device=CPU, progress=False)


def chat(folder: Path) -> OnnxChat:
    manifest = read_manifest(folder)
    return OnnxChat(manifest, {name: manifest.path(name) for name in manifest.parts})


# The graphs of the bundled model.


@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_a_graph_has_the_inputs_and_outputs_that_the_manifest_says(nano_onnx: Path, part: str) -> None:
    entry = read_manifest(nano_onnx).part(part)
    onnx.checker.check_model(str(nano_onnx / entry.file), full_check=True)
    session = onnxruntime.InferenceSession(nano_onnx / entry.file)
    for said, found in ((entry.inputs, session.get_inputs()), (entry.outputs, session.get_outputs())):
        assert [(spec.name, list(spec.shape)) for spec in said] == [(value.name, value.shape) for value in found]
        types = {"uint8": "uint8", "int64": "int64", "float32": "float"}
        assert [f"tensor({types[spec.dtype]})" for spec in said] == [value.type for value in found]


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_tiles_becomes_the_runtimes_visual_tokens(nano_onnx: Path, nano: Any, count: int) -> None:
    tiles = random_tiles(count, 224)
    got = torch.from_numpy(chat(nano_onnx).encode(tiles.numpy()))
    torch.testing.assert_close(got, nano.encode_tiles(tiles).flatten(0, 1), rtol=1e-4, atol=2e-5)


def test_a_prompt_in_chunks_ends_in_the_logits_of_the_prompt_at_once(nano_onnx: Path) -> None:
    graphs = chat(nano_onnx)
    prompt = read_manifest(nano_onnx).prompt
    ids = np.array([[*prompt["before"], *[prompt["image_token_id"]] * 64, *prompt["after"], *prompt["end"]]])
    visual = graphs.encode(random_tiles(1, 224).numpy())
    whole, present = graphs.step(ids, visual, graphs.no_past(1))
    past, used = graphs.no_past(1), 0
    for first in range(0, ids.shape[1], 17):  # which cuts the image's places
        chunk = ids[:, first : first + 17]
        places = int((chunk == prompt["image_token_id"]).sum())
        logits, past = graphs.step(chunk, visual[used : used + places], past)
        used += places
    np.testing.assert_allclose(logits, whole, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(past[-1], present[-1], rtol=1e-3, atol=1e-4)


def test_the_graph_file_holds_no_weights_and_nothing_of_the_machine_it_was_made_on(nano_onnx: Path) -> None:
    for part in read_manifest(nano_onnx).parts.values():
        content = (nano_onnx / part.file).read_bytes()
        assert len(content) < 100_000 < (nano_onnx / part.data).stat().st_size
        assert str(Path.home()).encode() not in content
        assert b".py" not in content
        graph = ir.load(nano_onnx / part.file).graph
        assert all(set(node.metadata_props) <= {MODULE} for node in graph)
        named = [node.metadata_props[MODULE] for node in graph if MODULE in node.metadata_props]
        assert {"vision": "vision_model.encoder.layers.0.attn", "decoder": "language_model.layers.0.attention"}[
            part.name
        ] in named


def test_products_read_their_weights_as_they_are_stored(nano_onnx: Path) -> None:
    """No transposition of a weight is left to the runtime that loads the graph."""
    for part in read_manifest(nano_onnx).parts.values():
        for node in ir.load(nano_onnx / part.file).graph:
            if node.op_type == "Transpose":
                assert not (node.inputs[0].is_initializer() and len(node.inputs[0].shape) == 2)


# The manifest.


def test_the_manifest_is_enough_to_make_the_prompt_that_the_runtime_makes(nano_onnx: Path) -> None:
    prompt = read_manifest(nano_onnx).prompt
    with Runtime.from_pretrained("nano", device="cpu") as runtime:
        output = runtime.generate("What is the total?", random_tiles(1, 224)[0].numpy(), max_new_tokens=1)
        words = runtime.tokenizer.encode(prompt["question"].format(question="What is the total?"), add_bos=False)
        assert set(prompt["stop_token_ids"]) == runtime.engine.stop_token_ids
    places = [prompt["image_token_id"]] * (prompt["tokens_per_tile"] * output.num_tiles[0])
    made = [*prompt["before"], *places, *prompt["after"], *words, *prompt["end"]]
    assert output.prompt_token_ids == made


def test_the_manifest_survives_being_read_and_written(nano_onnx: Path) -> None:
    manifest = read_manifest(nano_onnx)
    assert json.loads(json.dumps(manifest.to_json())) == json.loads((nano_onnx / MANIFEST).read_text())
    assert manifest == read_manifest(nano_onnx / "vision.onnx")
    manifest.check_files()
    assert set(manifest.files) == {file.name for file in nano_onnx.iterdir()} - {MANIFEST, "verification.json"}


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "vision.data").write_bytes(b""), "vision.data: is not the file that was exported"),
        (lambda folder: (folder / "decoder.onnx").unlink(), "decoder.onnx: is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "is no exported folder"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "not readable as a manifest"),
        (lambda folder: replace(folder, '"version": 1', '"version": 99'), "version 99, known is"),
        (lambda folder: replace(folder, '"vision.onnx"', '"../vision.onnx"'), "is no file name"),
    ],
)
def test_a_folder_that_is_not_what_was_exported_is_refused(
    nano_onnx: Path, tmp_path: Path, damage: Any, complaint: str
) -> None:
    folder = Path(shutil.copytree(nano_onnx, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(CheckpointError, match=complaint):
        read_manifest(folder).check_files()


def replace(folder: Path, old: str, new: str) -> None:
    text = (folder / MANIFEST).read_text()
    assert old in text
    (folder / MANIFEST).write_text(text.replace(old, new))


# Other models. Positions of other tile sizes, biases, tied embeddings, QK-norm per head, other rotary frequencies.


OTHERS = {
    "Qwen3 with InternViT-300M": chat_config(
        "Qwen3ForCausalLM",
        INTERNVIT_300M | {"num_hidden_layers": 1},
        {"vocab_size": 640, "tie_word_embeddings": True, "num_hidden_layers": 1},
        force_image_size=112,
        dynamic_image_size=True,
        max_dynamic_patch=2,
        ps_version="v1",
    ),
    "InternVL-Chat 1.0": llava_config(vocab_size=640),
    "InternVL-Chat 1.0 with QLLaMA": llava_config(qllama=True, vocab_size=640),
    "Qwen2": chat_config("Qwen2ForCausalLM", llm={"vocab_size": 640}),
    "Phi-3": chat_config("Phi3ForCausalLM", llm={"vocab_size": 640}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_chat_model_computes_what_the_runtime_does(name: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", OTHERS[name])
    export_onnx(source, tmp_path / "out", QUIET)
    report = check(tmp_path / "out", source)
    assert report.failed == []
    for part in report.parts.values():
        assert min(output["cosine"] for output in part["outputs"].values()) > 0.999999


@pytest.mark.slow
def test_both_towers_of_a_contrastive_model_compute_what_the_runtime_does(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1}, {"num_hidden_layers": 2, "vocab_size": 640}
    source = write_tiny(tmp_path / "source", contrastive_config(*sizes))
    manifest = export_onnx(source, tmp_path / "out", QUIET)
    assert list(manifest.parts) == ["contrastive", "contrastive_g", "text"]
    texts = [EncodedText([1, 5, 9, 2], [0, 1, 2, 3], 3, False), EncodedText([1, 600, 2], [0, 2, 3], 2, False)]
    report = verify(tmp_path / "out", source, Cases(images=random_tiles(2, 84), texts=texts))
    assert report.failed == []
    for part in report.parts.values():
        assert part["outputs"]["embeddings"]["cosine"] > 0.999999
    assert manifest.model["logit_scale"] == pytest.approx(float(logit_scale(source)), rel=1e-6)


def logit_scale(source: Path) -> torch.Tensor:
    config = parse_any_config(json.loads((source / "config.json").read_text()))
    return load_model(source, config, dtype=torch.float32, device=CPU, progress=False).logit_scale.exp()


# Types.


@pytest.mark.slow(smoke=False)
def test_a_16_bit_graph_has_weights_and_products_of_that_type_alone(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", TINY)
    with torch.inference_mode():  # which must make no difference
        manifest = export_onnx(source, tmp_path / "out", dataclasses.replace(QUIET, dtype="bfloat16"))
    for part in manifest.parts.values():
        graph = ir.load(manifest.folder / part.file).graph
        products = [node for node in graph if node.op_type in ("MatMul", "Gemm", "Softmax", "Gelu")]
        assert {value.dtype for node in products for value in node.inputs} == {ir.DataType.BFLOAT16}
        large = [value for value in graph.initializers.values() if value.const_value.size > 64]
        assert {value.dtype for value in large} == {ir.DataType.BFLOAT16}
    assert manifest.part("vision").outputs[0].dtype == "bfloat16"
    assert check(manifest.folder, source).failed == []


# Quantised.


def test_int8_weights_are_the_codes_and_scales_of_the_runtime(nano_int8: Path, nano: Any) -> None:
    quantised = [path for path in linear_layers(nano) if ".layers." in path]
    for part, prefix in (("vision", "vision_model."), ("decoder", "language_model.")):
        values = initializers(nano_int8 / f"{part}.onnx")
        mine = [path for path in quantised if path.startswith(prefix)]
        for path in mine:
            weight = quantize_weight(nano.get_parameter(f"{path}.weight"), "int8")
            codes, scales, _ = weight.canonical()
            np.testing.assert_array_equal(values[f"{path}.weight.codes"], codes.t().numpy())
            np.testing.assert_array_equal(values[f"{path}.weight.scales"], scales.numpy())
            assert values[f"{path}.weight.input_scale"] > 0
        nodes = Counter(node.op_type for node in ir.load(nano_int8 / f"{part}.onnx").graph)
        assert (nodes["QuantizeLinear"], nodes["DequantizeLinear"]) == (len(mine), 2 * len(mine))
        assert read_manifest(nano_int8).part(part).quantization == "int8"


def test_int8_activations_are_scaled_by_the_largest_input_of_the_calibration_prompts(nano_int8: Path) -> None:
    with Runtime.from_pretrained("nano", dtype="float32", device="cpu") as runtime:
        largest = 0.0

        def note(_: Any, inputs: Any) -> None:
            nonlocal largest
            largest = max(largest, float(inputs[0].abs().max()))

        layer = runtime.model.vision_model.encoder.layers[1].mlp.fc2
        layer.register_forward_pre_hook(note)
        for prompt in calibration_prompts("nano", None, 3, 2):
            runtime.model.encode_tiles(prompt.tiles)
    scale = initializers(nano_int8 / "vision.onnx")["vision_model.encoder.layers.1.mlp.fc2.weight.input_scale"]
    assert float(scale) == pytest.approx(largest / 127, rel=1e-4)


def test_a_checkpoint_in_int4_is_exported_with_its_own_codes(tmp_path: Path) -> None:
    """What `vitrail quantize` wrote stays to the bit, and the graph multiplies by what it stands for."""
    source = tmp_path / "source"
    model = write_int4(source)
    manifest = export_onnx(source, tmp_path / "out", dataclasses.replace(QUIET, part="decoder"))
    assert manifest.part("decoder").quantization == "int4"
    values = initializers(tmp_path / "out" / "decoder.onnx")
    path = "language_model.layers.0.attention.qkv"
    codes, scales, zeros = model.get_submodule(path).weight.canonical()
    nibbles = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)
    np.testing.assert_array_equal(values[f"{path}.weight.codes"].astype(np.uint8), nibbles.t().numpy())
    np.testing.assert_array_equal(values[f"{path}.weight.zeros"].astype(np.uint8), zeros.t().numpy())
    np.testing.assert_array_equal(values[f"{path}.weight.scales"], scales.t().numpy())
    report = check(tmp_path / "out", source)
    assert report.failed == []
    assert report.parts["decoder"]["outputs"]["logits"]["cosine"] > 0.99999


@pytest.mark.slow(smoke=False)
@pytest.mark.parametrize(
    "name",
    [
        "gptq act-order",  # the most at once: columns in an order of their own, and zero points
        *("awq", "gptq v2", "bitsandbytes int8", "w8a8", "w8a16", "w4a16", "w4a16 asymmetric"),
    ],
)
def test_a_checkpoint_that_another_program_quantised_is_exported_with_its_codes(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    method = write_quantised(source, name)
    part = dataclasses.replace(QUIET, part="decoder")
    manifest = export_onnx(source, tmp_path / "out", part, lambda: calibration_prompts(source, None, 2, 2))
    assert manifest.part("decoder").quantization == method
    report = check(tmp_path / "out", source)
    assert report.failed == []
    assert report.parts["decoder"]["outputs"]["logits"]["cosine"] > 0.99999


def test_int4_of_a_plain_checkpoint_is_symmetric_in_signed_codes(tmp_path: Path) -> None:
    arguments = ("--part", "decoder", "--quantization", "int4", "--no-progress", "--json")
    source = write_tiny(tmp_path / "source", TINY)
    ran = vitrail("export", "onnx", source, tmp_path / "out", "--group-size", 16, *arguments)
    assert ran.status == 0, ran.err
    manifest = read_manifest(tmp_path / "out")
    assert json.loads(ran.out)["parts"]["decoder"]["parameters"] == vars(manifest.part("decoder").parameters)
    graph = ir.load(tmp_path / "out" / "decoder.onnx").graph
    codes = graph.initializers["language_model.layers.0.mlp.down.weight.codes"]
    assert codes.dtype == ir.DataType.INT4
    blocks = {node.attributes["block_size"].as_int() for node in graph if node.op_type == "DequantizeLinear"}
    assert blocks == {manifest.part("decoder").group_size} == {16}
    assert check(tmp_path / "out", source).failed == []
