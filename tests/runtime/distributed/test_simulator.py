"""The simulator in simulated time: order, conservation of work, queueing theory where it is exact, equal seeds."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.runtime.distributed.costs import Roofline, TensorParallel
from vitrail.runtime.distributed.gpus import find_gpu
from vitrail.runtime.distributed.planner import ENCODER_BATCH, ENCODER_DEPTH, Placement, Planner
from vitrail.runtime.distributed.simulator import (
    Arrival,
    Deployment,
    Group,
    arrival,
    arrivals,
    groups_of,
    reduced,
    simulated_capacity,
    simulated_load,
)
from vitrail.runtime.distributed.sizes import ModelSizes
from vitrail.runtime.distributed.vision_pool import DEPTH, TILES_PER_JOB
from vitrail.runtime.distributed.workload import Kind, Workload, workload_of
from vitrail.runtime.engine.block_manager import BlockManager
from vitrail.runtime.engine.scheduler import Scheduler
from vitrail.runtime.kernel_pack import GEOMETRIES
from vitrail.runtime.quantization.config import QuantizationConfig

V15 = GEOMETRIES["InternVL-Chat-V1-5"]
USUAL = Kind(7, 64, 256)
GPU, BF16 = find_gpu("a100-80gb"), QuantizationConfig()
SIZES = ModelSizes.of(V15)


@dataclass(frozen=True)
class Flat:
    """Costs that can be added up by hand: 5 ms a tile, 0.1 ms a prompt token, 10 ms a decode step, 1 ms beside."""

    tile: float = 5.0
    token: float = 0.1
    step: float = 10.0
    beside: float = 1.0
    wake: float = 0.0

    def vision_ms(self, tiles):
        return self.tile * tiles

    def prefill_ms(self, tokens, pairs, prompts=1):
        return self.token * tokens

    def decode_ms(self, rows, tokens):
        return self.step

    def beside_ms(self, rows, tokens, prompt):
        return self.beside * bool(rows)

    def wake_ms(self, tiles):
        return self.wake * (1 + tiles)


def group(costs=None, rows=8, num_blocks=200, tiles_in_flight=None):
    scheduler: Scheduler[Arrival] = Scheduler(
        BlockManager(num_blocks, 64),
        max_num_seqs=rows,
        enable_prefix_caching=False,
        tiles_in_flight=tiles_in_flight,
    )
    return Group(scheduler, costs or Flat())


def run(requests, *groups, encoders=0, costs=None):
    return Deployment(groups, encoders=encoders, encoder_costs=costs or Flat()).run(requests)


def test_one_request_takes_what_its_stages_take() -> None:
    one = arrival(0, Kind(3, 44, 5), 256, came=100.0)
    done = run([one], group())
    first = 100 + 3 * 5 + 0.1 * (3 * 256 + 44)
    assert one.times == pytest.approx([first + 10 * n for n in range(5)])
    assert done.requests_per_s == pytest.approx(1e3 / one.times[-1])
    assert done.busy == pytest.approx(1 - 100 / one.times[-1])


def test_a_step_after_a_wait_takes_longer_and_those_who_come_together_share_it() -> None:
    requests = [arrival(number, Kind(0, 40, 2), 256, came=came) for number, came in enumerate((5.0, 5.0, 900.0))]
    requests.append(arrival(3, Kind(2, 40, 2), 100, came=2000.0))
    run(requests, group(Flat(wake=3.0)))
    assert requests[0].times == requests[1].times == pytest.approx([5 + 3 + 8, 5 + 3 + 8 + 10])
    assert requests[2].times == pytest.approx([900 + 3 + 4, 900 + 3 + 4 + 10])
    assert requests[3].times == pytest.approx([2000 + 9 + 10 + 24, 2000 + 9 + 10 + 24 + 10])
    text, picture = arrival(0, Kind(0, 40, 2), 100, came=0.0), arrival(1, Kind(2, 40, 2), 100, came=0.0)
    run([text, picture], group(Flat(wake=3.0), tiles_in_flight=4), encoders=1)
    assert text.times[0] == pytest.approx(3 + 4)  # the tiles are an encoder's


def test_answers_go_on_beside_a_prompt_and_wait_no_longer_than_a_bounded_step() -> None:
    early, late = arrival(0, Kind(0, 10, 200), 256, 0.0), arrival(1, Kind(4, 100, 2), 256, 50.0)
    run([early, late], group())
    gaps = [b - a for a, b in zip(early.times, early.times[1:], strict=False)]
    assert max(gaps) <= 10 + max(2 * 5 + 10, 51.2 + 1)
    assert sum(gap > 10.01 for gap in gaps) == 5  # two steps of two tiles, and prompts of 512, 512 and 100 tokens
    assert len(early.times) == 200 and len(late.times) == 2


def test_encoders_share_the_tiles_of_an_image_and_the_prompt_begins_with_what_is_there() -> None:
    one = arrival(0, Kind(7, 44, 1), 256, came=0.0)
    run([one], group(tiles_in_flight=16), encoders=2)
    # Four tiles on one, the first, which take 20 ms, and three on the other.
    assert one.times == pytest.approx([4 * 5 + 0.1 * (7 * 256 + 44)])
    many = arrival(0, Kind(10, 44, 1), 256, came=0.0)
    run([many], group(tiles_in_flight=16), encoders=1)
    # The prompt of eight tiles runs while the others are encoded; the rest follows it.
    assert many.times == pytest.approx([8 * 5 + 0.1 * 8 * 256 + 0.1 * (2 * 256 + 44)])


def test_tiles_wait_in_order_and_text_does_not_wait_for_encoders() -> None:
    pictures = [arrival(number, Kind(8, 4, 1), 16, came=0.0) for number in range(4)]
    text = arrival(4, Kind(0, 100, 1), 16, came=1.0)
    run([*pictures, text], group(Flat(token=0.001), tiles_in_flight=64), encoders=1)
    assert text.times[0] < 2
    ready = [one.times[0] for one in pictures]
    assert [round(time / 40) for time in ready] == [1, 2, 3, 4]


def test_no_more_tiles_are_on_their_way_than_may_be() -> None:
    pictures = [arrival(number, Kind(8, 4, 1), 16, came=0.0) for number in range(2)]
    one = group(Flat(token=0.001), tiles_in_flight=2)
    most = []
    schedule = one.scheduler.schedule

    def watched():
        batch = schedule()
        most.append(one.scheduler.num_in_flight)
        return batch

    one.scheduler.schedule = watched
    run(pictures, one, encoders=4)
    assert max(most) == 2
    assert pictures[1].times[0] == pytest.approx(8 * 5, rel=0.01)  # sixteen tiles, two at a time


def test_encoders_and_schedulers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 encoders need costs"):
        Deployment([group(tiles_in_flight=4)], encoders=2)
    for one, encoders in ((group(), 2), (group(tiles_in_flight=4), 0)):
        with pytest.raises(ValueError, match=f"schedulers that send tiles need encoders.*{encoders} encoders"):
            Deployment([one], encoders=encoders, encoder_costs=Flat())


def test_encoders_take_tiles_as_the_workers_do() -> None:
    assert (ENCODER_BATCH, ENCODER_DEPTH) == (TILES_PER_JOB, DEPTH)


def test_a_request_goes_to_the_group_that_has_fewest() -> None:
    groups = [group() for _ in range(3)]
    requests = [arrival(number, Kind(0, 64, 50), 256, came=0.1 * number) for number in range(6)]
    run(requests, *groups)
    assert len({one.times[-1] for one in requests}) > 1
    assert [one.unfinished for one in groups] == [0, 0, 0]
    assert len({round(one.busy_ms) for one in groups}) == 1  # two each


def test_a_queue_with_service_of_one_length_waits_as_theory_says() -> None:
    # Requests of one token: each alone in a step of 40 ms, since a second does not fit beside it. M/D/1 at 60 % load
    # waits 40 * 0.6 / (2 * 0.4) = 30 ms on average.
    work = Workload((Kind(0, 400, 1),), 256)
    requests = arrivals(work, 20_000, rate=0.6 / 0.040, seed=3)
    done = run(requests, group(rows=1))
    assert done.busy == pytest.approx(0.6, rel=0.03)
    assert done.ttft_ms() == pytest.approx(40 + 30, rel=0.06)


def test_rows_rate_and_time_obey_littles_law() -> None:
    # Half of what 16 rows could do: rows * (10 ms a token) gives 50 tokens' time for 5 tokens' answers ...
    work = Workload((Kind(0, 64, 40),), 256)
    requests = arrivals(work, 2000, rate=20.0, seed=5)
    done = run(requests, group(Flat(token=0.001, beside=10.0), rows=64))
    lengths = [one.times[-1] - one.came for one in requests]
    events = sorted([(one.came, 1) for one in requests] + [(one.times[-1], -1) for one in requests])
    area = inside = last = 0.0
    for time, change in events:
        area += inside * (time - last)
        inside, last = inside + change, time
    assert area / last == pytest.approx(done.requests_per_s * sum(lengths) / len(lengths) / 1e3, rel=1e-6)
    assert sum(lengths) / len(lengths) == pytest.approx(40 * 10, rel=0.03)


kinds = st.builds(Kind, st.integers(0, 9), st.integers(1, 300), st.integers(1, 40), st.floats(0.1, 3))


@given(
    kinds=st.lists(kinds, min_size=1, max_size=3),
    rate=st.one_of(st.none(), st.floats(0.5, 50)),
    rows=st.integers(1, 9),
    shape=st.sampled_from([(1, 0), (2, 0), (1, 1), (2, 3)]),
    num_blocks=st.integers(45, 90),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_every_request_is_served_once_in_order_and_no_time_is_lost(kinds, rate, rows, shape, num_blocks, seed) -> None:
    number, (count, encoders) = 25, shape
    work = Workload(tuple(kinds), 256)
    runs = []
    for _ in range(2):
        requests = arrivals(work, number, rate=rate, seed=seed)
        in_flight = 4 * encoders or None
        groups = [group(rows=rows, num_blocks=num_blocks, tiles_in_flight=in_flight) for _ in range(count)]
        deployment = Deployment(groups, encoders=encoders, encoder_costs=Flat())
        done = deployment.run(requests)
        for one in requests:
            assert len(one.times) == one.answer == len(one.sequences[0].token_ids)
            assert one.came < one.times[0] and one.times == sorted(one.times)
            assert all(image.num_encoded == image.num_tiles for image in one.images)
        for one in groups:
            one.scheduler.check_integrity()
            assert not one.scheduler and one.unfinished == 0 and one.scheduler.blocks.num_used == 0
            assert one.scheduler.num_in_flight == 0
        assert deployment.idle_encoders == encoders
        assert math.isclose(done.seconds * 1e3, max(one.times[-1] for one in requests))
        assert 0 < done.busy <= 1 + 1e-9
        if rate is None and count == 1 and not encoders:
            assert done.busy == pytest.approx(1)  # nobody waits while there is work
            if not done.preempted:
                first = [one.times[0] for one in requests]
                assert first == sorted(first)
        runs.append([one.times for one in requests])
    assert runs[0] == runs[1]


def test_other_seeds_are_other_arrivals_of_the_same_rate() -> None:
    work = Workload((Kind(1, 10, 10, 1), Kind(0, 20, 5, 3)), 256)
    first, second = (arrivals(work, 4000, rate=5.0, seed=seed) for seed in (0, 1))
    assert [one.came for one in first] != [one.came for one in second]
    for requests in (first, second):
        assert 4000 / requests[-1].came * 1e3 == pytest.approx(5, rel=0.05)
        assert sum(len(one.images) for one in requests) == pytest.approx(1000, rel=0.1)
    assert {one.came for one in arrivals(work, 5, rate=None)} == {0.0}


def planner(kinds=(USUAL,), quantization=BF16):
    costs = Roofline(SIZES, GPU, quantization)
    return Planner(SIZES, GPU, quantization, costs, workload_of(V15, kinds))


def test_groups_have_the_memory_and_the_rows_of_the_prediction() -> None:
    plan = planner()
    found = plan.predict(Placement(4, 2))
    groups = groups_of(plan, found)
    assert len(groups) == 2
    assert all(isinstance(one.costs, TensorParallel) for one in groups)
    assert groups[0].scheduler.max_num_seqs == found.rows
    assert groups[0].scheduler.blocks.num_blocks * 64 <= plan.kv_tokens(found.placement, found.memory)
    assert (groups[0].scheduler.chunk_tokens, groups[0].scheduler.tiles_in_flight) == (1024, None)
    split = groups_of(plan, plan.predict(Placement(8, 2, 4)))
    assert [one.scheduler.tiles_in_flight for one in split] == [64, 64]  # four encoders, sixteen each


@pytest.mark.parametrize(
    ("whole", "least", "part", "parts"),
    [
        (Placement(8), 1, Placement(1), 8),
        (Placement(8), 4, Placement(4), 2),
        (Placement(7), 4, Placement(7), 1),
        (Placement(2), 4, Placement(2), 1),
        (Placement(32, 2), 4, Placement(8, 2), 4),
        (Placement(14, 1, 6), 1, Placement(7, 1, 3), 2),
        (Placement(16, 2, 8), 1, Placement(4, 2, 2), 4),
    ],
)
def test_a_deployment_is_reduced_in_proportion(whole, least, part, parts) -> None:
    found, count = reduced(planner().predict(whole), least)
    assert (found.placement, count) == (part, parts)


@pytest.mark.parametrize(
    ("placement", "quantization"),
    [
        (Placement(2), BF16),
        (Placement(2, 2), BF16),
        (Placement(2, 1, 1), BF16),
        (Placement(1), QuantizationConfig("int8", "int8")),
        (Placement(1), QuantizationConfig("int4", "int8")),
    ],
)
def test_the_formula_is_near_what_the_scheduler_does(placement, quantization) -> None:
    plan = planner(quantization=quantization)
    found = plan.predict(placement)
    assert simulated_capacity(plan, found) == pytest.approx(found.requests_per_s, rel=0.05)


def test_predicted_latencies_are_near_what_the_scheduler_does() -> None:
    plan = planner()
    rate = 0.5 * plan.predict(Placement(1)).requests_per_s
    loaded = Planner(SIZES, GPU, BF16, plan.costs, workload_of(V15, [USUAL], rate))
    found = loaded.predict(Placement(1))
    done = simulated_load(loaded, found, rate)
    assert done.ttft_ms() == pytest.approx(found.ttft_ms, rel=0.15)
    assert done.itl_ms() == pytest.approx(found.itl_ms, rel=0.1)
    assert done.itl_ms(99) <= found.itl_bound_ms * 1.05
    assert done.ttft_ms(99) > done.ttft_ms(50)
