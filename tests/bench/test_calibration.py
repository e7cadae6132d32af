"""What steps are timed, how often and in which period, and the table of costs that is made of them."""

import pytest

from vitrail.bench import calibration as module
from vitrail.bench.calibration import Calibration
from vitrail.bench.harness import write_results
from vitrail.runtime.api import Runtime
from vitrail.runtime.distributed.costs import measured_of, read_measured
from vitrail.runtime.quantization.config import QuantizationConfig


@pytest.fixture(scope="module")
def engine():
    options = {"enable_prefix_caching": False, "vision_cache_gb": 0, "max_num_seqs": 8}
    with Runtime.from_pretrained("nano", dtype="float32", device="cpu", **options) as runtime:
        yield runtime.engine


def _found(table, stage, count, number):
    return next(row["ms"] for row in table if row["stage"] == stage and row[count] == number)


def test_calibration_gives_every_stage_and_leaves_the_engine_empty(engine, tmp_path) -> None:
    calibration = Calibration(engine, rows=(1, 2), context=64)
    calibration.round()
    rows = calibration.table()
    assert {row["stage"] for row in rows} == {"prefill", "vision", "decode", "beside", "kv", "pair", "prompt", "wake"}
    assert all(row["ms"] > 0 for row in rows if row["stage"] in ("prefill", "decode"))
    assert [row["tiles"] for row in rows if row["stage"] == "vision"] == [1, 2, 4, 8, 13, 16, 32]
    assert [row["tiles"] for row in rows if row["stage"] == "wake"] == [0, 1, 4]
    prompts = [(row["tokens"], row["prompts"]) for row in rows if row["stage"] == "prefill"]
    assert prompts == [*((n, 1) for n in (16, 64, 128, 256, 512, 1024)), (1040, 2), (2080, 4)]
    label = {"model": "nano", "quantization": None, "vision_quantization": None}
    path = write_results(tmp_path / "costs.json", [{**label, **row} for row in rows])
    costs = read_measured(path, "nano", QuantizationConfig())
    assert costs == measured_of(rows)
    assert costs.prefill_ms(256, 256**2 / 2) == pytest.approx(_found(rows, "prefill", "tokens", 256))
    assert costs.decode_ms(2, 2 * 64) == pytest.approx(_found(rows, "decode", "rows", 2))
    assert not engine.scheduler
    assert engine.stats()["kv_cache"]["used"] == 0


def test_a_step_is_timed_with_the_arrival_of_its_requests(engine, monkeypatch) -> None:
    bench = module.Bench(engine)
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(bench, "submit", lambda prepared, answer: clock.__setitem__(0, clock[0] + 1))
    monkeypatch.setattr(engine, "step", lambda: clock.__setitem__(0, clock[0] + 10))
    assert bench.fresh_ms(3, 64, 0, wait=100.0) == 13e3  # and without the rest before it
    assert bench.step_ms() == 10e3


class Timed(Calibration):
    """One whose steps take what the test says, on a clock of its own."""

    def __init__(self, engine, monkeypatch) -> None:
        super().__init__(engine, rows=(1, 2), context=64)
        self.now = self.slowness = 0.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        self.shapes = [*self.fresh, *(("wait", *shape) for shape in self.fresh_after_wait), ("far",)]
        self.shapes += [("beside", rows, chunk) for rows in (1, 2) for chunk in (0, *module.CHUNKS)]
        self.shapes += [("chunk", number) for number in range(self._chunks)]
        self._parts = [lambda shape=shape: self._time(shape) for shape in self.shapes]

    def _time(self, shape) -> None:
        ms = 10.0 * self.slowness * (1 + self.shapes.index(shape))
        self.now += ms / 1e3
        self._note(shape, ms)


def test_the_table_of_a_period_is_of_the_machine_as_it_was_then(engine, monkeypatch) -> None:
    calibration = Timed(engine, monkeypatch)
    for calibration.slowness in (1.0, 1.0, 1.0):
        calibration.round()
    usual = calibration.table()
    calibration.slowness = 1.5
    slow = calibration.begin()
    calibration.go_on(200.0)  # few of the shapes
    assert len(calibration.periods[slow]) < len(calibration.shapes) / 2
    for row, slower in zip(usual, calibration.table(slow), strict=True):
        assert slower == row | {"ms": pytest.approx(1.5 * row["ms"])}
    assert calibration.table() == usual == calibration.table(0)


def test_shapes_are_timed_for_as_long_as_was_asked_for_and_all_of_them_in_turn(engine, monkeypatch) -> None:
    calibration = Timed(engine, monkeypatch)
    calibration.slowness = 1.0
    calibration.begin()
    longest = 10.0 * len(calibration.shapes)
    for asked in range(100, 20_000, 100):
        calibration.go_on(100.0)
        assert asked <= 1e3 * calibration.now + 1e-6 < asked + longest
    counts = [len(calibration.periods[0][shape]) for shape in calibration.shapes]
    assert max(counts) - min(counts) <= 1
