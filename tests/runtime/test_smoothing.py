"""Folding of scales: the model stays what it is, and rounding costs less."""

import pytest
import torch

from vitrail.kernels.quantize import LARGEST, quantize_columns_reference
from vitrail.runtime.calibration import InputStatistics
from vitrail.runtime.layers.rotary import inverse_frequencies
from vitrail.runtime.quantization.methods import quantize_weight
from vitrail.runtime.smoothing import HEADROOM, Fold, clipped, folds_of, output_error, search, search_static

from ..random_checkpoints import ARCHITECTURES, INTERNVIT_300M, build, chat_config, random_tiles, random_weights


def outputs(model):
    """Visual tokens, and hidden states of the language half."""
    visual = model.encode_tiles(random_tiles(2, model.config.tile_size))
    tokens = torch.arange(20)[None]
    inv_freq = inverse_frequencies(model.config.llm, 20)
    return visual, model.language_model(model.language_model.embed(tokens), tokens, inv_freq)


def fold_everything(model, dtype) -> int:
    generator = torch.Generator().manual_seed(1)
    folded = 0
    for block in [*model.vision_model.encoder.layers, *model.language_model.layers]:
        for fold in folds_of(block):
            groups, _, size = fold.heads
            scales = torch.empty(groups * size).uniform_(-2, 2, generator=generator).exp()
            fold.apply(block, scales, dtype)
            folded += 1
    return folded


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_without_rounding_changes_no_output(architecture) -> None:
    vision = INTERNVIT_300M if architecture == "Qwen2ForCausalLM" else {}
    config = chat_config(architecture, vision)
    weights = random_weights(config)
    before = outputs(build(config, weights))
    model = build(config, weights)
    untouched = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert fold_everything(model, torch.float32) == 3 * 3 + 3 * 4
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, untouched[name])]
    assert sum(name.endswith("weight") for name in changed) == 3 * 5 + 3 * 6
    for expected, got in zip(before, outputs(model), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


def test_norms_that_are_rounded_to_bf16_are_made_up_for_by_the_columns() -> None:
    config = chat_config()
    weights = random_weights(config)
    before = outputs(build(config, weights))
    model = build(config, weights)
    fold_everything(model, torch.bfloat16)
    norm = model.language_model.layers[1].mlp_norm.weight
    assert torch.equal(norm, norm.bfloat16().float())
    for expected, got in zip(before, outputs(model), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


def test_a_norm_weight_of_zero_stays_zero() -> None:
    model = build(chat_config(), random_weights(chat_config()))
    layer = model.language_model.layers[0]
    layer.attention_norm.weight[3] = 0.0
    columns = folds_of(layer)[0].apply(layer, torch.full((64,), 2.0), torch.float32)
    assert layer.attention_norm.weight[3] == 0
    assert columns[3] == 1
    assert (columns[:3] == 2).all()


def test_heads_that_share_values_share_scales() -> None:
    fold = Fold("attention.o", "attention.qkv", (2, 3, 4))
    values = torch.arange(24.0)
    shared = fold.reduce(values)
    assert shared.tolist() == [8.0, 9.0, 10.0, 11.0, 20.0, 21.0, 22.0, 23.0]
    assert fold.expand(shared).view(2, 3, 4)[:, 0].flatten().tolist() == shared.tolist()
    assert torch.equal(fold.reduce(fold.expand(shared)), shared)


def with_outliers(factor: float, method: str):
    """Inputs with channels that stick out, the weight whose columns make up for it, and their statistics."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 64, generator=generator), torch.randn(48, 64, generator=generator)
    x[:, ::16] *= factor
    weight[:, ::16] /= factor
    statistics = InputStatistics(len(x))
    statistics.update(x)

    def quantise(part):
        return quantize_weight(part, method, group_size=16)

    return x, weight, statistics, quantise


FOLD = Fold("mlp.fc1", "norm2", (1, 1, 64))


def test_outliers_break_plain_int8_and_not_the_folded_one() -> None:
    x, weight, statistics, quantise = with_outliers(300.0, "int8")
    found = search(FOLD, weight, statistics, "int8", quantise)
    assert output_error(x, weight, quantise, "int8") > 0.3
    assert found.alpha is not None
    assert output_error(x, weight, quantise, "int8", found.scales) < 0.02


def test_int4_gives_a_finer_grid_to_what_large_inputs_meet() -> None:
    x, weight, statistics, quantise = with_outliers(1.0, "int4")
    x[:, ::16] *= 30
    statistics = InputStatistics(len(x))
    statistics.update(x)
    found = search(FOLD, weight, statistics, "int4", quantise)
    plain = output_error(x, weight, quantise, "int4")
    assert found.alpha is not None
    assert output_error(x, weight, quantise, "int4", found.scales) < 0.7 * plain


@pytest.mark.parametrize(("method", "dtype"), [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)])
def test_scales_known_beforehand_cut_nothing_off_and_follow_channels_where_that_helps(method, dtype) -> None:
    x, weight, statistics, quantise = with_outliers(300.0, method)
    found = search_static(weight, statistics, method, quantise)
    codes = quantize_columns_reference(x, found.scales, dtype).codes.float().abs()
    largest = LARGEST[dtype] / HEADROOM[dtype]
    assert codes.max() == pytest.approx(largest, rel=0.07)
    assert (x / found.scales).abs().max() <= largest * 1.0001
    exact = x @ weight.T
    rounded = quantise(weight * found.scales).dequantize()
    near = quantize_columns_reference(x, found.scales, dtype).dequantize() @ rounded.T
    assert found.error == pytest.approx(float((near - exact).norm() / exact.norm()), rel=1e-3)
    assert found.error < 0.05
    if method == "int8":  # one scale for all would leave nothing of the other channels; e4m3 has an exponent for each
        assert found.alpha > 0
        assert output_error(x, weight, quantise, method) > 0.3
    x[:, 5] = 0
    statistics.largest[5] = 0
    assert (search_static(weight, statistics, method, quantise).scales > 0).all()


def test_where_nothing_is_rounded_there_is_no_scale() -> None:
    _, weight, statistics, _ = with_outliers(30.0, "int4")

    class Exact:
        def __init__(self, weight):
            self.weight = weight

        def dequantize(self):
            return self.weight

    found = search(FOLD, weight, statistics, "int4", Exact)
    assert found.alpha is None
    assert (found.scales == 1).all()


def test_silent_channels_and_columns_without_weight_are_left_alone() -> None:
    x, weight, _, quantise = with_outliers(300.0, "int8")
    x[:, 5] = 0
    weight[:, 7] = 0
    statistics = InputStatistics(len(x))
    statistics.update(x)
    found = search(FOLD, weight, statistics, "int8", quantise)
    assert found.scales[[5, 7]].tolist() == [1.0, 1.0]
    assert found.scales.isfinite().all()


def test_clipping_loses_less_on_its_inputs_and_never_more() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 64, generator=generator), torch.randn(48, 64, generator=generator)
    weight[:, ::16] *= 3  # a group's range is taken up by one weight

    def quantise(part):
        return quantize_weight(part, "int4", group_size=16)

    kept = clipped(weight, x, 16, quantise)
    assert not torch.equal(kept, weight)
    assert (kept.abs() <= weight.abs()).all()
    by_group = lambda w: (  # noqa: E731
        ((quantise(w).dequantize() - weight).view(48, 4, 16).transpose(0, 1) @ x.view(256, 4, 16).permute(1, 2, 0))
        .square()
        .sum(-1)
    )
    assert (by_group(kept) <= by_group(weight) * (1 + 1e-4)).all()
    assert output_error(x, kept, quantise, "int4", reference=weight) < output_error(x, weight, quantise, "int4")
