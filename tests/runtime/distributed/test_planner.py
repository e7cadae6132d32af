"""The planner: the placement model's table, memory, what does not fit, and how many GPUs would do."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from vitrail.runtime.distributed.costs import Roofline
from vitrail.runtime.distributed.gpus import find_gpu
from vitrail.runtime.distributed.planner import Placement, Planner, gpus_needed
from vitrail.runtime.distributed.sizes import ModelSizes
from vitrail.runtime.distributed.workload import Kind, workload_of
from vitrail.runtime.errors import CapacityError
from vitrail.runtime.kernel_pack import GEOMETRIES
from vitrail.runtime.quantization.config import QuantizationConfig

V15 = GEOMETRIES["InternVL-Chat-V1-5"]
USUAL = Kind(7, 64, 256)
SIZES = ModelSizes.of(V15)
BF16, INT8, INT4 = QuantizationConfig(), QuantizationConfig("int8", "int8"), QuantizationConfig("int4", "int8")


def planner(quantization=BF16, gpu="a100-80gb", kinds=(USUAL,), rate=None, **options):
    row = find_gpu(gpu)
    work = workload_of(V15, kinds, rate)
    few_rows = options.pop("few_rows", None)
    costs = Roofline(SIZES, row, quantization, **({} if few_rows is None else {"few_rows": few_rows}))
    return Planner(SIZES, row, quantization, costs, work, **options)


def unbounded(quantization):
    """As the placement model has it: prompts whole, nothing of them in a step of others, 92 % of memory."""
    return planner(quantization, gpu_memory_utilization=0.92, chunk_tokens=None, few_rows=math.inf)


# Requests a second on so many A100-80GB: colocated, best split, tensor parallel over two (placement model, section 7).
PUBLISHED = {
    "bf16": {1: (1.21,), 2: (2.41, 2.29, 2.57), 3: (3.62, 2.89), 4: (4.83, 4.58, 5.15), 8: (9.66, 9.16, 10.30)},
    "int8": {1: (2.11,), 2: (4.22, 3.75, 4.06), 3: (6.34, 4.92), 4: (8.45, 7.50, 8.12), 8: (16.90, 15.01, 16.23)},
}


@pytest.mark.parametrize(("method", "quantization"), [("bf16", BF16), ("int8", INT8)])
def test_without_bounded_steps_the_placement_models_table_comes_out(method, quantization) -> None:
    plan = unbounded(quantization)
    for gpus, (colocated, *others) in PUBLISHED[method].items():
        assert plan.predict(Placement(gpus)).requests_per_s == pytest.approx(colocated, rel=0.005)
        if others:
            splits = [plan.predict(Placement(gpus, 1, encoders)).requests_per_s for encoders in range(1, gpus)]
            # Up to 0.8 % more: a GPU without a vision half needs no room for its activations.
            assert max(splits) == pytest.approx(others[0], rel=0.01)
        if len(others) > 1:
            assert plan.predict(Placement(gpus, 2)).requests_per_s == pytest.approx(others[1], rel=0.01)


def test_seven_gpus_in_bf16_are_split_by_the_placement_model() -> None:
    assert str(unbounded(BF16).predictions(7)[0].placement) == "split, 3 for vision, 4 for the LLM (4)"


def test_two_gpus_have_a_step_of_twice_the_tokens_and_room_for_twice_the_rows() -> None:
    # 3648 tokens' worth of tiles and prompt come in 7 steps, and 256 tokens of 36 rows too: more rows would find no
    # work. Two GPUs take them in half the steps, so that twice the rows ride along.
    plan = planner()
    one, two = plan.predict(Placement(2)), plan.predict(Placement(2, 2))
    assert (plan.budget(Placement(2)), plan.budget(Placement(2, 2))) == (512, 1024)
    assert one.batch == pytest.approx(256 / (3648 / 512), rel=1e-3)
    assert two.batch == pytest.approx(2 * one.batch)
    assert two.itl_bound_ms == pytest.approx(one.itl_bound_ms, rel=0.1)  # no token waits longer for it
    bounded = planner(chunk_tokens=256).predict(Placement(2, 2))  # 512 a step, as for one GPU
    assert bounded.batch == pytest.approx(one.batch)
    assert bounded.requests_per_s < 0.97 * two.requests_per_s
    # The GPUs still add up 96 times a step, and a tile more or less leaves one of them idle.
    assert 0.95 * one.requests_per_s < two.requests_per_s < one.requests_per_s


def test_memory_is_what_the_parts_take() -> None:
    plan = planner()
    alone = plan.memory(Placement(1))
    assert (alone.gpu_gb, alone.usable) == (80, 72)
    assert alone.vision_weights + alone.language_weights == pytest.approx(51.0, abs=0.05)
    assert alone.kv == pytest.approx(72 - 51.03 - alone.vision_peak - alone.overhead, abs=0.01)
    assert alone.one_request == pytest.approx(2112 * 196_608 / 1e9)
    two = plan.memory(Placement(2, 2))
    assert two.language_weights == pytest.approx(alone.language_weights / 2)
    assert two.vision_weights == alone.vision_weights
    encoder = plan.memory(Placement(2, 1, 1), encodes_only=True)
    assert (encoder.language_weights, encoder.one_request) == (0, 0)
    language = plan.memory(Placement(2, 1, 1))
    assert (language.vision_weights, language.vision_peak) == (0, 0)


def test_what_does_not_fit_is_named_with_what_would() -> None:
    with pytest.raises(CapacityError) as caught:
        planner(gpu="a100-40gb").check_fits(1)
    said = str(caught.value)
    assert "18.4 GB are short" in said
    assert "2 GPUs would do and --quantization int8 would fit" in said
    planner(gpu="a100-40gb").check_fits(2)
    planner(INT8, gpu="a100-40gb").check_fits(1)
    # On two GPUs the whole model does not fit on either: what is left has its language half on both, or alone.
    assert all(one.placement != Placement(2) for one in planner(gpu="a100-40gb").predictions(2))


def test_an_encoder_too_small_for_its_half_is_no_placement() -> None:
    tiny = replace(find_gpu("a100-40gb"), memory_gb=12)
    plan = replace(planner(), gpu=tiny)
    assert plan.predictions(8) == []
    with pytest.raises(CapacityError, match="GB are short"):
        plan.check_fits(8)


def test_what_is_short_on_an_encoder_is_said_of_the_encoder() -> None:
    plan = replace(planner(INT4), gpu=replace(find_gpu("a100-40gb"), memory_gb=20))
    plan.check_fits(2)  # 5.8 GB and activations on one, 12.2 GB on the other
    with pytest.raises(CapacityError, match="2 GPUs would do"):
        plan.check_fits(1)


def test_the_gpus_needed_are_the_fewest() -> None:
    plan = planner()
    enough = gpus_needed(plan, 20)
    assert enough is not None
    assert plan.predictions(enough)[0].requests_per_s > 20 >= plan.predictions(enough - 1)[0].requests_per_s
    assert gpus_needed(plan, 0.1) == 1
    assert gpus_needed(plan, 1e6) is None


def test_more_gpus_never_answer_less() -> None:
    plan = planner()
    best = [plan.predictions(count)[0].requests_per_s for count in range(1, 33)]
    assert best == sorted(best)


def test_heads_that_do_not_divide_are_not_spread() -> None:
    config = GEOMETRIES["InternVL2_5-1B"]  # two heads of keys and values
    sizes, gpu = ModelSizes.of(config), find_gpu("h200")
    plan = Planner(sizes, gpu, BF16, Roofline(sizes, gpu, BF16), workload_of(config, [Kind(1, 64, 64)]))
    assert {one.tensor_parallel for one in plan.placements(8)} == {1, 2}


def test_requests_without_images_have_no_encoders() -> None:
    plan = planner(kinds=(Kind(0, 512, 128),), rate=1.0)
    found = plan.predictions(4)
    assert {one.placement.kind for one in found} == {"replicas", "tensor parallel"}
    assert all(one.ttft_ms is not None and one.ttft_ms > 0 for one in found)


def test_latency_grows_with_the_rate_and_there_is_none_beyond_capacity() -> None:
    capacity = planner().predict(Placement(1)).requests_per_s
    found = [planner(rate=share * capacity).predict(Placement(1)) for share in (0.1, 0.5, 0.9, 1.01)]
    assert [one.ttft_ms is None for one in found] == [False, False, False, True]
    first, between = ([getattr(one, name) for one in found[:3]] for name in ("ttft_ms", "itl_ms"))
    assert first == sorted(first) and between == sorted(between)
    assert all(one.itl_ms < one.itl_bound_ms for one in found[:3])
    # The engine's document states this bound: a decode step, and two tiles or 512 tokens beside it.
    assert found[0].itl_bound_ms == pytest.approx(133, abs=5)


def test_the_fewest_rows_that_answer_as_much_are_chosen() -> None:
    found = planner(gpu="h200").predict(Placement(1))
    assert found.rows < 128  # room for 340, but prompts come in slower
    assert planner(gpu="h200", kinds=(Kind(0, 64, 1024),)).predict(Placement(1)).rows == 128


def test_the_table_of_the_document_is_what_the_planner_says() -> None:
    text = (Path(__file__).parents[3] / "docs" / "deployment.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| [1-8] \| [\d.]", line)]
    assert [int(row[0]) for row in rows] == list(range(1, 9))
    for column, quantization in ((2, BF16), (4, INT8), (6, INT4)):
        plan = planner(quantization)
        for row in rows:
            gpus = int(row[0])
            said = [plan.predict(Placement(gpus))]
            if gpus > 1:
                splits = [plan.predict(Placement(gpus, 1, encoders)) for encoders in range(1, gpus)]
                said.append(max(splits, key=lambda one: one.requests_per_s))
            if gpus % 2 == 0:
                said.append(plan.predict(Placement(gpus, 2)))
            assert row[column] == " / ".join(f"{one.requests_per_s:.2f}" for one in said)
