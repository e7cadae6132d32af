import json
import math
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitrail.runtime import weights
from vitrail.runtime.config import load_config, parse_config
from vitrail.runtime.errors import CheckpointError
from vitrail.runtime.models.internvl import InternVLModel
from vitrail.runtime.weights import (
    NANO,
    build_model,
    checkpoint_tensors,
    expected_tensors,
    load_model,
    resolve_checkpoint,
)

from ..official_configs import (
    INTERNLM2_2B,
    INTERNLM2_20B,
    INTERNVIT_6B,
    INTERNVIT_300M,
    INTERNVL2_1B,
    INTERNVL_CHAT_V1_5,
    PHI3_MINI_128K,
    QWEN2_0_5B,
    QWEN3_8B,
    YI_34B,
    chat,
)
from ..random_checkpoints import ARCHITECTURES, build, chat_config, random_weights, write_checkpoint

CPU = torch.device("cpu")


def count(config: dict[str, Any], prefix: str = "") -> int:
    return sum(math.prod(shape) for name, shape in expected_tensors(config).items() if name.startswith(prefix))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> InternVLModel:
    return load_model(folder, load_config(folder), dtype=dtype, device=CPU, progress=False)


# What a checkpoint must hold


def test_v1_5_has_934_tensors_and_25_5_billion_parameters() -> None:
    assert len(expected_tensors(INTERNVL_CHAT_V1_5)) == 934
    assert count(INTERNVL_CHAT_V1_5) == 25_514_186_112
    assert count(INTERNVL_CHAT_V1_5, "vision_model.") == 5_536_496_000
    assert count(INTERNVL_CHAT_V1_5, "mlp1.") == 116_429_824
    assert count(INTERNVL_CHAT_V1_5, "language_model.") == 19_861_260_288


def test_expected_tensors_allocates_none_of_them() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_bytes()
    tracemalloc.start()
    try:
        expected_tensors(INTERNVL_CHAT_V1_5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10e6
    assert resident_bytes() - before < 100e6


def test_expected_tensors_reads_a_folder_a_decoded_config_and_a_parsed_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(INTERNVL2_1B))
    expected = expected_tensors(INTERNVL2_1B)
    assert expected_tensors(tmp_path) == expected_tensors(str(tmp_path)) == expected
    assert expected_tensors(parse_config(INTERNVL2_1B)) == expected


