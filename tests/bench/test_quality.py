"""The quality tables: planted outliers, gates, and one short run of each."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from vitrail.bench import quality
from vitrail.runtime.calibration import watch

from ..random_checkpoints import build, chat_config, random_tiles, random_weights

# The slice at a size for tests: what matters is that norms, values and `up` have more channels than outliers.
SLICE = replace(
    quality.SLICE,
    vision=replace(
        quality.SLICE.vision,
        hidden_size=96,
        num_attention_heads=3,
        intermediate_size=128,
        image_size=56,
        num_hidden_layers=2,
    ),
    llm=replace(
        quality.SLICE.llm,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=192,
        vocab_size=1024,
    ),
    tile_size=56,
)


def test_planted_outliers_stick_out_and_change_no_output() -> None:
    config = chat_config()
    model = build(config, random_weights(config))
    tiles = random_tiles(2, model.config.tile_size)
    before = model.encode_tiles(tiles)
    for block in model.vision_model.encoder.layers:
        quality.plant_outliers(block, torch.Generator().manual_seed(0))
    with watch(model.vision_model.encoder.layers[1], 74) as statistics:
        torch.testing.assert_close(model.encode_tiles(tiles), before, rtol=1e-3, atol=1e-3)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1"):
        largest = statistics[name].largest.sort(descending=True).values
        assert largest[quality.OUTLIERS - 1] > 10 * largest[quality.OUTLIERS]


def test_on_a_slice_with_outliers_plain_int8_breaks_and_ours_does_not() -> None:
    rows = quality.measure_outliers(SLICE, 2, "float32")
    assert [row["method"] for row in rows] == ["int8, to nearest", "int8, calibrated"]
    assert quality.unconvincing(rows) == []
    assert rows[1]["logit_kl"] < 0.05 * rows[0]["logit_kl"]


@pytest.mark.parametrize(
    ("nearest", "ours", "complaint"),
    [("0.20000", "0.99900", None), ("0.97000", "0.99900", "break nothing"), ("0.20000", "0.99000", "below 0.995")],
)
def test_a_slice_that_shows_too_little_is_said_so(nearest, ours, complaint) -> None:
    found = quality.unconvincing([{"visual_cosine": nearest}, {"visual_cosine": ours}])
    assert (len(found) == 0) if complaint is None else complaint in found[0]


def test_methods_are_measured_against_bf16_and_gated(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(quality, "Options", partial(quality.Options, num_samples=1))
    read = quality.read_examples
    monkeypatch.setattr(quality, "read_examples", lambda source, limit: read(source, 1))
    options = ["--tasks", "object colour", "--num-images", "3", "--out", str(tmp_path)]
    assert quality.main(["--methods", "int8 vision", *options]) == 0
    first, second = json.loads((tmp_path / "quality_methods.json").read_text())["rows"]
    assert (first["method"], first["points"], first["same_answer_percent"]) == ("bf16", 0, 100)
    assert (second["method"], second["vision"], second["language"]) == ("int8 vision", "int8", "bf16")
    assert second["questions"] == 3
    assert 0.999 < float(second["visual_cosine"]) < 1
    answers = iter([["red"] * 3, ["wrong"] * 3])
    monkeypatch.setattr(quality, "right_percent", lambda answers, drawn: 100.0 if answers[0] == "red" else 0.0)
    monkeypatch.setattr(quality, "answers_of", lambda runtime, drawn: next(answers))
    assert quality.main(["--methods", "int8 vision", *options]) == 1
    assert "int8 vision costs 100.00 points, more than 1" in capsys.readouterr().err


def test_only_what_costs_more_than_it_may_is_too_costly() -> None:
    rows = [
        {"method": "a", "points": -1.0, "may_cost": 1},
        {"method": "b", "points": -1.1, "may_cost": 1},
        {"method": "c", "points": -9.0, "may_cost": None},
        {"method": "d", "points": 0.5, "may_cost": 1},
    ]
    assert quality.too_costly(rows) == ["b costs 1.10 points, more than 1"]
