"""The sweep and its picture, what calibration measures, and that engine and simulator serve the same requests."""

import xml.etree.ElementTree as ET

import pytest

from vitrail.bench import scaling
from vitrail.runtime.api import Runtime
from vitrail.runtime.distributed.costs import Curve, Measured
from vitrail.runtime.distributed.simulator import arrivals
from vitrail.runtime.distributed.workload import Kind, workload_of
from vitrail.runtime.quantization.config import QuantizationConfig


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


def _found(table, stage, count, number):
    return next(row["ms"] for row in table if row["stage"] == stage and row[count] == number)


def test_calibration_gives_every_stage_and_leaves_the_engine_empty(engine, tmp_path) -> None:
    calibration = scaling.Calibration(engine, rows=(1, 2), context=64)
    calibration.round()
    rows = calibration.table()
    assert {row["stage"] for row in rows} == {"prefill", "vision", "decode", "beside", "kv", "pair", "prompt", "wake"}
    assert all(row["ms"] > 0 for row in rows if row["stage"] in ("prefill", "decode"))
    assert [row["tiles"] for row in rows if row["stage"] == "vision"] == [1, 2, 4, 8, 16, 32]
    prompts = [(row["tokens"], row["prompts"]) for row in rows if row["stage"] == "prefill"]
    assert prompts == [*((n, 1) for n in (16, 64, 128, 256, 512, 1024)), (1040, 2), (2080, 4)]
    label = {"model": "nano", "quantization": None, "vision_quantization": None}
    path = scaling.write_results(tmp_path / "costs.json", [{**label, **row} for row in rows])
    costs = scaling.read_measured(path, "nano", QuantizationConfig())
    assert costs is not None
    assert costs.prefill_ms(256, 256**2 / 2) == pytest.approx(_found(rows, "prefill", "tokens", 256))
    assert costs.decode_ms(2, 2 * 64) == pytest.approx(_found(rows, "decode", "rows", 2))
    assert not engine.scheduler
    assert engine.stats()["kv_cache"]["used"] == 0


def test_engine_and_simulator_serve_the_same_requests(engine) -> None:
    workload = workload_of(engine.config, [Kind(0, 20, 3), Kind(2, 10, 4)])
    real, simulated = (arrivals(workload, 6, rate=200.0, seed=1) for _ in range(2))
    scaling.serve(engine, real)
    flat = Curve((1,), (1.0,))
    scaling.simulate(engine, Measured(flat, flat, flat, {512: flat}, 64, 0.0, 0.0, 0.0, 0.0), simulated)
    for one, other in zip(real, simulated, strict=True):
        assert len(one.times) == len(other.times) == one.answer
        assert one.came == other.came < one.times[0]
    assert len(engine.running) == 0
    found = scaling.summary(real)
    assert set(found) == {"requests_per_s", "ttft_ms", "itl_ms", "ttft_p90_ms", "itl_p99_ms"}


def test_the_loads_of_a_comparison_are_served_in_turn_with_calibrations(monkeypatch) -> None:
    happened = []

    class Calibrated:
        def round(self):
            happened.append("calibrated")

    def serve(engine, coming):
        happened.append([one.came for one in coming])
        for one in coming:
            one.times = [one.came + 10.0 * (one.arrival + 1), one.came + 10.0 * (one.arrival + 1) + 5]

    monkeypatch.setattr(scaling, "serve", serve)
    served = scaling.served_rounds(None, Calibrated(), scaling.Workload((Kind(0, 20, 2),), 64), 5, 2)
    assert happened[::2] == ["calibrated"] * 6
    assert happened[1] == [0.0] * 5 and happened[3] != happened[9]  # each round has requests of its own
    assert {name: len(rounds) for name, (_, rounds) in served.items()} == dict.fromkeys(scaling.LOADS, 2)
    capacity = 5 / 0.055
    assert [rate for rate, _ in served.values()] == [None, pytest.approx(0.4 * capacity), pytest.approx(0.7 * capacity)]


def test_a_comparison_says_how_far_the_simulator_is_off(monkeypatch) -> None:
    def fake(slowness):
        def serve(*arguments):
            for one in arguments[-1]:
                one.times = [one.came + slowness * (10 + 5 * n) for n in range(one.answer)]

        return serve

    workload = scaling.Workload((Kind(0, 20, 3),), 64)
    served = {"some load": (50.0, [arrivals(workload, 5, rate=50.0, seed=seed) for seed in range(3)])}
    for requests, slowness in zip(served["some load"][1], (1.0, 1.0, 9.0), strict=True):
        fake(slowness)(requests)  # in the last round the machine was busy
    for slowness, fine in ((1.1, True), (1.3, False)):
        monkeypatch.setattr(scaling, "simulate", fake(slowness))
        (row,) = scaling.compare_rows(None, None, workload, served)
        assert (row["rounds"], row["requests"]) == (3, 5)
        assert row["ttft_ms_error"] == row["itl_ms_error"] == pytest.approx(slowness - 1)
        assert (row["ttft_ms"], row["simulated_ttft_ms"]) == (pytest.approx(10), pytest.approx(10 * slowness))
        assert row["requests_per_s_error"] == pytest.approx(0, abs=0.15)
        assert row["within_tolerance"] is fine
