"""The sweep and its picture, and that engine and simulator serve the same requests."""

import time
import xml.etree.ElementTree as ET

import pytest

from vitrail.bench import scaling
from vitrail.runtime.api import Runtime
from vitrail.runtime.distributed.costs import Curve, Measured
from vitrail.runtime.distributed.simulator import arrival, arrivals
from vitrail.runtime.distributed.workload import Kind, workload_of


@pytest.fixture(scope="module")
def engine():
    options = {"enable_prefix_caching": False, "vision_cache_gb": 0, "max_num_seqs": 8}
    with Runtime.from_pretrained("nano", dtype="float32", device="cpu", **options) as runtime:
        yield runtime.engine


def test_a_sweep_has_a_row_for_each_kind_of_placement_and_a_picture_of_them(monkeypatch) -> None:
    monkeypatch.setattr(scaling, "simulated_capacity", lambda planner, one: 1.01 * one.requests_per_s)
    rows = list(scaling.sweep_rows("a100-80gb", [1, 2]))
    assert [(row["gpus"], row["kind"]) for row in rows if row["method"] == "bf16"] == [
        *((1, "replicas"), (2, "split"), (2, "replicas"), (2, "tensor parallel"))
    ]
    assert all(row["difference_percent"] == pytest.approx(1) for row in rows)
    picture = ET.fromstring(scaling.picture_of(rows, "Title"))
    assert len(picture.findall(".//{*}circle")) == len(rows)
    assert len(scaling.picture_of(rows[:1], "one count").splitlines()) > 10


def test_engine_and_simulator_serve_the_same_requests(engine) -> None:
    workload = workload_of(engine.config, [Kind(0, 20, 3), Kind(2, 10, 4)])
    real, simulated = (arrivals(workload, 6, rate=200.0, seed=1) for _ in range(2))
    scaling.serve(engine, real)
    flat = Curve((1,), (1.0,))
    scaling.simulate(engine, Measured(flat, flat, flat, {512: flat}, 64, 0.0, 0.0, 0.0, flat), simulated)
    for one, other in zip(real, simulated, strict=True):
        assert len(one.times) == len(other.times) == one.answer
        assert one.came == other.came < one.times[0]
    assert len(engine.running) == 0
    found = scaling.summary(real)
    assert set(found) == {"requests_per_s", "ttft_ms", "itl_ms", "ttft_p90_ms", "itl_p99_ms"}


def test_the_clock_stands_still_for_what_is_timed_between_the_requests(engine) -> None:
    coming = [arrival(0, Kind(0, 20, 3), 64, 0.0), arrival(1, Kind(0, 20, 3), 64, 400.0)]
    work: list[float] = []

    def between(ms: float) -> None:
        assert not engine.scheduler
        if not work:
            time.sleep(1.2)  # if the clock ran on, the second request would have waited
        work.append(ms)

    scaling.serve(engine, coming, between)
    assert len(work) == 2  # before the second request, and at the end
    assert 0 < work[0] <= coming[0].times[-1] < 400
    assert 0 < work[1] <= coming[1].times[-1] - 400  # steps, not the wait before them
    assert coming[1].times[0] - 400 < 500


def test_the_loads_of_a_comparison_are_served_with_steps_timed_in_between(monkeypatch) -> None:
    happened = []

    class Calibrated:
        def round(self):
            happened.append("all")

        def begin(self):
            happened.append("period")
            return happened.count("period")

        def go_on(self, ms):
            happened.append(ms)

    def serve(engine, coming, between):
        between(7.0)
        happened.append([one.came for one in coming])
        slowness = 10.0 * happened.count("period")
        for one in coming:
            one.times = [one.came + slowness * (one.arrival + 1), one.came + slowness * (one.arrival + 1) + 5]

    monkeypatch.setattr(scaling, "serve", serve)
    served = scaling.served_rounds(None, Calibrated(), scaling.Workload((Kind(0, 20, 2),), 64), 5, 2)
    assert happened[0] == "all"
    assert [happened[n::4] for n in (1, 2, 3)] == [["period"] * 6, [scaling.LEAD_MS] * 6, [7.0] * 6]
    came = happened[4::4]
    assert came[0] == [0.0] * 5 and came[1] != came[4]  # each round has requests of its own
    assert {name: [one.period for one in rounds] for name, rounds in served.items()} == dict(
        zip(scaling.LOADS, ([1, 4], [2, 5], [3, 6]), strict=True)
    )
    first, second = 5 / 0.055, 5 / 0.205  # what the backlog of each round came to
    assert [[one.rate for one in rounds] for rounds in served.values()] == [
        [None, None],
        [pytest.approx(0.4 * first), pytest.approx(0.4 * second)],
        [pytest.approx(0.7 * first), pytest.approx(0.7 * second)],
    ]


def test_a_comparison_says_how_far_the_simulator_is_off(monkeypatch) -> None:
    def answer(requests, slowness):
        for one in requests:
            one.times = [one.came + slowness * (10 + 5 * n) for n in range(one.answer)]

    workload = scaling.Workload((Kind(0, 20, 3),), 64)
    rounds = [scaling.Served(50.0, arrivals(workload, 5, rate=50.0, seed=seed), 10 + seed) for seed in range(3)]
    machine = {10: 1.0, 11: 2.0, 12: 9.0}  # how slow it was in each period
    for one in rounds:
        answer(one.requests, machine[one.period])
    for error, fine in ((1.1, True), (1.3, False)):
        monkeypatch.setattr(scaling, "simulate", lambda engine, slowness, coming: answer(coming, slowness))
        off = {period: error * slowness for period, slowness in machine.items()}
        (row,) = scaling.compare_rows(None, off.__getitem__, workload, {"a": rounds})
        assert (row["load"], row["rounds"], row["requests"]) == ("a", 3, 5)
        assert row["ttft_ms_error"] == row["itl_ms_error"] == pytest.approx(error - 1)
        assert (row["ttft_ms"], row["simulated_ttft_ms"]) == (pytest.approx(20), pytest.approx(20 * error))
        assert row["requests_per_s_error"] == pytest.approx(0, abs=0.15)
        assert row["within_tolerance"] is fine
    # Costs of another minute would be off in most rounds; in one, of which medians know nothing, they may be.
    for slowness, fine in ((lambda period: 1.0, False), (lambda period: min(2.0, machine[period]), True)):
        (row,) = scaling.compare_rows(None, slowness, workload, {"a": rounds})
        assert row["within_tolerance"] is fine
