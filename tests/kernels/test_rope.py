from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels.norm import rms_norm_reference
from vitrail.kernels.quantized_cache import QuantizedCache
from vitrail.kernels.rope import (
    apply_rope,
    apply_rope_reference,
    rope_and_cache,
    rope_and_cache_reference,
    rotary_table,
)

from .measure import FP32_BOUND, assert_errs_like, check_gradients, random, relative_error

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


# --- with the write to the paged cache ---

HALF = [torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Step:
    """Projections of some tokens with their slots. The cache is NaN, so that a stray write shows."""

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    caches: tuple[Tensor, Tensor]
    slots: Tensor
    num_heads: int
    norms: tuple[Tensor, Tensor] | None
    positions: Tensor

    @classmethod
    def of(
        cls,
        slots: list[int],
        *,
        heads: int,
        kv_heads: int,
        d: int,
        page: int = 4,
        normed: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "Step":
        tokens = len(slots)
        positions = torch.arange(tokens)[:, None] * 7
        cos, sin = rotary_table(positions, frequencies(d), 1.0, dtype)
        caches = torch.full((2, -(-(max(slots) + 2) // page), page, kv_heads, d), torch.nan, dtype=dtype)
        norms = (random(d, seed=8).to(dtype).to(device), random(d, seed=9).to(dtype).to(device)) if normed else None
        qkv = random(tokens, (heads + 2 * kv_heads) * d, scale=2).to(dtype)
        on = [x.to(device) for x in (qkv, cos.flatten(1), sin.flatten(1), *caches, torch.tensor(slots))]
        return cls(*on[:3], (on[3], on[4]), on[5], heads, norms, positions)

    def run(self, operation=rope_and_cache) -> tuple[Tensor, Tensor, Tensor]:
        """q and the slots of both caches, (slots, kv_heads, d)."""
        caches = [cache.clone() for cache in self.caches]
        q_norm, k_norm = self.norms or (None, None)
        arguments = (self.qkv, self.cos, self.sin, *caches, self.slots, self.num_heads)
        q = operation(*arguments, q_norm=q_norm, k_norm=k_norm, eps=1e-5)
        return q, caches[0].flatten(0, 1), caches[1].flatten(0, 1)

    def separate(self, double: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of every token, by one operation after the other or by the formula in fp64."""
        kv_heads, d = self.caches[0].shape[2:]
        qkv = self.qkv.double() if double else self.qkv
        q, k, v = qkv.unflatten(1, (-1, d)).split((self.num_heads, kv_heads, kv_heads), dim=1)
        if self.norms is not None:
            q, k = (rms_norm_reference(x, w, 1e-5) for x, w in zip((q, k), self.norms, strict=True))
        if double:
            q, k = (exact_rope(x[:, None].cpu(), self.positions, frequencies(d))[:, 0].to(x.device) for x in (q, k))
        else:
            q, k = (apply_rope_reference(x, self.cos[:, None], self.sin[:, None]) for x in (q, k))
        return q, k, v

    def check_slots(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> None:
        """The caches hold these in the tokens' slots and nothing anywhere else."""
        for slots, expected in ((keys, k), (values, v)):
            cached = self.slots >= 0
            assert torch.equal(slots[self.slots[cached]], expected[cached])
            untouched = torch.ones(len(slots), dtype=torch.bool, device=slots.device)
            untouched[self.slots[cached]] = False
            assert slots[untouched].isnan().all()


@pytest.mark.parametrize("slots", [[0], [9, 3, -1, 4], [-1, -1], [5, 6, 7, 8, 2]])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_reference_is_norm_rotation_and_copy_one_after_the_other(slots, normed, dtype) -> None:
    step = Step.of(slots, heads=6, kv_heads=2, d=8, normed=normed, dtype=dtype)
    q, keys, values = step.run(rope_and_cache_reference)
    expected, k, v = step.separate()
    assert torch.equal(q, expected)
    step.check_slots(keys, values, k, v)


def test_reference_writes_to_caches_that_keep_the_tokens_of_a_head_together() -> None:
    step = Step.of([9, 3, -1, 4], heads=6, kv_heads=2, d=8)
    caches = [cache.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for cache in step.caches]
    rope_and_cache(step.qkv, step.cos, step.sin, *caches, step.slots, step.num_heads)
    _, k, v = step.separate()
    step.check_slots(*(cache.flatten(0, 1) for cache in caches), k, v)


def test_the_projection_is_left_as_it_is(any_device) -> None:
    step = Step.of([3, 1], heads=4, kv_heads=2, d=8, normed=True, device=any_device)
    before = step.qkv.clone()
    for operation in (rope_and_cache, rope_and_cache_reference):
        step.run(operation)
        assert torch.equal(step.qkv, before)


@pytest.mark.parametrize("dtype", HALF)
def test_the_fused_kernel_rounds_where_the_reference_does(any_device, dtype) -> None:
    step = Step.of([9, 3, -1, 4], heads=6, kv_heads=2, d=32, dtype=dtype, device=any_device)
    q, keys, values = step.run()
    expected, k, v = step.separate()
    assert torch.equal(q, expected)
    step.check_slots(keys, values, k, v)
    normed = Step.of([9, 3, -1, 4], heads=6, kv_heads=2, d=32, normed=True, dtype=dtype, device=any_device)
    # The sum of squares may be added up in another order, and land on the other side of a rounding.
    assert (normed.run()[0] != normed.separate()[0]).float().mean() < 0.01


def check_kernel(step: Step) -> None:
    """The kernel errs at most twice as much as plain torch, copies values as they are, and writes nothing else."""
    q, keys, values = step.run()
    for result, plain, exact in zip((q, keys[step.slots]), step.separate(), step.separate(double=True), strict=False):
        cached = step.slots >= (0 if result is not q else -1)
        if cached.any():
            assert_errs_like(result[cached], plain[cached], exact[cached])
    step.check_slots(keys, values, keys[step.slots], step.separate()[2])


# Tiny; InternLM2-20B and Qwen2-0.5B; two programs for the heads of a token, the last not full; a head_dim of no power.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d"), [(1, 1, 2), (48, 8, 128), (14, 2, 64), (20, 3, 128), (5, 5, 96), (3, 1, 80)]
)
@pytest.mark.parametrize("normed", [False, True])
def test_the_fused_kernel_errs_no_more_than_the_reference(any_device, heads, kv_heads, d, normed) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_kernel(
            Step.of([70, 3, -1], heads=heads, kv_heads=kv_heads, d=d, normed=normed, dtype=dtype, device=any_device)
        )


@settings(max_examples=15)
@given(
    tokens=st.integers(1, 6),
    padding=st.integers(0, 3),
    heads=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    half=st.integers(1, 20),
    page=st.sampled_from([1, 2, 16]),
    normed=st.booleans(),
    data=st.data(),
)
def test_the_fused_kernel_takes_any_heads_slots_and_pages(
    interpreted, tokens, padding, heads, kv_heads, half, page, normed, data
) -> None:
    slots = data.draw(st.permutations(range(40)))[:tokens] + [-1] * padding
    step = Step.of(slots, heads=heads, kv_heads=kv_heads, d=2 * half, page=page, normed=normed)
    with interpreted():
        check_kernel(step)


def check_8_bits(step: Step, operation=rope_and_cache) -> None:
    """Caches of int8 get the nearest codes of what others get, a scale for each token and head, and nothing else."""
    caches = [
        QuantizedCache(
            torch.full_like(cache, -128, dtype=torch.int8),
            torch.full_like(cache[..., 0], torch.nan, dtype=torch.float32),
        )
        for cache in step.caches
    ]
    q_norm, k_norm = step.norms or (None, None)
    arguments = (step.qkv, step.cos, step.sin, *caches, step.slots, step.num_heads)
    q = operation(*arguments, q_norm=q_norm, k_norm=k_norm, eps=1e-5)
    expected, *plain = step.run(operation)
    assert torch.equal(q, expected)
    for cache, numbers in zip(caches, plain, strict=True):
        codes, scales, written = cache.codes.flatten(0, 1), cache.scales.flatten(0, 1), step.slots[step.slots >= 0]
        exact, scale = numbers[written].double(), scales[written].double().unsqueeze(-1)
        torch.testing.assert_close(scale * 127, exact.abs().amax(-1, keepdim=True), rtol=1e-5, atol=0)
        assert ((codes[written] * scale - exact).abs() <= 0.5001 * scale).all()
        untouched = torch.ones(len(codes), dtype=torch.bool, device=codes.device)
        untouched[written] = False
        assert codes[untouched].eq(-128).all()
        assert scales[untouched].isnan().all()


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(1, 1, 2), (48, 8, 128), (14, 2, 64), (20, 3, 128), (5, 5, 96)])
@pytest.mark.parametrize("normed", [False, True])
def test_caches_of_8_bits_get_codes_and_scales(any_device, heads, kv_heads, d, normed) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        step = Step.of([70, 3, -1], heads=heads, kv_heads=kv_heads, d=d, normed=normed, dtype=dtype, device=any_device)
        check_8_bits(step)
        check_8_bits(step, rope_and_cache_reference)


@settings(max_examples=8)
@given(
    tokens=st.integers(1, 4),
    heads=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    half=st.integers(1, 20),
    page=st.sampled_from([1, 2, 16]),
)
def test_caches_of_8_bits_take_any_heads_and_pages(interpreted, tokens, heads, kv_heads, half, page) -> None:
    with interpreted():
        check_8_bits(Step.of([7, 0, 30, 2][:tokens], heads=heads, kv_heads=kv_heads, d=2 * half, page=page))


def test_what_does_not_fit_a_cache_is_refused(any_device) -> None:
    step = Step.of([3, 1], heads=4, kv_heads=2, d=8, device=any_device)
    with pytest.raises(ValueError, match="64 channels are not 5 query heads"):
        replace(step, num_heads=5).run()
    with pytest.raises(ValueError, match=r"slots \(1,\) for 2 tokens"):
        replace(step, slots=step.slots[:1]).run()
    with pytest.raises(ValueError, match=r"tables \(1, 8\) and \(2, 8\)"):
        replace(step, cos=step.cos[:1]).run()
    with pytest.raises(ValueError, match="come together"):
        rope_and_cache(step.qkv, step.cos, step.sin, *step.caches, step.slots, 4, q_norm=torch.ones(8))


def test_the_kernel_wants_whole_caches(any_device) -> None:
    step = Step.of([3, 1], heads=4, kv_heads=2, d=8, device=any_device)
    spread = tuple(cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in step.caches)
    with pytest.raises(ValueError, match="must be contiguous"):
        rope_and_cache(step.qkv, step.cos, step.sin, *spread, step.slots, 4)
