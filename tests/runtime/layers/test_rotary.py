"""The published formulas, number by number; `tests/parity/test_rope.py` compares with transformers bit for bit."""

import math
from typing import Any

import pytest

from vitrail.runtime.config import parse_config
from vitrail.runtime.layers.rotary import inverse_frequencies

from ...official_configs import INTERNLM2_20B, INTERNVIT_6B, PHI3_MINI_128K, chat


def frequencies(llm: dict[str, Any], planned_length: int = 0) -> list[float]:
    result = inverse_frequencies(parse_config(chat(INTERNVIT_6B, llm)).llm, planned_length)
    assert result.dtype.is_floating_point and result.dtype.itemsize == 4
    return result.tolist()


def powers(theta: float, dim: int) -> list[float]:
    return [theta ** (-2 * j / dim) for j in range(dim // 2)]


def test_plain_frequencies_fall_from_one_by_powers_of_theta() -> None:
    assert frequencies(INTERNLM2_20B | {"rope_scaling": None}) == pytest.approx(powers(1e6, 128), rel=1e-6)


def test_linear_scaling_stretches_every_position() -> None:
    scaled = frequencies(INTERNLM2_20B | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert scaled == pytest.approx([value / 4 for value in powers(1e6, 128)], rel=1e-6)


@pytest.mark.parametrize("planned", [0, 1, 3328, 32768])
def test_dynamic_scaling_leaves_requests_within_the_trained_length_alone(planned: int) -> None:
    assert frequencies(INTERNLM2_20B, planned) == frequencies(INTERNLM2_20B | {"rope_scaling": None})


@pytest.mark.parametrize("planned", [32769, 40000, 131072])
def test_dynamic_scaling_raises_theta_for_longer_requests(planned: int) -> None:
    theta = 1e6 * (2.0 * planned / 32768 - (2.0 - 1)) ** (128 / 126)
    assert frequencies(INTERNLM2_20B, planned) == pytest.approx(powers(theta, 128), rel=1e-6)


@pytest.mark.parametrize(("planned", "factors"), [(4096, "short_factor"), (4097, "long_factor")])
def test_longrope_takes_long_factors_beyond_the_first_training_length(planned: int, factors: str) -> None:
    per_frequency = PHI3_MINI_128K["rope_scaling"][factors]
    expected = [value / factor for value, factor in zip(powers(1e4, 96), per_frequency, strict=True)]
    assert frequencies(PHI3_MINI_128K, planned) == pytest.approx(expected, rel=1e-6)
    assert not math.isclose(per_frequency[-1], 1.0)
