"""The sweep and its picture, what calibration measures, and that engine and simulator serve the same requests."""

import xml.etree.ElementTree as ET

import pytest

from vitrail.bench import scaling
from vitrail.runtime.api import Runtime
from vitrail.runtime.distributed.costs import Curve, Measured
from vitrail.runtime.distributed.simulator import arrivals
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


def test_calibration_gives_every_stage_and_leaves_the_engine_empty(engine) -> None:
    rows = scaling.calibrate(engine, rows=(1, 2), repeats=1, context=64)
    assert {row["stage"] for row in rows} == {"prefill", "vision", "decode", "beside", "kv", "pair"}
    assert all(row["ms"] > 0 for row in rows if row["stage"] in ("prefill", "decode"))
    assert [row["tiles"] for row in rows if row["stage"] == "vision"] == [1, 2, 4, 8, 16]
    assert [row["tokens"] for row in rows if row["stage"] == "prefill"] == [16, 64, 128, 256, 512, 1024]
    assert not engine.scheduler
    assert engine.stats()["kv_cache"]["used"] == 0


def test_engine_and_simulator_serve_the_same_requests(engine) -> None:
    workload = workload_of(engine.config, [Kind(0, 20, 3), Kind(2, 10, 4)])
    real, simulated = (arrivals(workload, 6, rate=200.0, seed=1) for _ in range(2))
    scaling.serve(engine, real)
    flat = Curve((1,), (1.0,))
    scaling.simulate(engine, Measured(flat, flat, flat, {512: flat}, 64, 0.0, 0.0), simulated)
    for one, other in zip(real, simulated, strict=True):
        assert len(one.times) == len(other.times) == one.answer
        assert one.came == other.came < one.times[0]
    assert len(engine.running) == 0
    found = scaling.summary(real)
    assert set(found) == {"requests_per_s", "ttft_ms", "itl_ms", "ttft_p90_ms", "itl_p99_ms"}


def test_a_comparison_says_how_far_the_simulator_is_off(monkeypatch) -> None:
    def fake(slowness):
        def serve(*arguments):
            for one in arguments[-1]:
                one.times = [one.came + slowness * (10 + 5 * n) for n in range(one.answer)]

        return serve

    monkeypatch.setattr(scaling, "serve", fake(1.0))
    workload = scaling.Workload((Kind(0, 20, 3),), 64)
    for slowness, fine in ((1.1, True), (1.3, False)):
        monkeypatch.setattr(scaling, "simulate", fake(slowness))
        rows = list(scaling.compare_rows(None, None, workload, 5))
        assert [row["load"] for row in rows] == ["backlog", "Poisson, 40 %", "Poisson, 70 %"]
        assert all(row["ttft_ms_error"] == pytest.approx(slowness - 1) for row in rows)
        assert [row["within_tolerance"] for row in rows] == [fine] * 3
