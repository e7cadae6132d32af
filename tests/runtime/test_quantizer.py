"""`quantize_checkpoint`: what it writes, what it reports, and what happens when it cannot."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vitrail.kernels.quantize import QuantizedRows
from vitrail.runtime import block_quantizer, checkpoint_folder, part_loader, quantizer
from vitrail.runtime.comparison import compare
from vitrail.runtime.config import load_config
from vitrail.runtime.errors import CheckpointError, ConfigError, InvalidRequestError, UnsupportedError, VitrailError
from vitrail.runtime.quantization.config import QuantizationConfig
from vitrail.runtime.quantization.int8 import Int8Weight
from vitrail.runtime.quantization.methods import quantize_weight
from vitrail.runtime.quantization.weight import QuantizedWeight
from vitrail.runtime.quantizer import Options, quantize_checkpoint
from vitrail.runtime.weights import load_model

from ..official_configs import INTERNVIT_300M as PUBLISHED_300M
from ..random_checkpoints import INTERNVIT_300M, random_weights, write_checkpoint
from .tiny_model import picture, write_tiny_model

INT8 = QuantizationConfig("int8", "int8", group_size=16)
INT4 = QuantizationConfig("int4", "int8-weight", group_size=16)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index, size in enumerate(((90, 60), (200, 90), (84, 84))):
        Image.fromarray(picture(*size, index)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def source(sentencepiece_folder):
    return write_tiny_model(sentencepiece_folder())


@pytest.fixture(scope="module")
def options(images):
    return Options(calibration=images, dtype="float32", device="cpu", answers=False, max_tiles=2)


@pytest.fixture(scope="module")
def calibrated(source, options, tmp_path_factory):
    """A checkpoint whose vision half is int8, with scales known beforehand for every fc2."""
    target = tmp_path_factory.mktemp("calibrated") / "q"
    quantize_checkpoint(source, target, QuantizationConfig(None, "int8"), options)
    return target


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def loads(folder: Path) -> bool:
    try:
        load_model(folder, load_config(folder), dtype=torch.float32, device=CPU)
    except VitrailError:
        return False
    return True


# --- what comes out ---


@pytest.mark.parametrize(
    ("architecture", "vision", "config"),
    [
        ("InternLM2ForCausalLM", {}, INT8),
        ("InternLM2ForCausalLM", {}, INT4),
        ("Qwen2ForCausalLM", INTERNVIT_300M, INT8),
        ("Phi3ForCausalLM", {}, INT4),
        ("Qwen3ForCausalLM", {}, QuantizationConfig("fp8", "fp8")),
        ("LlamaForCausalLM", {}, QuantizationConfig("int4", None, group_size=16, symmetric=False)),
    ],
)
def test_the_result_loads_and_is_as_far_from_the_source_as_reported(
    sentencepiece_folder, qwen2_folder, tmp_path, images, architecture, vision, config
) -> None:
    folder = qwen2_folder() if architecture.startswith("Qwen") else sentencepiece_folder()
    source = write_tiny_model(folder, architecture, vision=vision)
    target = tmp_path / "quantised"
    report = quantize_checkpoint(
        source, target, config, Options(calibration=images, dtype="float32", device="cpu", max_tiles=2)
    )
    # Random weights are the worst that rounding meets; a permuted or unscaled weight is off by all of them.
    for kl in (report["logit_kl"], report["answers"]["logit_kl"]):  # before it was written, and loaded again
        assert kl < (0.003 if config.llm == "int8" else 0.1)
    assert report["visual_cosine"]["min"] > 0.995
    assert report["answers"]["visual_cosine_mean"] == pytest.approx(report["visual_cosine"]["mean"], abs=1e-4)
    assert len(report["answers"]["answers"]) == 3
    per_block = {block["part"]: block["layers"] for block in report["blocks"]}
    assert len(per_block) == (3 if config.vision is None else 6)
    for layers in per_block.values():
        for layer in layers:
            assert 0 < layer["error"] <= layer["plain_error"] * (2 if layer["static"] else 1.05)
    static = [f"{part}.{row['layer']}" for part, layers in per_block.items() for row in layers if row["static"]]
    by_codes = config.vision in ("int8", "fp8")
    assert static == [f"vision_model.encoder.layers.{index}.mlp.fc2" for index in range(3 if by_codes else 0)]
    written = json.loads((target / "config.json").read_text())
    assert QuantizationConfig.from_json(written["quantization_config"]) == config
    assert written["quantization_config"]["static_inputs"] == static
    assert (target / "report.md").read_text().count(" static |") == len(static)
    assert (target / "report.md").read_text().count(" | int") + (target / "report.md").read_text().count(
        " | fp8"
    ) == sum(map(len, per_block.values()))
    assert not (tmp_path / "quantised.partial").exists()
    assert {file.name for file in target.iterdir()} >= {"report.json", "tokenizer_config.json"}


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_calibrated_scales_of_fc2_are_those_that_gelu_s_codes_have(
    source, tmp_path, options, method, monkeypatch
) -> None:
    monkeypatch.setattr(Int8Weight, "rows_dtype", torch.int8)  # as on a GPU
    quantize_checkpoint(source, tmp_path / "q", QuantizationConfig(None, method), options)
    found = load_model(tmp_path / "q", load_config(source), dtype=torch.float32, device=CPU)
    true = load_model(source, load_config(source), dtype=torch.float32, device=CPU)
    tensors = load_file(tmp_path / "q/model-00002-of-00010.safetensors")
    fc2 = "vision_model.encoder.layers.0.mlp.fc2.weight"
    scales = tensors[f"{fc2}.input_scales"]
    # A column stands multiplied by its scale, each output rounded on its own.
    weight = tensors[f"{fc2}.codes"].float() * tensors[f"{fc2}.scales"][:, None] / scales
    torch.testing.assert_close(weight, true.get_parameter(fc2), rtol=0.07, atol=0.02)
    handed = found.vision_model.encoder.layers[0].mlp.fc1(torch.randn(9, 48))
    assert isinstance(handed, QuantizedRows)
    assert (handed.codes.dtype, handed.scales) == (torch.int8 if method == "int8" else torch.float8_e4m3fn, None)
    tiles = torch.from_numpy(picture(84, 84, 2))[None]
    both = [model.encode_tiles(tiles).flatten(0, 1) for model in (found, true)]
    assert torch.cosine_similarity(*both, dim=-1).min() > (0.9995 if method == "int8" else 0.995)


def test_scales_known_beforehand_are_for_layers_that_they_suit(source, tmp_path, options, monkeypatch) -> None:
    keep = QuantizationConfig(None, "int8", overrides={r"layers\.1\.mlp\.fc1": None, r"layers\.2\.mlp\.fc1": "fp8"})
    report = quantize_checkpoint(source, tmp_path / "a", keep, options)
    layers = [
        (block["part"][-1], row["layer"]) for block in report["blocks"] for row in block["layers"] if row["static"]
    ]
    assert layers == [("0", "mlp.fc2")]  # where fc1 makes codes of the same kind
    monkeypatch.setattr(block_quantizer, "STATIC_MAY_COST", 0.5)
    report = quantize_checkpoint(source, tmp_path / "b", QuantizationConfig(None, "int8"), options)
    assert not any(row["static"] for block in report["blocks"] for row in block["layers"])
    assert loads(tmp_path / "a") and loads(tmp_path / "b")


@pytest.mark.parametrize(
    ("static", "change", "complaint"),
    [
        ([0, 1, 2], None, r"1 tensors missing: vision_model\.encoder\.layers\.1\.mlp\.fc2\.weight\.input_scales"),
        ([0, 2], torch.ones_like, r"1 tensors unexpected: .*layers\.1\.mlp\.fc2\.weight\.input_scales"),
        ([0, 1, 2], torch.zeros_like, r"layers\.1\.mlp\.fc2\.weight\.input_scales: holds scales that are not positive"),
        ([0, 1, 2], lambda scales: scales * torch.inf, "holds scales that are not finite"),
        ([0, 1, 2], lambda scales: scales[1:], r"has shape \(79,\), the config says \(80,\)"),
        ("all", torch.clone, "`static_inputs` must be a list of strings, found 'all'"),
    ],
    ids=["missing", "not listed", "zero", "infinite", "short", "no list"],
)
def test_scales_that_contradict_the_config_are_refused(calibrated, tmp_path, static, change, complaint) -> None:
    target = tmp_path / "q"
    shutil.copytree(calibrated, target)
    config = json.loads((target / "config.json").read_text())
    names = [f"vision_model.encoder.layers.{index}.mlp.fc2" for index in static] if static != "all" else static
    config["quantization_config"]["static_inputs"] = names
    (target / "config.json").write_text(json.dumps(config))
    shard, name = (
        target / "model-00003-of-00010.safetensors",
        "vision_model.encoder.layers.1.mlp.fc2.weight.input_scales",
    )
    tensors = load_file(shard)
    scales = tensors.pop(name)
    if change is not None:
        tensors[name] = change(scales)
    else:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        del index["weight_map"][name]
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, shard)
    with pytest.raises(VitrailError, match=complaint):
        load_model(target, load_config(target), dtype=torch.float32, device=CPU)


def test_without_folding_and_clipping_weights_are_those_rounded_to_nearest(
    source, tmp_path, options, monkeypatch
) -> None:
    monkeypatch.setattr(block_quantizer, "ALPHAS", {})
    quantize_checkpoint(source, tmp_path / "q", INT8, options)
    found = load_model(tmp_path / "q", load_config(source), dtype=torch.float32, device=CPU)
    true = load_model(source, load_config(source), dtype=torch.float32, device=CPU)
    for name in ("vision_model.encoder.layers.1.attn.qkv", "language_model.layers.2.attention.qkv"):
        weight = found.get_submodule(name).weight
        assert isinstance(weight, QuantizedWeight)
        expected = quantize_weight(true.get_submodule(name).weight, "int8").dequantize()
        assert torch.equal(weight.dequantize(), expected)
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, true.get_parameter(name)), name


def test_layers_to_keep_and_a_half_not_named_stay_as_they_are(source, tmp_path, options) -> None:
    config = QuantizationConfig("int8", None, overrides={r"layers\.0\.": None, "mlp.down": None})
    report = quantize_checkpoint(source, tmp_path / "q", config, options)
    layers = [f"{block['part']}.{layer['layer']}" for block in report["blocks"] for layer in block["layers"]]
    assert layers == [
        f"language_model.layers.{index}.{layer}"
        for index in (1, 2)
        for layer in ("attention.qkv", "attention.o", "mlp.gate_up")
    ]
    assert report["visual_cosine"]["min"] == pytest.approx(1, abs=1e-6)
    found = load_model(tmp_path / "q", load_config(source), dtype=torch.float32, device=CPU)
    true = load_model(source, load_config(source), dtype=torch.float32, device=CPU)
    assert torch.equal(found.language_model.layers[0].mlp.down.weight, true.language_model.layers[0].mlp.down.weight)
    tiles = torch.randint(0, 256, (1, 84, 84, 3), dtype=torch.uint8)
    assert torch.equal(found.encode_tiles(tiles), true.encode_tiles(tiles))


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({"select_layer": -2}, {}),  # a block of the ViT that never runs, and is in the file all the same
        ({"llm": {"tie_word_embeddings": True}}, {"shards": 3}),
        ({}, {"suffix": ".bin"}),
    ],
    ids=["unused block", "tied head in shards", "bin"],
)
def test_every_form_of_checkpoint_is_read_and_its_result_loads(
    sentencepiece_folder, tmp_path, options, changes, written
) -> None:
    folder = write_tiny_model(sentencepiece_folder(), **changes)
    config = json.loads((folder / "config.json").read_text())
    if written:
        (folder / "model.safetensors").unlink()
        weights = random_weights(config)
        if "llm" in changes:
            weights.pop("language_model.output.weight", None)
        write_checkpoint(folder, config, weights, **written)
    report = quantize_checkpoint(folder, tmp_path / "q", INT8, options)
    assert loads(tmp_path / "q")
    both = ({"model": folder}, {"model": tmp_path / "q"})
    examples = quantizer.read_examples(options.calibration, 3)
    found = compare(*({**side, "dtype": "float32", "device": "cpu"} for side in both), examples, max_tiles=2)
    assert found.visual_cosine_mean == pytest.approx(report["visual_cosine"]["mean"], abs=1e-4)
    assert found.logit_kl < 0.003


def test_outliers_that_break_plain_int8_do_not_break_ours(source, sentencepiece_folder, tmp_path, options) -> None:
    folder = sentencepiece_folder()
    for file in source.iterdir():
        shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    weights = random_weights(config)
    for layer in range(3):
        for norm, readers in (
            ("attention_norm", ("attention.wqkv",)),
            ("ffn_norm", ("feed_forward.w1", "feed_forward.w3")),
        ):
            prefix = f"language_model.model.layers.{layer}"
            weights[f"{prefix}.{norm}.weight"][5:64:20] *= 200
            for reader in readers:
                weights[f"{prefix}.{reader}.weight"][:, 5:64:20] /= 200
    write_checkpoint(folder, config, weights)
    report = quantize_checkpoint(folder, tmp_path / "q", QuantizationConfig("int8"), options)
    for block in report["blocks"]:
        rows = {layer["layer"]: layer for layer in block["layers"]}
        for name in ("attention.qkv", "mlp.gate_up"):
            assert rows[name]["plain_error"] > 0.15
            assert rows[name]["error"] < 0.02
    assert report["logit_kl"] < 0.003


def test_only_one_block_has_memory_at_a_time(source, tmp_path, options, monkeypatch) -> None:
    seen = []

    class Spy(part_loader.PartLoader):
        def load(self, *parts):
            super().load(*parts)
            seen.append({name for name, parameter in self.model.named_parameters() if not parameter.is_meta})

    monkeypatch.setattr(quantizer, "PartLoader", Spy)
    quantize_checkpoint(source, tmp_path / "q", INT8, options)
    assert len(seen) == 1 + 3 + 1 + 1 + 3 + 1
    assert set.union(*seen) == set(
        dict(load_model(source, load_config(source), dtype=torch.float32, device=CPU).named_parameters())
    )
    assert sum(map(len, seen)) == len(set.union(*seen))  # each once


# --- a run that is killed ---

SCRIPT = """
import sys, time
from vitrail.runtime import checkpoint_folder
from vitrail.runtime.quantizer import Options, quantize_checkpoint
from vitrail.runtime.quantization.config import QuantizationConfig
finish = checkpoint_folder.CheckpointFolder.finish_piece
def slow(self, *arguments):
    finish(self, *arguments)
    time.sleep(0.3)
