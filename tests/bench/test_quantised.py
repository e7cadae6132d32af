"""The benchmark of quantised models: its contenders run one model, and its GPU cases launch without a GPU."""

from dataclasses import replace

import pytest
import torch

from vitrail.bench import quantised
from vitrail.bench.harness import Timing
from vitrail.bench.llama_peer import llama_tensors
from vitrail.bench.models import INTERNVL2_5_1B, INTERNVL_CHAT_V1_5, language_only, random_model, vision_only
from vitrail.bench.onnx_peer import PACKAGES, OnnxPeer
from vitrail.kernels import dispatch

BOTH = pytest.mark.parametrize("target", [dispatch.A100, dispatch.H200], ids=lambda target: target.arch)


@pytest.fixture(scope="module")
def tiny():
    """Qwen2-0.5B's shape with two narrow layers and few tokens."""
    config = language_only(INTERNVL2_5_1B)
    return replace(
        config,
        llm=replace(
            config.llm,
            num_hidden_layers=2,
            vocab_size=512,
            hidden_size=128,
            num_attention_heads=2,
            intermediate_size=256,
        ),
    )


def test_all_runtimes_on_a_cpu_run_one_model_and_are_measured(tiny, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(quantised, "INTERNVL2_5_1B", tiny)
    monkeypatch.setattr(quantised, "language_only", lambda config: config)
    monkeypatch.setattr(quantised, "PACKAGES", ("no_such_package",))  # its export takes long, and has a test of its own
    monkeypatch.setattr(quantised, "CPU_MARKS", {"vitrail int8": 0.0, "vitrail int4": 1e9})
    assert quantised.main(["--device", "cpu", "--context", "20", "--repeats", "1", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    for name in (
        "vitrail fp32",
        "vitrail bf16",
        "vitrail int8",
        "vitrail int4",
        "transformers fp32",
        "transformers bf16",
    ):
        assert said.out.count(name) >= 2
    assert "onnxruntime int8" not in said.out
    assert "onnxruntime (no_such_package)" in (tmp_path / "quantised.json").read_text()
    assert "vitrail int4: decode is" in said.err
    assert "int8: decode" not in said.err


@torch.inference_mode()
def test_a_runtime_of_another_model_is_found(tiny) -> None:
    logits = torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    alike = {quantised.BASELINE: lambda: logits, "near": lambda: logits + 0.1}
    quantised.check_alike(alike)
    with pytest.raises(RuntimeError, match="far runs another model"):
        quantised.check_alike({**alike, "far": lambda: logits.roll(1)})


@pytest.mark.slow(smoke=False)
@torch.inference_mode()
def test_onnxruntime_runs_the_prompt_and_one_more_token(tiny, tmp_path) -> None:
    for package in PACKAGES:
        pytest.importorskip(package)
    config = replace(tiny, llm=replace(tiny.llm, num_hidden_layers=1))
    model, tokens = random_model(config, torch.float32), torch.arange(19) % 7
    onnx = OnnxPeer(quantised.transformers_model(model, image_token_id=0), tokens, tmp_path)
    sequence = quantised.Sequence1(model.language_model, 19)
    for ours, theirs in ((sequence.prefill(tokens), onnx.prefill()), (sequence.decode(tokens[:1]), onnx.decode())):
        assert torch.cosine_similarity(ours, theirs).item() > 0.99
    assert not list(tmp_path.rglob("plain*"))


@torch.inference_mode()
def test_one_more_token_sees_the_prompt_before_it(tiny) -> None:
    decoder = random_model(tiny, torch.float32).language_model
    tokens = torch.arange(20)
    sequence, whole = quantised.Sequence1(decoder, 19), quantised.Sequence1(decoder, 20)
    sequence.prefill(tokens[:19])
    torch.testing.assert_close(sequence.decode(tokens[19:]), whole.prefill(tokens))


def test_llama_cpp_is_given_every_weight_once(tiny) -> None:
    decoder = random_model(tiny, torch.float32).language_model
    tensors = llama_tensors(decoder)
    assert len(tensors) == 3 + 2 * 12
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in decoder.parameters())
    attention = decoder.layers[1].attention
    parts = torch.cat([tensors[f"blk.1.attn_{letter}.weight"] for letter in "qkv"])
    assert torch.equal(parts, attention.qkv.weight)
    assert torch.equal(tensors["blk.1.ffn_up.weight"], decoder.layers[1].mlp.gate_up.weight.chunk(2)[1])


def test_a_token_reads_the_bytes_of_the_published_roof() -> None:
    config = language_only(INTERNVL_CHAT_V1_5)
    with torch.device("meta"):
        model = quantised.InternVLModel(config)
    # 2.67 and 9.07 ms at 4.3 TB/s, the bf16 roof with another 1.14 GB of embedding that is not read.
    assert quantised.decode_bytes(model, 2047, config.llm, 4.25) == pytest.approx(2.67e-3 * 4.3e12, rel=0.01)
    assert quantised.decode_bytes(model, 2047, config.llm, 16) == pytest.approx(9.07e-3 * 4.3e12, rel=0.01)


@BOTH
@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_the_quantised_vision_case_launches_its_kernels(target, method) -> None:
    if (method, target.arch) == ("fp8", "sm_80"):
        pytest.skip("an A100 has no fp8")
    config = vision_only(INTERNVL_CHAT_V1_5)
    config = replace(config, vision=replace(config.vision, num_hidden_layers=2))
    with dispatch.simulate(target, launches := []):
        model = quantised.random_quantised(config, "meta", vision=method)
        assert model.vision_model.encoder.layers[0].mlp.fc2.weight.is_packed
        tiles = torch.empty(7, 448, 448, 3, dtype=torch.uint8, device="meta")
        assert quantised.vision_case(model, tiles)().shape == (7, 256, 6144)
    assert len(launches) > 2 * 4


@pytest.mark.parametrize("method", ["int8", "fp8"])
@torch.inference_mode()
def test_the_vision_half_is_rounded_with_scales_of_what_was_seen(tiny, method) -> None:
    vision = replace(tiny.vision, num_hidden_layers=2, hidden_size=64, num_attention_heads=2, intermediate_size=128)
    config = replace(tiny, vision=replace(vision, image_size=56), tile_size=56)
    tiles = torch.randint(0, 256, (2, 56, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model, plain = random_model(config, torch.float32), random_model(config, torch.float32)
    quantised.quantize_vision(model, method, tiles)
    for block in model.vision_model.encoder.layers:
        scales = block.mlp.fc2.weight.input_scales
        assert scales.unique().numel() == 1
        assert (block.mlp.fc1.next_scales is scales) == (method == "fp8")  # int8 of a CPU rounds its inputs itself
    both = [each.encode_tiles(tiles).flatten(0, 1) for each in (model, plain)]
    assert torch.cosine_similarity(*both, dim=-1).min() > 0.99


@BOTH
def test_the_int4_decode_case_launches_its_kernels(target) -> None:
    config = language_only(INTERNVL_CHAT_V1_5)
    config = replace(config, llm=replace(config.llm, num_hidden_layers=2))
    with dispatch.simulate(target, launches := []):
        model = quantised.random_quantised(config, "meta", llm="int4")
        assert quantised.decode_case(model, 2047)().shape == (1, 92553)
    assert len(launches) > 2 * 4


@pytest.mark.parametrize("method", ["int8", "int4", "fp8", "int8-weight"])
@torch.inference_mode()
def test_random_codes_make_a_model_with_finite_activations(tiny, method) -> None:
    model = quantised.random_quantised(tiny, "cpu", llm=method)
    logits = quantised.Sequence1(model.language_model, 8).prefill(torch.arange(8))
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_marks_that_are_missed_are_named() -> None:
    def timing(ms: float) -> Timing:
        return Timing(ms, ms, ms, 1)

    decode = {quantised.BASELINE: timing(10), "vitrail int8": timing(3), "vitrail int4": timing(3)}
    rows = quantised.cpu_rows(decode, decode, 20)
    assert [row["tokens_per_s"] for row in rows[:1]] == [2000.0]
    assert quantised.cpu_missed(rows) == ["vitrail int4: decode is 3.33 times transformers fp32, the mark is 4.0"]
