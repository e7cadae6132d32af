"""The benchmark of quantised models: its contenders run one model, and its GPU cases launch without a GPU."""

from dataclasses import replace

import pytest
import torch

from vitrail.bench import quantised
from vitrail.bench.harness import Timing
from vitrail.bench.models import INTERNVL2_5_1B, INTERNVL_CHAT_V1_5, language_only, random_model, vision_only
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
    assert "vitrail int4: decode is" in said.err
    assert "int8: decode" not in said.err


@torch.inference_mode()
def test_a_runtime_of_another_model_is_found(tiny) -> None:
    logits = torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    alike = {quantised.BASELINE: lambda: logits, "near": lambda: logits + 0.1}
    quantised.check_alike(alike)
    with pytest.raises(RuntimeError, match="far runs another model"):
        quantised.check_alike({**alike, "far": lambda: logits.roll(1)})


@torch.inference_mode()
def test_one_more_token_sees_the_prompt_before_it(tiny) -> None:
    decoder = random_model(tiny, torch.float32).language_model
    tokens = torch.arange(20)
    sequence, whole = quantised.Sequence1(decoder, 19), quantised.Sequence1(decoder, 20)
    sequence.prefill(tokens[:19])
    torch.testing.assert_close(sequence.decode(tokens[19:]), whole.prefill(tokens))


def test_llama_cpp_is_given_every_weight_once(tiny) -> None:
    decoder = random_model(tiny, torch.float32).language_model
    tensors = quantised.llama_tensors(decoder)
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
