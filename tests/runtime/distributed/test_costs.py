"""Costs: the roofline is the placement model's, curves are straight between what was measured, tables are read."""

import json

import pytest

from vitrail.runtime.distributed.costs import (
    Curve,
    Measured,
    Roofline,
    TensorParallel,
    causal_pairs,
    read_measured,
)
from vitrail.runtime.distributed.gpus import GPUS, find_gpu
from vitrail.runtime.distributed.sizes import ModelSizes, check_methods
from vitrail.runtime.errors import ConfigError, UnsupportedError
from vitrail.runtime.kernel_pack import GEOMETRIES, find_config
from vitrail.runtime.quantization.config import QuantizationConfig
from vitrail.runtime.weights import expected_tensors

V15 = GEOMETRIES["InternVL-Chat-V1-5"]
SIZES = ModelSizes.of(V15)
BF16, INT8 = QuantizationConfig(), QuantizationConfig("int8", "int8")


def roofline(quantization=BF16, gpu="a100-80gb", **options):
    return Roofline(SIZES, find_gpu(gpu), quantization, **options)


@pytest.mark.parametrize("model", ["InternVL-Chat-V1-5", "InternVL2_5-8B", "nano"])
def test_sizes_are_those_of_the_tensors(model) -> None:
    config = find_config(model)
    sizes = ModelSizes.of(config)
    total = sizes.vision + sizes.language + sizes.projector + sizes.rest_of_vision + sizes.rest_of_language
    expected = sum(_product(shape) for shape in expected_tensors(config).values())
    assert total == expected
    assert sizes.vision_gb(BF16) + sizes.language_gb(BF16) == pytest.approx(2e-9 * expected)


def _product(shape):
    product = 1
    for size in shape:
        product *= size
    return product


def test_a_method_takes_the_projections_and_leaves_the_rest_in_16_bits() -> None:
    # The placement model's weights of the 20B: 39.7 GB, 21.0 in int8, 12.2 in int4; of the ViT 11.0 and 5.6.
    of = {method: SIZES.language_gb(QuantizationConfig(method)) for method in (None, "int8", "int4")}
    assert [round(of[method], 1) for method in (None, "int8", "int4")] == [39.7, 21.0, 12.2]
    assert SIZES.vision_gb(BF16) == pytest.approx(11.3, abs=0.05)  # with the projector
    assert SIZES.vision_gb(INT8) == pytest.approx(5.8, abs=0.05)


def test_stages_on_an_a100_cost_what_the_placement_model_says() -> None:
    costs = roofline()
    assert costs.vision_ms(7) == pytest.approx(344 + 1.8, rel=0.003)
    assert costs.prefill_ms(1856, causal_pairs(1856, 1856)) == pytest.approx(291, rel=0.003)
    assert costs.decode_ms(47, 47 * 1984) == pytest.approx(35.0, rel=0.003)
    eight = roofline(INT8)
    assert eight.vision_ms(7) == pytest.approx(201 + 1.8, rel=0.003)
    assert eight.prefill_ms(1856, causal_pairs(1856, 1856)) == pytest.approx(172, rel=0.003)
    assert eight.decode_ms(105, 105 * 1984) == pytest.approx(40.3, rel=0.003)


def test_rows_beside_a_prompt_do_not_read_the_weights_again() -> None:
    costs = roofline()
    alone, beside = costs.decode_ms(32, 32 * 2000), costs.beside_ms(32, 32 * 2000, 512)
    assert beside < alone - 15  # of 23 ms that the weights take
    chunk = costs.prefill_ms(512, causal_pairs(512, 512))
    assert chunk + beside < chunk + alone


def test_weights_of_four_bits_are_written_out_for_many_rows() -> None:
    costs = roofline(QuantizationConfig("int4"))
    few, many = costs.decode_ms(32, 0), costs.decode_ms(33, 0)
    assert few == pytest.approx(8.4, abs=0.1)
    assert many > few + 25  # 10 GB read, 37 written, and those read again
    assert roofline(QuantizationConfig("int4"), few_rows=64).decode_ms(33, 0) == pytest.approx(few)


def test_causal_pairs_add_up_over_the_chunks_of_a_prompt() -> None:
    chunks = [causal_pairs(min(512, 1856 - start), min(start + 512, 1856)) for start in range(0, 1856, 512)]
    assert sum(chunks) == causal_pairs(1856, 1856) == 1856**2 / 2


def test_two_gpus_halve_a_step_and_pay_for_adding_up() -> None:
    one, gpu = roofline(), find_gpu("a100-80gb")
    two = TensorParallel(one, SIZES, gpu, 2)
    assert two.decode_ms(47, 47 * 1984) == pytest.approx(one.decode_ms(47, 47 * 1984) / 2 + 96 * 0.012)
    # 1856 rows of 6144 numbers of 16 bits at 240 GB/s, 96 times
    added = 96 * 1856 * 6144 * 2 / 240e9 * 1e3
    assert two.prefill_ms(1856, 0) == pytest.approx(one.prefill_ms(1856, 0) / 2 + added)
    assert two.vision_ms(3) == one.vision_ms(2)  # whole tiles