checkpoint_folder.CheckpointFolder.finish_piece = slow
quantize_checkpoint(sys.argv[1], sys.argv[2], QuantizationConfig("int8", "int8", group_size=16),
    Options(calibration=sys.argv[3], dtype="float32", device="cpu", answers=False, max_tiles=2, progress=False))
"""


def test_a_killed_run_goes_on_where_it_stood_and_comes_to_the_same_bytes(
    source, images, tmp_path, options, monkeypatch
) -> None:
    quantize_checkpoint(source, tmp_path / "whole", INT8, options)
    target = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, source, target, images], cwd=tmp_path)
    done = tmp_path / "killed.partial/progress/done.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (done.is_file() and done.read_bytes().count(b"\n") >= 4):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = done.read_bytes().count(b"\n")
    assert 4 <= finished < 10
    assert not target.exists()
    assert not loads(tmp_path / "killed.partial")
    with done.open("ab") as lines:
        lines.write(b'{"part": "cut sho')  # as a line that was being written
    loaded = []
    monkeypatch.setattr(
        quantizer.PartLoader,
        "load",
        lambda self, *parts, load=quantizer.PartLoader.load: (loaded.extend(parts), load(self, *parts)),
    )
    report = quantize_checkpoint(source, target, INT8, options)
    assert not any(f"encoder.layers.{index}" in part for part in loaded for index in range(finished - 1))
    assert len(loaded) == 11 - finished  # the last piece has two parts
    assert len(report["blocks"]) == 6
    assert digests(target) == digests(tmp_path / "whole")


def test_a_run_begun_with_other_options_is_not_gone_on_with(source, tmp_path, options, monkeypatch) -> None:
    class StopError(Exception):
        pass

    def stop(self, streams):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(quantizer._Run, "_projector", stop)
        with pytest.raises(StopError):
            quantize_checkpoint(source, tmp_path / "q", INT8, options)
    with pytest.raises(InvalidRequestError, match="was begun with quantization="):
        quantize_checkpoint(source, tmp_path / "q", INT4, options)
    quantize_checkpoint(source, tmp_path / "q", INT8, options)
    assert loads(tmp_path / "q")


def test_a_run_killed_at_its_very_end_only_ends_again(source, tmp_path, options, monkeypatch) -> None:
    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantizer._Run, "_report", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, tmp_path / "q", INT8, options)
    assert not (tmp_path / "q").exists()
    monkeypatch.setattr(quantizer.PartLoader, "load", None)  # no block is needed any more
    report = quantize_checkpoint(source, tmp_path / "q", INT8, options)
    assert len(report["blocks"]) == 6
    assert loads(tmp_path / "q")
    assert not (tmp_path / "q" / "progress").exists()


# --- what cannot be done ---


def test_a_full_disk_is_named_and_leaves_nothing_that_loads(source, tmp_path, options) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = 20_000  # bytes of a file: the first shard does not fit
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
        with pytest.raises(InvalidRequestError, match=r"model-0000.-of-00010.safetensors: cannot be written \(.*large"):
            quantize_checkpoint(source, tmp_path / "q", INT8, options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert not (tmp_path / "q").exists()
    assert not loads(tmp_path / "q.partial")
    assert not list((tmp_path / "q.partial").rglob("*.fresh"))
    quantize_checkpoint(source, tmp_path / "q", INT8, options)  # with room again it goes on
    assert loads(tmp_path / "q")


@pytest.mark.parametrize("room", [3, 14])  # files, of a shard and what comes behind it for each block
def test_a_disk_that_fills_up_in_the_middle_costs_no_finished_block(
    source, tmp_path, options, calibrated, monkeypatch, room
) -> None:
    config, save, saved = QuantizationConfig(None, "int8"), checkpoint_folder.save_file, []

    def full(tensors, path, **more):
        saved.append(path.name)
        if len(saved) > room:
            path.write_bytes(b"half of a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder, "save_file", full)
        with pytest.raises(InvalidRequestError, match=r"cannot be written \(No space left on device\)"):
            quantize_checkpoint(source, tmp_path / "q", config, options)
    assert not (tmp_path / "q").exists()
    assert not loads(tmp_path / "q.partial")
    assert not list((tmp_path / "q.partial").rglob("*.fresh"))
    begun = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "q.partial").glob("*.safetensors")}
    assert len(begun) == (room + 1) // 2
    quantize_checkpoint(source, tmp_path / "q", config, options)  # with room again it goes on
    for name in sorted(begun)[: room // 2]:
        assert (tmp_path / "q" / name).stat().st_mtime_ns == begun[name]
    assert digests(tmp_path / "q") == digests(calibrated)


@pytest.mark.parametrize(("value", "complaint"), [(0.0, "zero on all"), (float("nan"), "not finite")])
def test_a_layer_whose_inputs_say_nothing_is_named(sentencepiece_folder, tmp_path, options, value, complaint) -> None:
    folder = write_tiny_model(sentencepiece_folder())
    config = json.loads((folder / "config.json").read_text())
    weights = random_weights(config)
    weights["language_model.model.layers.1.ffn_norm.weight"].fill_(value)
    write_checkpoint(folder, config, weights)
    with pytest.raises(CheckpointError, match=rf"language_model.layers.1.mlp.gate_up: .*{complaint}"):
        quantize_checkpoint(folder, tmp_path / "q", INT8, options)
    assert not (tmp_path / "q").exists()
    assert not loads(tmp_path / "q.partial")


def test_what_can_be_refused_is_refused_before_anything_is_written(
    source, sentencepiece_folder, tmp_path, images, options
) -> None:
    (tmp_path / "exists").mkdir()
    quantised = sentencepiece_folder()
    config = json.loads((source / "config.json").read_text())
    for where in (
        {"quantization_config": {"quant_method": "awq"}},
        {"llm_config": {"quantization_config": {"quant_method": "awq"}}},
    ):
        (quantised / "config.json").write_text(json.dumps({**config, **where}))
        with pytest.raises(InvalidRequestError, match=r"is quantised already \(awq\)"):
            quantize_checkpoint(quantised, tmp_path / "q", INT8, options)
    tower = tmp_path / "tower"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps(PUBLISHED_300M))
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "1.png").write_bytes(b"no image")
    for error, complaint, arguments in (
        (InvalidRequestError, "exists already", (source, tmp_path / "exists", INT8, options)),
        (InvalidRequestError, "exists already", (source, Path("."), INT8, options)),
        (InvalidRequestError, "folder does not exist", (source, tmp_path / "no" / "q", INT8, options)),
        (InvalidRequestError, "nothing to quantise", (source, tmp_path / "q", QuantizationConfig(), options)),
        (InvalidRequestError, "not calibrated", (source, tmp_path / "q", QuantizationConfig("nf4"), options)),
        (ConfigError, "groups of 128 do not divide", (source, tmp_path / "q", QuantizationConfig("int4"), options)),
        (
            ConfigError,
            "matches no linear",
            (source, tmp_path / "q", QuantizationConfig("int8", overrides={"x y": None}), options),
        ),
        (UnsupportedError, "only chat models", (tower, tmp_path / "q", INT8, options)),
        (InvalidRequestError, "holds no images", (source, tmp_path / "q", INT8, Options(empty, device="cpu"))),
        (InvalidRequestError, "no usable image", (source, tmp_path / "q", INT8, Options(broken, device="cpu"))),
        (InvalidRequestError, "at least one sample", (source, tmp_path / "q", INT8, Options(images, num_samples=0))),
        (CheckpointError, "no such folder", (tmp_path / "absent", tmp_path / "q", INT8, options)),
    ):
        with pytest.raises(error, match=complaint):
            quantize_checkpoint(*arguments)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "empty", "exists", "tower"]


def test_a_folder_that_is_no_run_is_not_touched(source, tmp_path, options) -> None:
    (tmp_path / "q.partial").mkdir()
    (tmp_path / "q.partial" / "mine.txt").touch()
    with pytest.raises(InvalidRequestError, match="is no run to go on with"):
        quantize_checkpoint(source, tmp_path / "q", INT8, options)
    assert [file.name for file in (tmp_path / "q.partial").iterdir()] == ["mine.txt"]


def test_answers_are_not_compared_where_the_source_would_not_fit(source, tmp_path, options, monkeypatch) -> None:
    monkeypatch.setattr(quantizer, "free_memory", lambda device: 1000)
    report = quantize_checkpoint(source, tmp_path / "q", INT8, Options(options.calibration, device="cpu", max_tiles=2))
    assert report["answers"] is None
    assert "vitrail verify" in report["answers_note"]
    assert "Answers were not compared: the source needs" in (tmp_path / "q/report.md").read_text()
