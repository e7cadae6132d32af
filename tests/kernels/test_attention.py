from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels import attention, dispatch
from vitrail.kernels.attention import (
    CONFIGS,
    causal_attention,
    causal_attention_reference,
    tile_attention,
    tile_attention_reference,
)
from vitrail.kernels.build import check, compile_launches
from vitrail.kernels.dispatch import Choice
from vitrail.kernels.signature import Launch

from .measure import FP32_BOUND, assert_errs_like, check_gradients, random, relative_error


def exact_tile_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), v)


def exact_causal_attention(q: Tensor, k: Tensor, v: Tensor, context_lens: list[int] | None = None) -> Tensor:
    """Query by query: the t-th of T queries of a row with n keys sees the first n - T + t + 1."""
    batch, tokens, heads, head_dim = q.shape
    kv_head = [head // (heads // k.shape[1]) for head in range(heads)]
    rows = []
    for row in range(batch):
        length = k.shape[2] if context_lens is None else context_lens[row]
        keys, values = k[row, kv_head], v[row, kv_head]
        steps = []
        for t in range(tokens):
            seen = length - tokens + t + 1
            weights = (torch.einsum("hd,hkd->hk", q[row, t], keys[:, :seen]) / head_dim**0.5).softmax(-1)
            steps.append(torch.einsum("hk,hkd->hd", weights, values[:, :seen]))
        rows.append(torch.stack(steps))
    return torch.stack(rows)


def inputs(batch: int, tokens: int, heads: int, kv_heads: int, context: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    cache = (batch, kv_heads, context, d)
    return random(batch, tokens, heads, d), random(*cache, seed=1), random(*cache, seed=2)


# Tiny, odd, and a tile of InternViT-300M.
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 5, 7, 6), (1, 1025, 16, 64)])
def test_tile_attention_reference_is_the_formula(shape: tuple[int, ...]) -> None:
    q, k, v = random(*shape), random(*shape, seed=1), random(*shape, seed=2)
    exact = exact_tile_attention(q.double(), k.double(), v.double())
    assert relative_error(tile_attention_reference(q, k, v), exact) < FP32_BOUND


def test_tile_attention_takes_strided_views_of_one_projection() -> None:
    q, k, v = (part.view(2, 5, 3, 8) for part in random(2, 5, 3 * 24).chunk(3, dim=-1))
    packed = tile_attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert relative_error(tile_attention(q, k, v), packed.double()) < FP32_BOUND


@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (9, 1), (5, 123)])
def test_tile_attention_takes_other_keys_than_queries(queries: int, keys: int) -> None:
    q, k, v = random(2, queries, 3, 8), random(2, keys, 3, 8, seed=1), random(2, keys, 3, 8, seed=2)
    exact = exact_tile_attention(q.double(), k.double(), v.double())
    assert relative_error(tile_attention(q, k, v), exact) < FP32_BOUND


def test_tiles_do_not_see_each_other() -> None:
    q, k, v = (random(4, 9, 2, 8, seed=seed) for seed in range(3))
    alone = torch.cat([tile_attention(q[n : n + 1], k[n : n + 1], v[n : n + 1]) for n in range(4)])
    assert relative_error(tile_attention(q, k, v), alone.double()) < FP32_BOUND


@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 6),
    earlier=st.integers(0, 6),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    d=st.sampled_from([2, 6, 16]),
)
def test_causal_attention_reference_is_the_formula_for_prompts_chunks_and_single_tokens(
    batch: int, tokens: int, earlier: int, kv_heads: int, group: int, d: int
) -> None:
    q, k, v = inputs(batch, tokens, kv_heads * group, kv_heads, earlier + tokens, d)
    exact = exact_causal_attention(q.double(), k.double(), v.double())
    assert relative_error(causal_attention_reference(q, k, v), exact) < FP32_BOUND


@settings(max_examples=40)
@given(data=st.data(), tokens=st.integers(1, 4), kv_heads=st.integers(1, 3), group=st.integers(1, 3))
def test_rows_of_different_lengths_see_only_their_own_keys(
    data: st.DataObject, tokens: int, kv_heads: int, group: int
) -> None:
    context = 9
    lens = data.draw(st.lists(st.integers(tokens, context), min_size=1, max_size=4))
    q, k, v = inputs(len(lens), tokens, kv_heads * group, kv_heads, context, 6)
    for row, length in enumerate(lens):  # what lies behind a row's end must not count, whatever it is
        k[row, :, length:] = 1e4
        v[row, :, length:] = 1e4
    exact = exact_causal_attention(q.double(), k.double(), v.double(), lens)
    assert relative_error(causal_attention_reference(q, k, v, torch.tensor(lens)), exact) < FP32_BOUND


