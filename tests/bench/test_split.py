"""What the benchmark of the split makes of token times, and that every contender answers every request."""

import pytest
import torch

from vitrail.bench.split import TILES, Answer, contenders, measure, requests, row_of
from vitrail.runtime.api import Runtime

from ..runtime.vision_workers import ThreadWorkers


def test_a_row_is_made_of_all_rounds() -> None:
    first, second = Answer(0.0, [0.5, 0.6, 0.8]), Answer(10.0, [10.1, 10.3])
    row = row_of("one process", "closed, 2", [[first], [second]])
    assert row["requests_per_s"] == pytest.approx(2 / 1.1)
    assert row["output_tokens_per_s"] == pytest.approx(5 / 1.1)
    assert row["ttft_p50_ms"] == pytest.approx(300)
    assert row["itl_p50_ms"] == pytest.approx(200)


def test_every_contender_answers_the_same_load_and_threads_are_set_back() -> None:
    with Runtime.from_pretrained("nano", dtype="float32", device="cpu") as runtime:
        prompts = requests(runtime, 12, 0)
        assert {sum(prompt.num_tiles) for prompt in prompts} == set(TILES)
        workers = ThreadWorkers(runtime.model, capacity=8)
        systems = contenders(runtime, workers)[1:]  # a second thread would share its core with another test
        threads = torch.get_num_threads()
        rows = list(measure(runtime, systems, number=3, rounds=1, new_tokens=2))
        assert torch.get_num_threads() == threads
        assert [row["system"] for row in rows] == [one.name for one in systems] * 2
        assert {row["requests"] for row in rows} == {3}
        assert all(row["output_tokens_per_s"] / row["requests_per_s"] == pytest.approx(2) for row in rows)
        assert workers.calls > 0
        systems[-1].engine.close()
        workers.close()