def test_every_gpu_says_where_its_shares_come_from_and_is_faster_than_the_one_before() -> None:
    steps = {name: roofline(gpu=name).decode_ms(8, 8 * 2000) for name in GPUS}
    assert steps["a100-40gb"] > steps["a100-80gb"] > steps["h100"] > steps["h200"]
    assert steps["l40s"] > steps["a100-40gb"]
    assert all(gpu.shares.source for gpu in GPUS.values())


def test_what_a_gpu_has_no_kernels_for_is_refused() -> None:
    for gpu in ("a100-80gb", "l40s"):
        with pytest.raises(UnsupportedError, match=f"{gpu} has no kernels for fp8"):
            roofline(QuantizationConfig("fp8"), gpu)
    assert roofline(QuantizationConfig("fp8", "fp8"), "h200").vision_ms(1) < roofline(gpu="h200").vision_ms(1)
    with pytest.raises(UnsupportedError, match="what nf4 costs"):
        check_methods(QuantizationConfig("nf4"))


def test_an_unknown_gpu_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="--gpu b300: unknown; known: a100-40gb, a100-80gb, h100, h200, l40s"):
        find_gpu("b300")
    assert find_gpu("H200") is GPUS["h200"]


def test_a_curve_is_straight_between_its_points_and_goes_on_beyond_them() -> None:
    curve = Curve((1, 4, 8), (10, 13, 21))
    assert [curve(count) for count in (0.5, 1, 2, 4, 6, 8, 10)] == [10, 10, 11, 13, 17, 21, 25]
    assert [Curve((4,), (8,))(count) for count in (1, 4, 6)] == [8, 8, 12]
    assert [Curve((0, 4), (8, 16))(count) for count in (0, 1, 6)] == [8, 10, 20]


def table(**changes):
    rows = [
        *({"stage": "vision", "tiles": n, "ms": 10.0 * n} for n in (1, 4)),
        *({"stage": "prefill", "tokens": n, "ms": n / 10} for n in (64, 512)),
        {"stage": "prefill", "tokens": 1024, "prompts": 4, "ms": 100.0},
        *({"stage": "decode", "rows": n, "ms": 3.0 + n, "context": 100} for n in (1, 8)),
        *({"stage": "beside", "tokens": 64, "rows": n, "ms": 0.5 * n, "context": 100} for n in (1, 8)),
        *({"stage": "beside", "tokens": 512, "rows": n, "ms": 1.0 * n, "context": 100} for n in (1, 8)),
        {"stage": "kv", "ms": 0.01},
        {"stage": "pair", "ms": 1e-5},
        {"stage": "prompt", "ms": 2.0},
        *({"stage": "wake", "tiles": n, "ms": 7.0 + 2 * n} for n in (0, 4)),
    ]
    label = {"model": "tiny", "quantization": None, "vision_quantization": None}
    return {"rows": [{**label, **row, **changes} for row in rows]}


def test_a_table_of_measured_costs_is_read(tmp_path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(table()))
    costs = read_measured(file, "somebody/tiny", BF16)
    assert isinstance(costs, Measured)
    assert costs.vision_ms(2) == 20
    assert costs.prefill_ms(512, 512**2 / 2) == pytest.approx(51.2)
    assert costs.prefill_ms(512, 512**2 / 2 + 1e5) == pytest.approx(52.2)
    # Eight prompts of 64 tokens: an eighth of the pairs of one of 512, and seven times what a further one costs.
    pairs = 8 * 64**2 / 2
    assert costs.prefill_ms(512, pairs, 8) == pytest.approx(51.2 - (512**2 / 2 - pairs) * 1e-5 + 7 * 2)
    # A pass of four prompts of 256 was measured: 100 ms.
    assert costs.prefill_ms(1024, 4 * 256**2 / 2, 4) == pytest.approx(100)
    assert costs.decode_ms(4, 4 * 100) == 7
    assert costs.decode_ms(4, 4 * 150) == pytest.approx(9)
    assert [costs.beside_ms(8, 800, prompt) for prompt in (10, 64, 288, 512)] == [4, 4, 6, 8]
    assert costs.beside_ms(8, 900, 64) == pytest.approx(5)
    assert costs.beside_ms(0, 0, 512) == 0
    assert [costs.wake_ms(tiles) for tiles in (0, 2, 4, 40)] == [7, 11, 15, 15]
    assert TensorParallel(costs, SIZES, find_gpu("h200"), 2).wake_ms(3) == costs.wake_ms(2)
    assert read_measured(file, "other", BF16) is None
    assert read_measured(file, "tiny", INT8) is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not a table of costs"),
        ("[]", "not a table of costs"),
        ('{"rows": [{"stage": "vision"}]}', "not a table of costs"),
        (json.dumps({"rows": table()["rows"][2:]}), "no row of the stage vision"),
        (json.dumps({"rows": [row for row in table()["rows"] if row["stage"] != "kv"]}), "no row of the stage kv"),
        (json.dumps(table(ms="fast")), "not a table of costs"),
    ],
)
def test_a_table_that_cannot_be_followed_is_named(tmp_path, text, complaint) -> None:
    file = tmp_path / "costs.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"costs.json: {complaint}"):
        read_measured(file, "tiny", BF16)
    with pytest.raises(ConfigError, match="No such file"):
        read_measured(tmp_path / "none.json", "tiny", BF16)
