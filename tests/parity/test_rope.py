"""Rotary frequencies against transformers' rope functions, bit for bit."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vitrail.runtime.config import parse_config
from vitrail.runtime.layers.rotary import inverse_frequencies

from ..random_checkpoints import chat_config

# InternLM2-20B's numbers.
REAL = {"hidden_size": 6144, "num_attention_heads": 48, "num_key_value_heads": 8, "max_position_embeddings": 32768}
THETAS = st.sampled_from([1e4, 5e5, 1e6, 5e6])
FACTORS = st.sampled_from([1.0, 1.5, 2.0, 3.0, 6.0])


def theirs(config: Any, kind: str, length: int) -> torch.Tensor:
    inv_freq, _ = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
    return inv_freq


def ours(length: int, **llm: Any) -> torch.Tensor:
    return inverse_frequencies(parse_config(chat_config("LlamaForCausalLM", llm=REAL | llm)).llm, length)


@given(theta=THETAS, factor=FACTORS, length=st.integers(1, 100_000))
def test_linear_scaling_divides_the_frequencies(theta: float, factor: float, length: int) -> None:
    config = LlamaConfig(**REAL, rope_parameters={"rope_type": "linear", "factor": factor, "rope_theta": theta})
    scaled = ours(length, rope_theta=theta, rope_scaling={"type": "linear", "factor": factor})
    assert torch.equal(scaled, theirs(config, "linear", length))


@given(theta=THETAS, factor=FACTORS, length=st.integers(1, 100_000) | st.sampled_from([32767, 32768, 32769]))
def test_dynamic_scaling_raises_the_base_beyond_the_trained_length(theta: float, factor: float, length: int) -> None:
    config = LlamaConfig(**REAL, rope_parameters={"rope_type": "dynamic", "factor": factor, "rope_theta": theta})
    scaled = ours(length, rope_theta=theta, rope_scaling={"type": "dynamic", "factor": factor})
    assert torch.equal(scaled, theirs(config, "dynamic", length))
    assert torch.equal(scaled, ours(length, rope_theta=theta)) == (length <= 32768 or factor * (length - 32768) == 0)


@pytest.mark.parametrize("length", [1, 4096, 4097, 131072])
def test_longrope_takes_its_factors_and_amplitude_from_the_config(length: int) -> None:
    # Phi-3-mini-128k: 48 factors, trained to 4096, stretched to 131072.
    short = [1.0 + 0.05 * j for j in range(48)]
    long = [1.0 + 1.3 * j for j in range(48)]
    sizes = {"hidden_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 32}
    lengths = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    scaling = {"short_factor": short, "long_factor": long}
    config = Phi3Config(**sizes, **lengths, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **scaling})
    llm = {**sizes, **lengths, "rope_theta": 1e4, "rope_scaling": {"type": "su", **scaling}, "sliding_window": 262144}
    parsed = parse_config(chat_config("Phi3ForCausalLM", llm=llm)).llm
    expected, amplitude = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=length)
    assert torch.equal(inverse_frequencies(parsed, length), expected)
    assert parsed.rope_scaling is not None
    assert parsed.rope_scaling.attention_factor == amplitude
    assert amplitude == pytest.approx((1 + 5 / 12) ** 0.5)  # sqrt(1 + ln 32 / ln 4096) = sqrt(1 + 5 / 12)
