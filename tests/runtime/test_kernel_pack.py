"""What is recorded for a kernel pack against what the engine launches."""

import json
from dataclasses import replace

import pytest
import torch

from vitrail.kernels import dispatch
from vitrail.kernels.sampling import greedy_tokens
from vitrail.kernels.signature import Launch
from vitrail.runtime.config import ContrastiveConfig, load_any_config, load_config
from vitrail.runtime.engine.runner import Runner
from vitrail.runtime.errors import CheckpointError
from vitrail.runtime.kernel_pack import GEOMETRIES, find_config, record_launches
from vitrail.runtime.layers.rotary import inverse_frequencies
from vitrail.runtime.models.internvl import InternVLModel
from vitrail.runtime.quantization.config import QuantizationConfig
from vitrail.runtime.quantization.model import quantize_model
from vitrail.runtime.request import GenerationConfig
from vitrail.runtime.sampler import SamplingState, _draw

from ..official_configs import INTERNVIT_6B_224PX, INTERNVL2_1B, INTERNVL_14B_224PX, INTERNVL_CHAT_V1_5
from ..random_checkpoints import chat_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "official"), [("InternVL-Chat-V1-5", INTERNVL_CHAT_V1_5), ("InternVL2_5-1B", INTERNVL2_1B)]
)
def test_known_shapes_are_the_official_ones(name, official) -> None:
    known, read = GEOMETRIES[name], load_config(official)
    assert known.vision == read.vision
    # A kernel sees neither the vocabulary's size, which grew between releases, nor how positions are stretched.
    free = {"vocab_size": 0, "rope_scaling": None, "tie_word_embeddings": False, "max_position_embeddings": 0}
    assert replace(known.llm, **free) == replace(read.llm, **free)
    assert (known.tile_size, known.shuffle_factor) == (read.tile_size, read.shuffle_factor)


def test_models_are_found_by_shape_hub_id_and_folder(tmp_path) -> None:
    assert find_config("InternVL2_5-8B") is find_config("OpenGVLab/InternVL2_5-8B") is GEOMETRIES["InternVL2_5-8B"]
    assert find_config("nano").llm.vocab_size == 640
    (tmp_path / "config.json").write_text(json.dumps(INTERNVL_14B_224PX))
    config = find_config(str(tmp_path))
    assert isinstance(config, ContrastiveConfig)
    assert config.llm.hidden_size == 4096
    with pytest.raises(CheckpointError, match=r"nobody/nothing: no local folder, no known shape \(InternVL-Chat-V1-5,"):
        find_config("nobody/nothing")


@pytest.mark.parametrize("official", [INTERNVL_14B_224PX, INTERNVIT_6B_224PX])
def test_encoders_are_recorded_too(official) -> None:
    names = {launch.name for launch in record_launches(load_any_config(official), dispatch.H200, torch.bfloat16)}
    assert {"_patch_embedding_kernel", "_qk_norm_kernel", "_scaled_residual_kernel"} <= names
    assert ("_swiglu_kernel" in names) == (official is INTERNVL_14B_224PX)


@pytest.mark.parametrize("arch", dispatch.ARCHS)
def test_every_launch_is_recorded_once_and_again_the_same(arch) -> None:
    launches = record_launches(find_config("nano"), dispatch.REPRESENTATIVE[arch], torch.bfloat16)
    keys = [launch.key for launch in launches]
    assert len(set(keys)) == len(keys)
    assert {launch.name for launch in launches} >= {"_norm_kernel", "_paged_prefill_kernel", "_paged_decode_kernel"}
    assert [
        launch.key for launch in record_launches(find_config("nano"), dispatch.REPRESENTATIVE[arch], torch.bfloat16)
    ] == keys
    assert dispatch.simulation() is None


def test_another_dtype_has_binaries_of_its_own() -> None:
    recorded = [
        set(record_launches(find_config("nano"), dispatch.H200, dtype)) for dtype in (torch.bfloat16, torch.float16)
    ]
    # Logits are fp32 whatever the model is.
    assert {launch.name for launch in recorded[0] & recorded[1]} == {
        "_group_kernel",
        "_greedy_kernel",
        "_sample_kernel",
    }
    assert len(recorded[0]) == len(recorded[1])