# InternLM2-20B: 48 query and 8 KV heads of 128; Qwen2-0.5B: 14 and 2 of 64.
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(48, 8, 128), (14, 2, 64)])
@pytest.mark.parametrize(("tokens", "context"), [(48, 48), (1, 2000), (8, 300)], ids=["prompt", "decode", "chunk"])
def test_causal_attention_reference_at_real_head_sizes(
    heads: int, kv_heads: int, d: int, tokens: int, context: int
) -> None:
    q, k, v = inputs(1, tokens, heads, kv_heads, context, d)
    exact = exact_causal_attention(q.double(), k.double(), v.double())
    assert relative_error(causal_attention_reference(q, k, v), exact) < FP32_BOUND


def test_full_context_lens_mean_the_same_as_none() -> None:
    for tokens in (1, 3, 8):
        q, k, v = inputs(2, tokens, 4, 2, 8, 6)
        given_lens = causal_attention(q, k, v, torch.tensor([8, 8]))
        assert relative_error(causal_attention(q, k, v), given_lens.double()) < FP32_BOUND


def test_on_the_cpu_the_launchers_are_the_references() -> None:
    q, k, v = inputs(2, 3, 4, 2, 5, 6)
    assert torch.equal(causal_attention(q, k, v), causal_attention_reference(q, k, v))
    q, k, v = (random(2, 5, 3, 8, seed=seed) for seed in range(3))
    assert torch.equal(tile_attention(q, k, v), tile_attention_reference(q, k, v))


def test_gradients_flow_to_queries_keys_and_values() -> None:
    check_gradients(tile_attention, exact_tile_attention, *(random(2, 5, 3, 8, seed=seed) for seed in range(3)))
    for tokens in (1, 3, 5):
        check_gradients(causal_attention, exact_causal_attention, *inputs(2, tokens, 4, 2, 5, 6))


def test_shapes_that_do_not_fit_are_refused_with_their_numbers() -> None:
    with pytest.raises(ValueError, match=r"tile_attention: q \(1, 2, 3, 4\), k \(1, 2, 3, 5\)"):
        tile_attention(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5), torch.zeros(1, 2, 3, 4))
    for other in ((2, 9, 3, 4), (1, 9, 2, 4), (1, 9, 3, 5)):  # of other tiles, heads and dims than the queries
        with pytest.raises(ValueError, match="do not fit"):
            tile_attention(torch.zeros(1, 2, 3, 4), torch.zeros(other), torch.zeros(other))
    with pytest.raises(ValueError, match=r"causal_attention: q \(1, 2, 3, 4\) does not fit k \(1, 2, 5, 4\)"):
        causal_attention(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4))
    with pytest.raises(ValueError, match="does not fit"):
        causal_attention(torch.zeros(1, 6, 4, 4), torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4))


# --- the kernel ---

HALF = [torch.bfloat16, torch.float16]
INTERNVIT_TOKENS = [257, 577, 1025, 1297]  # at 224, 336, 448 and 504 pixels


@pytest.fixture(autouse=True, scope="module")
def poisoned_outputs() -> Iterator[None]:
    """What a kernel leaves unwritten is NaN."""
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> Tensor:
        memory = empty(*shape, **options)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield


def target_on(device: torch.device) -> dispatch.Target:
    target = dispatch.target_of(torch.zeros(1, device=device))
    assert target is not None
    return target


def kernels_for(target: dispatch.Target) -> list[Choice]:
    return [choice for choice in CONFIGS[target.arch] if choice["implementation"] == "triton"]


