"""What the benchmark under load makes of arrival times, and that its loads run."""

import pytest

from vitrail.bench.throughput import Answer, answer_all, picture, row_of
from vitrail.runtime.api import Runtime


def test_a_row_is_made_of_arrivals_and_tokens() -> None:
    answers = [Answer(0.0, [0.5, 0.6, 0.8]), Answer(1.0, [1.1, 1.3])]
    row = row_of("vitrail", "closed, 2", 4, answers)
    assert row["requests_per_s"] == pytest.approx(2 / 1.3)
    assert row["tiles_per_s"] == pytest.approx(8 / 1.3)
    assert row["output_tokens_per_s"] == pytest.approx(5 / 1.3)
    assert row["ttft_p50_ms"] == pytest.approx(300)
    assert row["itl_p50_ms"] == pytest.approx(200)


def test_every_load_gets_its_tiles_and_its_tokens() -> None:
    with Runtime.from_pretrained("nano", dtype="float32", device="cpu") as runtime:
        images = [picture(runtime.model.config, 4, seed) for seed in range(3)]
        assert images[0].tobytes() != images[1].tobytes()
        assert runtime.count_tokens("x", images[0], max_tiles=3).image_tiles == 4
        for load in ({"clients": 2}, {"rate": 100.0}):
            answers = answer_all(runtime, images, 4, 3, **load)
            assert len(answers) == 3
            for answer in answers:
                assert len(answer.tokens) == 3
                assert answer.arrived < answer.tokens[0] <= answer.tokens[-1]
