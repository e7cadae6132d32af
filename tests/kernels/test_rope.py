import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels.rope import apply_rope, apply_rope_reference, rotary_table

from .measure import FP32_BOUND, check_gradients, random, relative_error

# (batch, tokens, heads, head_dim): tiny, odd, and InternLM2-20B's queries.
SHAPES = [(1, 1, 1, 2), (3, 5, 7, 6), (1, 256, 48, 128)]


def frequencies(head_dim: int, theta: float = 10000.0) -> Tensor:
    return torch.tensor([theta ** (-2 * j / head_dim) for j in range(head_dim // 2)])


def exact_rope(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Channels j and j + d/2 as one complex number, turned by the angle; the angle itself is an fp32 product."""
    angle = (positions[:, :, None].float() * inv_freq).double()[:, :, None]
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", [0, 40_000])
def test_reference_is_the_complex_rotation_of_half_split_channels(shape: tuple[int, ...], start: int) -> None:
    x, inv_freq = random(*shape), frequencies(shape[-1])
    positions = start + torch.arange(shape[1]).expand(shape[0], -1)
    cos, sin = rotary_table(positions, inv_freq, 1.0, torch.float32)
    exact = exact_rope(x.double(), positions, inv_freq)
    assert relative_error(apply_rope_reference(x, cos, sin), exact) < FP32_BOUND


def test_rows_have_their_own_positions_and_frequencies() -> None:
    x = random(3, 5, 2, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11], [90, 3, 3, 0, 1]])
    inv_freq = torch.stack([frequencies(8, theta) for theta in (1e2, 1e4, 1e6)])
    cos, sin = rotary_table(positions, inv_freq, 1.0, torch.float32)
    together = apply_rope(x, cos, sin)
    for row in range(3):
        cos, sin = rotary_table(positions[row : row + 1], inv_freq[row], 1.0, torch.float32)
        assert torch.equal(apply_rope(x[row : row + 1], cos, sin), together[row : row + 1])


def test_amplitude_scales_cosine_and_sine() -> None:
    positions = torch.arange(4)[None]
    plain = rotary_table(positions, frequencies(8), 1.0, torch.float32)
    scaled = rotary_table(positions, frequencies(8), 1.25, torch.float32)
    for one, other in zip(plain, scaled, strict=True):
        assert torch.equal(one * 1.25, other)


def test_bf16_tables_are_made_in_fp32_and_cast_before_the_multiply() -> None:
    positions = torch.arange(1000, 1064)[None]
    x = random(1, 64, 3, 128).bfloat16()
    cos, sin = rotary_table(positions, frequencies(128), 1.0, torch.bfloat16)
    angle = (positions[0, :, None].float() * frequencies(128)).repeat(1, 2)[None, :, None]
    assert torch.equal(cos, angle.cos().bfloat16())
    assert torch.equal(sin, angle.sin().bfloat16())
    rotated = torch.cat((-x[..., 64:], x[..., :64]), dim=-1)
    assert torch.equal(apply_rope_reference(x, cos, sin), x * cos + rotated * sin)


@given(query=st.integers(0, 500), key=st.integers(0, 500), shift=st.integers(0, 500))
def test_scores_depend_on_the_distance_only(query: int, key: int, shift: int) -> None:
    q, k, inv_freq = random(1, 1, 1, 64), random(1, 1, 1, 64, seed=1), frequencies(64)

    def score(at_query: int, at_key: int) -> float:
        turned_q = apply_rope(q, *rotary_table(torch.tensor([[at_query]]), inv_freq, 1.0, torch.float32))
        turned_k = apply_rope(k, *rotary_table(torch.tensor([[at_key]]), inv_freq, 1.0, torch.float32))
        return (turned_q * turned_k).sum().item()

    # Angles up to 1000 carry fp32 errors of 6e-5; q and k have 64 components of size 1.
    assert score(query, key) == pytest.approx(score(query + shift, key + shift), abs=5e-3)


def test_strided_heads_give_what_packed_heads_give() -> None:
    qkv = random(2, 5, 9, 8)
    cos, sin = rotary_table(torch.arange(5).expand(2, -1), frequencies(8), 1.0, torch.float32)
    for part in qkv.split((5, 2, 2), dim=2):
        assert torch.equal(apply_rope(part, cos, sin), apply_rope_reference(part.contiguous(), cos, sin))


def test_gradients_flow_to_the_rotated_tensor() -> None:
    positions = torch.arange(5).expand(3, -1)
    cos, sin = rotary_table(positions, frequencies(6), 1.0, torch.float32)
    check_gradients(
        lambda x: apply_rope(x, cos, sin), lambda x: exact_rope(x, positions, frequencies(6)), random(3, 5, 7, 6)
    )


def test_a_table_of_another_head_size_is_refused() -> None:
    cos, sin = rotary_table(torch.zeros(1, 1, dtype=torch.int64), frequencies(8), 1.0, torch.float32)
    with pytest.raises(ValueError, match="apply_rope: x has head_dim 6, the table 8"):
        apply_rope(torch.zeros(1, 1, 1, 6), cos, sin)