def amid_nan(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Random (tiles, tokens, heads, d), a view of a buffer that has NaN between and beside its heads and tokens."""
    tiles, tokens, heads, d = shape
    buffer = torch.full((tiles, tokens + 2, heads + 1, d + 8), torch.nan)
    buffer[:, 1:-1, :heads, :d] = random(*shape, seed=seed, scale=scale)
    return buffer.to(dtype)[:, 1:-1, :heads, :d]


def check_kernel(q: Tensor, k: Tensor, v: Tensor, choice: Choice) -> None:
    """The kernel errs at most twice as much as SDPA in the same dtype."""
    with dispatch.override("tile_attention", choice):
        result = tile_attention(q, k, v)
    assert result.is_contiguous()
    exact = exact_tile_attention(q.double(), k.double(), v.double())
    assert_errs_like(result, tile_attention_reference(q, k, v), exact)


# Blocks and a rest of queries and keys; a single token; a rest too large for short programs; several tiles and heads.
@pytest.mark.parametrize("shape", [(1, 257, 1, 128), (2, 1, 3, 64), (1, 70, 1, 64), (3, 37, 2, 16)])
@pytest.mark.parametrize("dtype", HALF)
def test_the_kernel_errs_no_more_than_sdpa(device, shape, dtype) -> None:
    q, k, v = (amid_nan(*shape, dtype=dtype, seed=seed).to(device) for seed in range(3))
    check_kernel(q, k, v, kernels_for(target_on(device))[0])


def test_the_kernel_errs_no_more_than_sdpa_on_all_tokens_of_a_tile(device) -> None:
    q, k, v = (amid_nan(1, 1025, 1, 32, dtype=torch.bfloat16, seed=seed).to(device) for seed in range(3))
    check_kernel(q, k, v, kernels_for(target_on(device))[0])


def test_every_candidate_of_the_tuner_is_right(device) -> None:
    q, k, v = (amid_nan(1, 133, 1, 64, dtype=torch.bfloat16, seed=seed).to(device) for seed in range(3))
    for choice in CONFIGS[target_on(device).arch]:
        check_kernel(q, k, v, choice)


@settings(max_examples=25)
@given(
    queries=st.integers(1, 300),
    keys=st.integers(1, 300),
    heads=st.integers(1, 2),
    d=st.sampled_from([5, 16, 24, 32]),
    block_m=st.sampled_from([32, 64, 128]),
    block_n=st.sampled_from([32, 64, 128]),
    tma=st.booleans(),
)
def test_the_kernel_takes_any_number_of_queries_and_keys(
    interpreted, queries, keys, heads, d, block_m, block_n, tma
) -> None:
    q = amid_nan(1, queries, heads, d, dtype=torch.float16)
    k, v = (amid_nan(1, keys, heads, d, dtype=torch.float16, seed=seed) for seed in (1, 2))
    with interpreted():
        check_kernel(q, k, v, attention._triton(block_m, block_n, 4, 2, 2, tma))


@pytest.mark.parametrize("d", [1, 8, 40, 80, 96, 200, 256])
def test_no_head_dim_is_refused(device, d) -> None:
    q = amid_nan(1, 5, 2, d, dtype=torch.bfloat16).to(device)
    k, v = (amid_nan(1, 70, 2, d, dtype=torch.bfloat16, seed=seed).to(device) for seed in (1, 2))
    for choice in (kernels_for(target_on(device))[-1], {"implementation": "flash"}):
        check_kernel(q, k, v, choice)


def test_tokens_of_an_expanded_query_are_read_where_they_are(any_device) -> None:
    # A learned query of every tile, as poolers have.
    q = random(1, 1, 4, 16).bfloat16().to(any_device).expand(3, 1, 4, 16)
    k, v = random(3, 33, 2, 4, 16).bfloat16().to(any_device).unbind(2)
    check_kernel(q, k, v, kernels_for(target_on(any_device))[0])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_equal_and_very_different_logits_keep_the_weights_finite(any_device, dtype, scale) -> None:
    # Scale 30: logits of some thousands, of which a row's largest takes all.
    q, k, v = (random(1, 150, 1, 32, seed=seed, scale=s).to(any_device, dtype) for seed, s in enumerate((scale, 30, 1)))
    check_kernel(q, k, v, kernels_for(target_on(any_device))[0])


@pytest.mark.filterwarnings("ignore:invalid value")  # NaN is what this is about
def test_a_broken_tile_breaks_no_other(device) -> None:
    q, k, v = (random(3, 20, 2, 16, seed=seed).bfloat16().to(device) for seed in range(3))
    choice = kernels_for(target_on(device))[0]
    with dispatch.override("tile_attention", choice):
        sound = tile_attention(q, k, v)
        for part in (q, k, v):
            part[1] = torch.nan
        broken = tile_attention(q, k, v)
    assert torch.equal(broken[::2], sound[::2])
    assert broken[1].isnan().all()


# --- what is launched ---


def recorded(target: dispatch.Target, q: Tensor, k: Tensor, v: Tensor, choice: Choice | None = None) -> list[Launch]:
    launches: list[Launch] = []
    with dispatch.simulate(target, launches):
        if choice is None:
            result = tile_attention(q, k, v)
        else:
            with dispatch.override("tile_attention", choice):
                result = tile_attention(q, k, v)
    assert result.shape == q.shape
    return launches


def joint_projection(tiles: int, tokens: int, heads: int, d: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    qkv = torch.zeros(tiles, tokens, 3 * heads * d, dtype=dtype, device="meta")
    return (part.view(tiles, tokens, heads, d) for part in qkv.chunk(3, dim=-1))


TARGETS = pytest.mark.parametrize("target", [dispatch.A100, dispatch.H200], ids=lambda target: target.arch)


@TARGETS
def test_whether_one_tile_or_many_few_tokens_or_many_it_is_the_same_binary(target) -> None:
    for choice in kernels_for(target):
        keys = {
            launch.key
            for tiles, tokens in ((1, 257), (7, 1025), (16, 1025))
            for launch in recorded(target, *joint_projection(tiles, tokens, 25, 128), choice)
        }
        assert len(keys) == 1


@TARGETS
@pytest.mark.parametrize("tokens", INTERNVIT_TOKENS)
@pytest.mark.parametrize(("heads", "d"), [(25, 128), (16, 64)])
def test_the_tables_know_both_encoders(target, tokens, heads, d) -> None:
    with dispatch.simulate(target):
        choice = dispatch.choose("tile_attention", target, tokens=tokens, head_dim=d, batch=7 * heads)
    assert choice in CONFIGS[target.arch]
    launches = recorded(target, *joint_projection(7, tokens, heads, d))
    assert len(launches) == (choice["implementation"] == "triton")


def test_rows_off_sixteen_bytes_do_without_the_copy_engine() -> None:
    choice = kernels_for(dispatch.H200)[0]
    assert choice["TMA"]

    def uses_tma(*kv: Tensor) -> bool:
        (launch,) = recorded(dispatch.H200, kv[0].contiguous(), *kv, choice)
        return dict(launch.constants)["TMA"]

    joint = torch.zeros(2, 9, 2, 4, 16, dtype=torch.bfloat16, device="meta")
    assert uses_tma(*joint.unbind(2))
    shifted = torch.zeros(joint.numel() + 4, dtype=torch.bfloat16, device="meta")[4:].view(joint.shape)
    assert not uses_tma(*shifted.unbind(2))
    wider = torch.zeros(2, 9, 2, 4, 20, dtype=torch.bfloat16, device="meta")[..., :16]
    assert not uses_tma(*wider.unbind(2))
    assert not uses_tma(*joint[:, :1].expand(joint.shape).unbind(2))


@TARGETS
def test_what_the_kernel_cannot_do_goes_to_torch(target) -> None:
    for shape, dtype in (
        ((2, 9, 2, 16), torch.float32),
        ((1, 9, 1, 257), torch.bfloat16),
        ((1, 250_000, 80, 128), torch.bfloat16),  # 2.5 G elements a tile: offsets within it exceed 32 bits
    ):
        for choice in kernels_for(target):
            assert not recorded(target, *joint_projection(*shape, dtype=dtype), choice)


def test_torch_is_asked_for_its_backends_in_order(monkeypatch) -> None:
    asked = []

    def reference(*qkv: Tensor) -> Tensor:
        asked.append(torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True))
        return qkv[0]

    monkeypatch.setattr(attention, "tile_attention_reference", reference)
    qkv = [torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16)] * 3
    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    for implementation in ("flash", "cudnn"):
        recorded(dispatch.H200, *qkv, {"implementation": implementation})
    assert [[backend.name for backend in order] for order in asked] == [
        ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"],
        ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"],
    ]
    assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == before


@pytest.mark.parametrize("tokens", [1, 2, 37])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_causal_attention_of_a_whole_prompt_is_sdpa(device, tokens, dtype) -> None:
    q, k, v = (part.to(device, dtype) for part in inputs(2, tokens, 6, 2, tokens, 16))
    exact = exact_causal_attention(q.double(), k.double(), v.double())
    assert_errs_like(causal_attention(q, k, v), causal_attention_reference(q, k, v), exact)


def test_two_programs_share_a_multiprocessor_of_an_h200() -> None:
    launches = recorded(dispatch.H200, *joint_projection(7, 1025, 25, 128), kernels_for(dispatch.H200)[0])
    ((_, compiled),) = compile_launches([(launches[0], "sm_90")])
    check(compiled)
    assert compiled.resources is not None
    assert compiled.resources.ctas_per_sm == 2


@pytest.mark.gpu
def test_every_implementation_can_be_captured() -> None:
    qkv = random(2, 257, 3, 4, 64).to("cuda", torch.bfloat16).unbind(2)
    for choice in CONFIGS[target_on(torch.device("cuda")).arch]:
        with dispatch.override("tile_attention", choice):
            expected = tile_attention(*qkv)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = tile_attention(*qkv)
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result, expected)
