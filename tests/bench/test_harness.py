import json
from pathlib import Path

import pytest

from vitrail.bench import harness


def test_percentiles_are_those_of_the_samples() -> None:
    timing = harness.Timing.of([float(value) for value in range(1, 12)])
    assert (timing.p10, timing.median, timing.p90, timing.n) == (2.0, 6.0, 10.0, 11)


def test_contenders_take_turns_and_every_second_round_goes_backwards() -> None:
    calls: list[str] = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = harness.compare(contenders, warmup=1, repeats=2, device="cpu")
    assert "".join(calls) == "abc" + "abc" + "cba"
    assert {name: timing.n for name, timing in timings.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_slower_function_measures_slower() -> None:
    timings = harness.compare(
        {"short": lambda: sum(range(1_000)), "long": lambda: sum(range(100_000))}, repeats=9, device="cpu"
    )
    assert timings["long"].median > timings["short"].median


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repeats": 0}, "nothing to time: 1 contenders, 3 warm-up and 0 timed rounds"),
        ({"cold_cache": True, "device": "cpu"}, "the device is cpu"),
    ],
)
def test_what_cannot_be_timed_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        harness.measure(lambda: None, **arguments)  # type: ignore[arg-type]


def test_results_carry_rows_and_the_environment_they_depend_on(tmp_path: Path) -> None:
    timing = harness.Timing(median=2.0, p10=1.0, p90=3.0, n=5)
    rows = [{"model": "nano", **timing.row("vitrail"), "quality": None}]
    path = harness.write_results(harness.results_path("latency", tmp_path / "new"), rows, title="Latency")
    document = json.loads(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "new/latency.json"
    assert document["rows"] == [
        {
            "model": "nano",
            "vitrail_ms": 2.0,
            "vitrail_p10_ms": 1.0,
            "vitrail_p90_ms": 3.0,
            "vitrail_n": 5,
            "quality": None,
        }
    ]
    facts = document["environment"]
    assert {"commit", "dirty", "date", "command", "cpu", "threads", "gpu", "driver", "versions"} <= facts.keys()
    assert {"vitrail", "torch", "numpy"} <= facts["versions"].keys()


@pytest.mark.gpu
def test_a_cuda_function_is_timed_by_device_events_with_a_cold_cache() -> None:
    import torch

    x = torch.randn(2048, 2048, device="cuda")
    timings = harness.compare({"one": lambda: x @ x, "ten": lambda: [x @ x for _ in range(10)]}, cold_cache=True)
    assert 0 < timings["one"].median < timings["ten"].median