def test_shapes_of_v1_5_are_the_published_ones() -> None:
    published = {
        "vision_model.embeddings.class_embedding": (1, 1, 3200),
        "vision_model.embeddings.patch_embedding.weight": (3200, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (3200,),
        "vision_model.embeddings.position_embedding": (1, 1025, 3200),
        "vision_model.encoder.layers.44.norm1.weight": (3200,),
        "vision_model.encoder.layers.44.norm2.weight": (3200,),
        "vision_model.encoder.layers.44.attn.qkv.weight": (9600, 3200),
        "vision_model.encoder.layers.44.attn.q_norm.weight": (3200,),
        "vision_model.encoder.layers.44.attn.k_norm.weight": (3200,),
        "vision_model.encoder.layers.44.attn.proj.weight": (3200, 3200),
        "vision_model.encoder.layers.44.attn.proj.bias": (3200,),
        "vision_model.encoder.layers.44.mlp.fc1.weight": (12800, 3200),
        "vision_model.encoder.layers.44.mlp.fc1.bias": (12800,),
        "vision_model.encoder.layers.44.mlp.fc2.weight": (3200, 12800),
        "vision_model.encoder.layers.44.mlp.fc2.bias": (3200,),
        "vision_model.encoder.layers.44.ls1": (3200,),
        "vision_model.encoder.layers.44.ls2": (3200,),
        "mlp1.0.weight": (12800,),
        "mlp1.0.bias": (12800,),
        "mlp1.1.weight": (6144, 12800),
        "mlp1.1.bias": (6144,),
        "mlp1.3.weight": (6144, 6144),
        "mlp1.3.bias": (6144,),
        "language_model.model.tok_embeddings.weight": (92553, 6144),
        "language_model.model.layers.47.attention_norm.weight": (6144,),
        "language_model.model.layers.47.ffn_norm.weight": (6144,),
        "language_model.model.layers.47.attention.wqkv.weight": (8192, 6144),
        "language_model.model.layers.47.attention.wo.weight": (6144, 6144),
        "language_model.model.layers.47.feed_forward.w1.weight": (16384, 6144),
        "language_model.model.layers.47.feed_forward.w3.weight": (16384, 6144),
        "language_model.model.layers.47.feed_forward.w2.weight": (6144, 16384),
        "language_model.model.norm.weight": (6144,),
        "language_model.output.weight": (92553, 6144),
    }
    expected = expected_tensors(INTERNVL_CHAT_V1_5)
    assert {name: expected[name] for name in published} == published
    layers = [name for name in expected if ".layers." in name]
    assert len(layers) == 45 * 13 + 48 * 7
    assert len(expected) - len(layers) == len([name for name in published if ".layers." not in name]) == 13


@pytest.mark.parametrize(
    ("vision", "parameters"),
    [
        (INTERNVIT_6B | {"num_hidden_layers": 48, "image_size": 224}, 5_902_793_600),
        (INTERNVIT_6B | {"num_hidden_layers": 48}, 5_905_251_200),
        (INTERNVIT_6B, 5_536_496_000),
        (INTERNVIT_300M, 304_012_288),
    ],
    ids=["6B-224px", "6B-448px-V1-0", "6B-448px-V1-5", "300M-448px"],
)
def test_vision_encoders_have_their_published_sizes(vision: dict[str, Any], parameters: int) -> None:
    assert count(chat(vision, INTERNLM2_2B), "vision_model.") == parameters


@pytest.mark.parametrize(
    ("llm", "billions"),
    [
        (INTERNLM2_2B, 1.889),
        (INTERNLM2_20B, 19.861),
        (YI_34B, 34.389),
        (PHI3_MINI_128K, 3.821),
        (QWEN2_0_5B | {"vocab_size": 151674}, 0.630),
        (QWEN3_8B, 8.191),
    ],
    ids=["InternLM2-1.8B", "InternLM2-20B", "Yi-34B", "Phi-3-mini", "Qwen2.5-0.5B", "Qwen3-8B"],
)
def test_language_models_have_their_published_sizes(llm: dict[str, Any], billions: float) -> None:
    assert round(count(chat(INTERNVIT_300M, llm), "language_model.") / 1e9, 3) == billions


def test_internvl2_1b_has_an_untied_head_and_biases_on_q_k_v_alone() -> None:
    expected = expected_tensors(INTERNVL2_1B)
    # 24 blocks of 14 and 4 beside them; the projector's 6; 24 layers of 12 and 3 beside them.
    assert len(expected) == (24 * 14 + 4) + 6 + (24 * 12 + 3)
    assert count(INTERNVL2_1B, "mlp1.") == 4_482_816
    assert expected["language_model.lm_head.weight"] == (151655, 896)
    layer = "language_model.model.layers.0.self_attn"
    assert expected[f"{layer}.q_proj.bias"] == (896,)
    assert expected[f"{layer}.k_proj.bias"] == expected[f"{layer}.v_proj.bias"] == (128,)
    assert f"{layer}.o_proj.bias" not in expected


# From files to parameters and back


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    architecture = draw(st.sampled_from(ARCHITECTURES))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    blocks = draw(st.integers(1, 3))
    return chat_config(
        architecture,
        vision={
            "hidden_size": 12,
            "num_attention_heads": 2,
            "intermediate_size": 10,
            "num_hidden_layers": blocks,
            "image_size": 28,
            "norm_type": draw(st.sampled_from(["rms_norm", "layer_norm"])),
            "qk_normalization": draw(st.booleans()),
            "qkv_bias": draw(st.booleans()),
        },
        llm={
            "vocab_size": 7,
            "hidden_size": 16 * kv_heads * group,
            "head_dim": 16,
            "intermediate_size": 6,
            "num_hidden_layers": draw(st.integers(1, 2)),
            "num_attention_heads": kv_heads * group,
            "num_key_value_heads": kv_heads,
            "tie_word_embeddings": draw(st.booleans()),
            **({"bias": draw(st.booleans())} if architecture.startswith("InternLM") else {}),
        },
        select_layer=draw(st.integers(-blocks, -1)),
    )


@settings(max_examples=30)
@given(config=configs())
def test_checkpoint_tensors_gives_back_what_build_model_took(config: dict[str, Any]) -> None:
    taken = random_weights(config)
    model = build(config, taken)
    given_back = dict(checkpoint_tensors(model))
    dropped = {
        name
        for layer in range(model.config.vision_depth, model.config.vision.num_hidden_layers)
        for name in taken
        if name.startswith(f"vision_model.encoder.layers.{layer}.")
    }
    assert given_back.keys() == taken.keys() - dropped
    assert all(torch.equal(tensor, taken[name]) for name, tensor in given_back.items())
    assert all(tensor.is_contiguous() for tensor in given_back.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_saved_checkpoint_loads_to_the_same_model(
    tmp_path: Path, architecture: str, shards: int, suffix: str
) -> None:
    config = chat_config(architecture)
    taken = random_weights(config)
    write_checkpoint(tmp_path, config, taken, shards=shards, suffix=suffix)
    loaded, built = load(tmp_path), build(config, taken)
    assert loaded.state_dict().keys() == built.state_dict().keys()
    assert all(torch.equal(tensor, built.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_model_written_by_checkpoint_tensors_loads_again(tmp_path: Path) -> None:
    config = chat_config()
    model = build(config, random_weights(config))
    write_checkpoint(tmp_path, config, dict(checkpoint_tensors(model)))
    again = load(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_bin_files_from_before_the_zip_format_load_too(tmp_path: Path) -> None:
    config = chat_config()
    taken = random_weights(config)
    write_checkpoint(tmp_path, config, taken, suffix=".bin")
    torch.save(taken, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(load(tmp_path).language_model.head.weight, taken["language_model.output.weight"])


def test_safetensors_win_over_bin_files_beside_them(tmp_path: Path) -> None:
    config = chat_config()
    write_checkpoint(tmp_path, config, random_weights(config, seed=1))
    write_checkpoint(tmp_path, config, random_weights(config, seed=2), suffix=".bin")
    expected = random_weights(config, seed=1)["language_model.output.weight"]
    assert torch.equal(load(tmp_path).language_model.head.weight, expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_once_from_the_stored_to_the_wanted_dtype(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    config = chat_config()
    taken = {name: tensor.to(stored) for name, tensor in random_weights(config).items()}
    write_checkpoint(tmp_path, config, taken, shards=2)
    model = load(tmp_path, wanted)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert all(torch.equal(tensor, taken[name].to(wanted)) for name, tensor in checkpoint_tensors(model))


def test_a_loaded_model_is_for_inference_and_leaves_nothing_on_meta() -> None:
    config = chat_config()
    model = build(config, random_weights(config))
    assert not model.training
    assert all(not parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.device == CPU and parameter.isfinite().all() for parameter in model.parameters())
    assert not list(model.buffers())


def test_every_parameter_is_written_by_some_tensor() -> None:
    # A row that no slot covers would keep whatever memory held: fill that with NaN and look.
    config = parse_config(chat_config("Qwen3ForCausalLM"))
    covered: dict[str, Tensor] = {}
    with torch.device("meta"):
        model = InternVLModel(config)
    for name, parameter in model.named_parameters():
        covered[name] = torch.zeros(parameter.shape[0], dtype=torch.int64)
    for slot in weights.checkpoint_map(config).values():
        assert slot.parameter is not None
        covered[slot.parameter][slot.start : slot.start + slot.shape[0]] += 1
    assert all((times == 1).all() for times in covered.values())


def test_blocks_beyond_select_layer_are_known_but_not_built(tmp_path: Path) -> None:
    config = chat_config(vision={"num_hidden_layers": 6}, select_layer=-4)
    taken = random_weights(config)
    assert "vision_model.encoder.layers.5.ls1" in taken
    write_checkpoint(tmp_path, config, taken)
    model = load(tmp_path)
    assert len(model.vision_model.encoder.layers) == 3
    del taken["vision_model.encoder.layers.5.ls1"]
    write_checkpoint(tmp_path, config, taken)
    with pytest.raises(CheckpointError, match=r"1 tensors missing: vision_model\.encoder\.layers\.5\.ls1"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "head", "embedding"),
    [("Qwen2ForCausalLM", "lm_head", "embed_tokens"), ("InternLM2ForCausalLM", "output", "tok_embeddings")],
)
def test_a_tied_head_falls_back_to_the_embedding(tmp_path: Path, architecture: str, head: str, embedding: str) -> None:
    config = chat_config(architecture, llm={"tie_word_embeddings": True})
    taken = random_weights(config)
    assert f"language_model.{head}.weight" not in taken
    write_checkpoint(tmp_path, config, taken)
    language_model = load(tmp_path).language_model
    assert language_model.head.weight is language_model.embedding
    assert torch.equal(language_model.embedding, taken[f"language_model.model.{embedding}.weight"])


def test_a_head_that_is_stored_is_used_even_when_the_config_ties_it(tmp_path: Path) -> None:
    config = chat_config("Qwen2ForCausalLM", llm={"tie_word_embeddings": True})
    taken = random_weights(config)
    own = torch.randn(taken["language_model.model.embed_tokens.weight"].shape)
    write_checkpoint(tmp_path, config, taken | {"language_model.lm_head.weight": own})
    model = load(tmp_path)
    assert torch.equal(model.language_model.head.weight, own)
    assert "language_model.lm_head.weight" in dict(checkpoint_tensors(model))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_the_rotary_constants_of_old_llama_files_are_ignored(tmp_path: Path, suffix: str) -> None:
    config = chat_config("LlamaForCausalLM")
    taken = random_weights(config)
    constant = {f"language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
    write_checkpoint(tmp_path, config, taken | constant, suffix=suffix)
    assert dict(checkpoint_tensors(load(tmp_path))).keys() == taken.keys()


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_the_progress_bar_counts_shards_and_stays_away_from_pipes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], progress: bool | None, shown: bool
) -> None:
    config = chat_config()
    write_checkpoint(tmp_path, config, random_weights(config), shards=3)
    load_model(tmp_path, load_config(tmp_path), dtype=torch.float32, device=CPU, progress=progress)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert ("3/3" in captured.err) == shown


# What is wrong with a checkpoint, by name

Alter = Callable[[dict[str, Tensor]], None]


def drop_norm(taken: dict[str, Tensor]) -> None:
    del taken["language_model.model.norm.weight"]


def drop_a_layer(taken: dict[str, Tensor]) -> None:
    for name in [name for name in taken if ".layers.1.attention" in name or ".layers.1.feed" in name]:
        del taken[name]
    for name in ("vision_model.encoder.layers.1.ls1", "vision_model.encoder.layers.1.ls2"):
        del taken[name]


def add_a_stranger(taken: dict[str, Tensor]) -> None:
    taken["language_model.model.layers.0.attention.lora_A.weight"] = torch.ones(2, 2)


def rename(taken: dict[str, Tensor]) -> None:
    taken["mlp1.2.weight"] = taken.pop("mlp1.3.weight")


def transpose(taken: dict[str, Tensor]) -> None:
    taken["mlp1.1.weight"] = taken["mlp1.1.weight"].t().contiguous()


def shorten(taken: dict[str, Tensor]) -> None:
    taken["language_model.output.weight"] = taken["language_model.output.weight"][:-1].clone()


def flatten(taken: dict[str, Tensor]) -> None:
    taken["vision_model.embeddings.class_embedding"] = taken["vision_model.embeddings.class_embedding"].flatten()


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (drop_norm, r"1 tensors missing: language_model\.model\.norm\.weight$"),
        (drop_a_layer, r"8 tensors missing: vision_model\.encoder\.layers\.1\.ls1, .* and 3 more$"),
        (add_a_stranger, r"1 tensors unexpected: language_model\.model\.layers\.0\.attention\.lora_A\.weight$"),
        (rename, r"1 tensors missing: mlp1\.3\.weight; 1 tensors unexpected: mlp1\.2\.weight$"),
        (transpose, r"mlp1\.1\.weight has shape \(192, 64\), the config says \(64, 192\)"),
        (shorten, r"language_model\.output\.weight has shape \(508, 64\), the config says \(509, 64\)"),
        (flatten, r"class_embedding has shape \(48,\), the config says \(1, 1, 48\)"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("shards", [1, 2])
def test_tensors_that_differ_from_the_config_are_named(
    tmp_path: Path, alter: Alter, message: str, suffix: str, shards: int
) -> None:
    config = chat_config()
    taken = random_weights(config)
    alter(taken)
    write_checkpoint(tmp_path, config, taken, suffix=suffix, shards=shards)
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_headers_are_compared_before_any_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = chat_config()
    taken = random_weights(config)
    shorten(taken)
    write_checkpoint(tmp_path, config, taken, shards=3)
    monkeypatch.setattr(weights, "build_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match=r"language_model\.output\.weight has shape"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_tensor_that_two_shards_hold_is_named(tmp_path: Path, suffix: str) -> None:
    config = chat_config()
    taken = random_weights(config)
    write_checkpoint(tmp_path, config, taken, shards=2, suffix=suffix)
    [second] = tmp_path.glob(f"*00002-of-00002{suffix}")
    if suffix == ".bin":
        torch.save(torch.load(second, weights_only=True) | {"mlp1.0.bias": taken["mlp1.0.bias"]}, second)
    else:
        save_file(load_file(second) | {"mlp1.0.bias": taken["mlp1.0.bias"]}, second)
    first_has_it = second.name not in json.loads(next(tmp_path.glob("*.index.json")).read_text())["weight_map"].values()
    assert not first_has_it
    with pytest.raises(CheckpointError, match=r"mlp1\.0\.bias occurs twice"):
        load(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 8, 1000, 0.5, -1], ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str, kept: float) -> None:
    config = chat_config()
    write_checkpoint(tmp_path, config, random_weights(config), suffix=suffix)
    [path] = tmp_path.glob(f"*{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=f"{path}: not a readable") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_file_of_noise_is_named(tmp_path: Path, suffix: str) -> None:
    config = chat_config()
    write_checkpoint(tmp_path, config, random_weights(config), suffix=suffix)
    [path] = tmp_path.glob(f"*{suffix}")
    path.write_bytes(b"\xff" * 4096)
    with pytest.raises(CheckpointError, match=f"{path}: not a readable"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_missing_shards_are_named(tmp_path: Path, suffix: str) -> None:
    config = chat_config()
    write_checkpoint(tmp_path, config, random_weights(config), shards=4, suffix=suffix)
    for path in tmp_path.glob(f"*-0000[23]-of-*{suffix}"):
        path.unlink()
    with pytest.raises(CheckpointError, match=rf"2 shards missing: \w+-00002-of-00004{suffix}, \w+-00003-of-00004"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"weight_map": {}}',
        b'{"weight_map": ["model.safetensors"]}',
        b'{"weight_map": {"a": 3}}',
        b'{"weight_map": {"a": null}}',
        b'{"weight_map": {"a": ["model.safetensors"]}}',
        b'{"weight_map": {"a": "../other/model.safetensors"}}',
        b'{"weight_map": {"a": "/etc/passwd"}}',
    ],
    ids=lambda content: content.decode(errors="replace"),
)
def test_an_index_that_is_none_is_named(tmp_path: Path, content: bytes) -> None:
    config = chat_config()
    write_checkpoint(tmp_path, config, random_weights(config), shards=2)
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: not a valid index"):
        load(tmp_path)


def test_a_folder_without_weights_says_what_it_lacks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, chat_config(), {"unused": torch.ones(1)})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors or pytorch_model\.bin, nor an index"):
        load(tmp_path)


class Payload:
    """Unpickling it leaves a mark: what a malicious `.bin` would do in place of something worse."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_malicious_bin_file_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    config = chat_config()
    write_checkpoint(tmp_path, config, random_weights(config), suffix=".bin")
    path, mark = tmp_path / "pytorch_model.bin", tmp_path / "it-ran"
    payload = {"mlp1.0.bias": Payload(mark)}
    torch.save(payload, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=f"{path}: not a readable weights file"):
        load(tmp_path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the payload does work where pickles are trusted
    assert mark.exists()


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], {"mlp1.0.bias": [1.0, 2.0]}, {7: torch.ones(2)}, {"module": {"mlp1.0.bias": torch.ones(2)}}],
    ids=["list", "numbers", "integer-names", "nested"],
)
def test_a_bin_file_that_holds_no_flat_map_of_tensors_is_named(tmp_path: Path, content: Any) -> None:
    write_checkpoint(tmp_path, chat_config(), {}, suffix=".bin")
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: does not hold a flat map"):
        load(tmp_path)


def test_build_model_refuses_a_tensor_given_twice() -> None:
    config = chat_config()
    taken = random_weights(config)

    def twice() -> Iterator[tuple[str, Tensor]]:
        yield from taken.items()
        yield "mlp1.0.bias", taken["mlp1.0.bias"]

    with pytest.raises(CheckpointError, match=r"somewhere: mlp1\.0\.bias occurs twice"):
        build_model(parse_config(config), twice(), dtype=torch.float32, device=CPU, source="somewhere")


# From a name to a folder


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint(tmp_path) == resolve_checkpoint(str(tmp_path)) == tmp_path
    assert resolve_checkpoint("~/owner") == tmp_path / "owner"
    assert resolve_checkpoint("owner/name") == Path("owner/name"), "a folder wins over a hub id of the same name"


def test_nano_is_the_bundled_checkpoint() -> None:
    assert resolve_checkpoint("nano") == NANO


@pytest.mark.parametrize(
    "name", ["missing", "./missing", "/missing/folder", "~/missing", "~nobody-by-this-name/x", "a/b/c", "x" * 5000]
)
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder") as error:
        resolve_checkpoint(name)
    assert name in str(error.value)


def test_a_missing_path_is_never_taken_for_a_hub_id() -> None:
    with pytest.raises(CheckpointError, match="owner/name: no such folder"):
        resolve_checkpoint(Path("owner/name"))


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match=f"{file}: is a file; give the checkpoint's folder"):
        resolve_checkpoint(file)


def test_a_hub_id_that_is_not_cached_says_offline_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert huggingface_hub.constants.HF_HUB_OFFLINE, "tests must not reach for the network"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as error:
        resolve_checkpoint("OpenGVLab/no-such-model")
    message = str(error.value)
    assert message.startswith(f"OpenGVLab/no-such-model: no local folder {tmp_path}/OpenGVLab/no-such-model")
    assert weights.HF_HUB_CACHE in message
    assert "\n" not in message


def test_a_hub_id_in_the_cache_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / commit
    config = chat_config()
    write_checkpoint(snapshot, config, random_weights(config), shards=2)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(weights, "snapshot_download", lambda *a, **k: download(*a, **k, cache_dir=tmp_path))
    assert resolve_checkpoint("owner/name") == snapshot
    load(resolve_checkpoint("owner/name"))
    with pytest.raises(CheckpointError, match="not in the hub cache"):
        resolve_checkpoint("owner/name", revision="v2")


def test_a_malformed_hub_id_is_named() -> None:
    with pytest.raises(CheckpointError, match="owner/na me: no local folder and no such model on the hub"):
        resolve_checkpoint("owner/na me")


# Memory

MEASURE = """
import json, sys
from pathlib import Path
import torch
from vitrail.runtime.config import load_config
from vitrail.runtime.weights import load_model

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key + ":"))

def load(folder, dtype):
    return load_model(Path(folder), load_config(folder), dtype=dtype, device=torch.device("cpu"), progress=False)

small, *large = sys.argv[1:]
figures = {}
for folder in large:
    for dtype in (torch.bfloat16, torch.float32):
        load(small + Path(folder).suffix, dtype)  # what is imported or set up once is not the checkpoint's
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = kilobytes("VmRSS")
        model = load(folder, dtype)
        peak = (kilobytes("VmHWM") - before) * 1024
        figures[f"{folder} {dtype}"] = [peak, sum(parameter.nbytes for parameter in model.parameters())]
        del model
print(json.dumps(figures))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_loading_needs_no_more_than_one_shard_beside_the_model(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    config = chat_config(llm={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2})
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in expected_tensors(config).items()}
    small = chat_config()
    for suffix in (".safetensors", ".bin"):
        write_checkpoint(tmp_path / f"small{suffix}", small, random_weights(small), shards=2, suffix=suffix)
        write_checkpoint(tmp_path / f"large{suffix}", config, zeros, shards=8, suffix=suffix)
    sizes = [path.stat().st_size for path in (tmp_path / "large.bin").glob("*.bin")]
    # Allocators round up. All shards at once, or a second copy of the model, would still show.
    margin = 8e6
    assert max(sizes) + margin < sum(sizes) / 2
    folders = [str(tmp_path / name) for name in ("small", "large.safetensors", "large.bin")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE, *folders], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for label, (peak, resident) in json.loads(done.stdout).items():
        excess = peak - resident
        what = label.removeprefix(f"{tmp_path}/large")
        record_property(f"host bytes beside the model, {what}", excess)
        print(f"{what}: {excess / 1e6:.1f} MB beside {resident / 1e6:.0f} MB, largest shard {max(sizes) / 1e6:.1f} MB")
        assert resident >= sum(sizes) * 0.98
        assert excess <= max(sizes) + margin, what


@pytest.mark.parametrize(("suffix", "calls"), [(".safetensors", 1), (".bin", 2)])
def test_a_hub_repository_gives_bin_files_only_where_it_has_no_safetensors(
    suffix: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        if f"*{suffix}" in allow_patterns:
            (tmp_path / f"weights{suffix}").touch()
        return str(tmp_path)

    monkeypatch.setattr(weights, "snapshot_download", download)
    assert weights.resolve_checkpoint("owner/name") == tmp_path
    assert len(asked) == calls
    assert "*.bin" not in asked[0]
    assert (tmp_path / f"weights{suffix}").exists()


def test_an_empty_model_name_is_refused() -> None:
    with pytest.raises(CheckpointError, match="empty"):
        weights.resolve_checkpoint("")