@pytest.mark.parametrize(("arch", "method"), [("sm_80", "int8"), ("sm_90", "int8"), ("sm_90", "fp8")])
def test_a_quantised_model_has_its_products_its_norms_and_its_cache_recorded(arch, method) -> None:
    launches = record_launches(
        find_config("nano"),
        dispatch.REPRESENTATIVE[arch],
        torch.bfloat16,
        quantization=QuantizationConfig(method, method),
        cache_dtype=torch.int8,
    )
    codes = {"int8": "*i8:16", "fp8": "*fp8e4nv:16"}[method]
    kernels = ("_scaled_persistent_kernel", "_scaled_pipelined_kernel")
    products = [launch for launch in launches if launch.name in kernels]
    assert {launch.signature[0] for launch in products} == {codes}
    assert {dict(launch.constants)["EPILOGUE"] for launch in products} >= {"none", "gelu", "swiglu"}
    norms = [launch for launch in launches if launch.name == "_norm_kernel"]
    assert codes in {launch.signature[6] for launch in norms}
    for launch in launches:
        if launch.name in ("_rope_and_cache_kernel", "_paged_prefill_kernel", "_paged_decode_kernel"):
            assert "*i8:16" in launch.signature
    # fc1 leaves codes where the scales of fc2's inputs are known beforehand.
    assert codes in {launch.signature[6] for launch in products}


@pytest.mark.parametrize(
    ("arch", "method"), [("sm_80", None), ("sm_90", None), ("sm_80", "int8"), ("sm_90", "int8"), ("sm_90", "fp8")]
)
@torch.inference_mode()
def test_the_engine_launches_nothing_that_is_not_recorded(arch, method) -> None:
    config = load_config(chat_config(llm={"max_position_embeddings": 512}))
    recorded = set(
        record_launches(
            config, dispatch.REPRESENTATIVE[arch], torch.bfloat16, quantization=QuantizationConfig(method, method)
        )
    )
    model = InternVLModel(config).to(torch.bfloat16).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_()
    if method is not None:
        with dispatch.simulate(dispatch.REPRESENTATIVE[arch], []):
            quantize_model(model, method, method)
    runner = Runner(model, max_num_seqs=64, max_model_len=512, enforce_eager=True)
    launches: list[Launch] = []
    with dispatch.simulate(dispatch.REPRESENTATIVE[arch], launches):
        runner.allocate(64, keep=False)
        tiles = torch.zeros(3, config.tile_size, config.tile_size, 3, dtype=torch.uint8)
        visual_tokens = runner.encode(tiles).flatten(0, 1)
        inv_freq = inverse_frequencies(config.llm)
        prompt = [1, *[7] * len(visual_tokens), *range(20, 40)]
        runner.prefill(prompt, visual_tokens, 7, inv_freq, list(range(8)))
        for size in (1, 3, 16, 33):
            tables = [[row % 8, 9] for row in range(size)]
            logits = runner.decode([5] * size, [70 + row for row in range(size)], inv_freq.expand(size, -1), tables)
            greedy_tokens(logits)
            _draw(logits, [SamplingState(GenerationConfig(temperature=0.5))] * size)
    assert {launch.name for launch in launches} >= {
        "_norm_kernel",
        "_paged_decode_kernel",
        "_greedy_kernel",
        "_sample_kernel",
    }
    missing = {launch.key for launch in launches} - {launch.key for launch in recorded}
    assert missing == set()


def test_the_users_own_table_is_recorded_where_that_is_wanted(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = replace(dispatch.H200, name="a GPU that was tuned")
    blocks = {
        "implementation": "pipelined",
        "BLOCK_M": 32,
        "BLOCK_N": 32,
        "BLOCK_K": 32,
        "num_warps": 2,
        "num_stages": 5,
    }
    row = {"shape": {"m": 1, "n": 512, "k": 256}, "choice": blocks}
    dispatch.user_table(target).parent.mkdir(parents=True)
    dispatch.user_table(target).write_text(json.dumps({"operations": {"linear_swiglu": [row]}}))
    stages = [
        {launch.num_stages for launch in record_launches(find_config("nano"), target, torch.bfloat16, tuned=tuned)}
        for tuned in (False, True)
    ]
    assert [5 in found for found in stages] == [False, True]
