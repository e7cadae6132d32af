"""The C++ operations on tokens (csrc/cpu/token_ops.h) against the references, with every instruction set."""

from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels import dispatch
from vitrail.kernels.cpu_extension import extension
from vitrail.kernels.norm import residual_norm, residual_norm_reference, rms_norm, rms_norm_reference
from vitrail.kernels.paged_attention import paged_attention, paged_attention_reference
from vitrail.kernels.qk_norm import qk_norm, qk_norm_reference
from vitrail.kernels.rope import rope_and_cache, rope_and_cache_reference

pytestmark = pytest.mark.skipif(extension is None, reason="the C++ extension was not built")

SETS = extension.instruction_sets() if extension is not None else []
# In fp32 sums of up to a few thousand products come in another order; bf16 rounds the same numbers once more.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 6, 2, 40, 16


class With:
    """The extension, made to use one instruction set."""

    def __init__(self, isa: str) -> None:
        self.isa = isa
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> None:
            self.calls.append(name)
            getattr(extension, name)(*arguments[:-1], self.isa)

        return call


@pytest.fixture(params=SETS)
def used(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[With]:
    """In inference mode, which is when launchers take the extension."""
    with_isa = With(request.param)
    monkeypatch.setattr(dispatch, "extension", with_isa)
    with torch.inference_mode():
        yield with_isa


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def random(request: pytest.FixtureRequest) -> Any:
    """Makes random tensors of a dtype."""
    torch.manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape).to(request.param)

    return make


def close(result: Tensor, expected: Tensor) -> bool:
    error = (result.double() - expected.double()).abs().max() / expected.double().abs().max()
    return error.item() <= BOUNDS[expected.dtype]


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (2, 3, 3200)])
def test_norms_are_the_reference(used: With, random: Any, shape: tuple[int, ...]) -> None:
    x, branch, weight, scale = random(*shape), random(*shape), random(shape[-1]), random(shape[-1])
    assert close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    for factor in (None, scale):
        total, normed = residual_norm(x, branch, factor, weight, None, 1e-6)
        expected_total, expected = residual_norm_reference(x, branch, factor, weight, None, 1e-6)
        assert close(total, expected_total)
        assert close(normed, expected)
    assert used.calls == ["rms_norm"] * 3


def test_norms_take_rows_of_a_wider_buffer(used: With, random: Any) -> None:
    qkv, weight = random(2, 9, 3 * 48), random(48)
    for part, expected in zip(
        qk_norm(qkv, weight, weight + 1, 1e-6), qk_norm_reference(qkv, weight, weight + 1, 1e-6), strict=True
    ):
        assert close(part, expected)


def test_an_infinite_or_missing_number_reaches_the_norm_of_its_row_alone(used: With) -> None:
    x = torch.ones(3, 32)
    x[1, 5] = torch.nan
    normed = rms_norm(x, torch.ones(32), 1e-6)
    assert normed[1].isnan().all()
    assert normed[[0, 2]].isfinite().all()


def caches(random: Any, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Of the layout that a CPU has: the tokens of each head together."""
    k, v = (random(KV_HEADS, num_blocks, BLOCK, HEAD_DIM).movedim(0, 2) for _ in range(2))
    return k, v


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("slots", [[3, -1, 47, 0], [5]])
def test_rotation_and_the_write_to_the_cache_are_the_reference(
    used: With, random: Any, normed: bool, slots: list[int]
) -> None:
    tokens = len(slots)
    qkv = random(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    table = [random(tokens, HEAD_DIM) for _ in range(2)]
    weights = [random(HEAD_DIM) if normed else None for _ in range(2)]
    k_cache, v_cache = caches(random, 3)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    options: Any = {"q_norm": weights[0], "k_norm": weights[1], "eps": 1e-5}
    expected = rope_and_cache_reference(qkv, *table, expected_k, expected_v, torch.tensor(slots), HEADS, **options)
    q = rope_and_cache(qkv, *table, k_cache, v_cache, torch.tensor(slots), HEADS, **options)
    assert used.calls == ["rope_and_cache"]
    assert close(q, expected)
    assert close(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)
    if not normed:  # the same few operations, each rounded
        assert torch.equal(q, expected)
        assert torch.equal(k_cache, expected_k)


def decode(random: Any, contexts: list[int], *, num_blocks: int = 40) -> tuple[Any, ...]:
    k_cache, v_cache = caches(random, num_blocks)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).int()
    width = max(max(-(-context // BLOCK) for context in contexts), 1)
    tables = torch.stack([order[first * 7 % 11 :][:width] for first in range(len(contexts))])
    borders = torch.arange(len(contexts) + 1, dtype=torch.int32)
    q = random(len(contexts), HEADS, HEAD_DIM)
    return q, k_cache, v_cache, tables, borders, torch.tensor(contexts, dtype=torch.int32)


@pytest.mark.parametrize("contexts", [[1], [16, 17, 1, 0, 33], [300], [5] * 9])
def test_decoding_is_the_reference_wherever_the_blocks_lie(used: With, random: Any, contexts: list[int]) -> None:
    arguments = decode(random, contexts)
    out = paged_attention(*arguments, max_seqlen_q=1)
    assert used.calls == ["paged_decode"]
    exact = [arguments[0].double(), arguments[1].double(), arguments[2].double(), *arguments[3:]]
    assert close(out, paged_attention_reference(*exact, max_seqlen_q=1).to(out.dtype))


@pytest.mark.parametrize("new", [[1, 1, 7], [1, 4, 1], [3], [1, 0, 2]])
def test_steps_that_also_run_prompts_are_the_reference(used: With, random: Any, new: list[int]) -> None:
    _, k_cache, v_cache, tables, _, contexts = decode(random, [40, 17, 30][: len(new)])
    borders = torch.tensor([0, *accumulate(new)], dtype=torch.int32)
    arguments = (random(sum(new), HEADS, HEAD_DIM), k_cache, v_cache, tables, borders, contexts)
    exact = [part.double() for part in arguments[:3]]
    expected = paged_attention_reference(*exact, *arguments[3:], max_seqlen_q=max(new))
    assert close(paged_attention(*arguments, max_seqlen_q=max(new)), expected.to(v_cache.dtype))


def test_large_scores_do_not_overflow_and_a_missing_number_stays_with_its_sequence(used: With) -> None:
    torch.manual_seed(0)
    q, *rest = decode(lambda *shape: torch.randn(shape), [20, 20])
    q = q * 1e3
    expected = paged_attention_reference(q.double(), rest[0].double(), rest[1].double(), *rest[2:], max_seqlen_q=1)
    # One key takes nearly all of the weight, and the rounding of its score, some 1e4, is all there is of error.
    assert (paged_attention(q, *rest, max_seqlen_q=1) - expected).abs().max() < 1e-2
    q[0, 0, 0] = torch.nan
    out = paged_attention(q, *rest, max_seqlen_q=1)
    assert out[0, 0].isnan().all()
    assert out[1].isfinite().all()


@given(st.lists(st.integers(0, 70), min_size=1, max_size=6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_row_depends_on_no_other_row_nor_on_the_instruction_set(contexts: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(len(contexts))
    q, k, v, tables, _, lens = decode(lambda *shape: torch.randn(shape).to(dtype), contexts)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        results = []
        for isa in SETS:
            patch.setattr(dispatch, "extension", With(isa))
            attend = partial(paged_attention, max_seqlen_q=1)
            results.append(attend(q, k, v, tables, torch.arange(len(q) + 1, dtype=torch.int32), lens))
            for row in range(len(q)):
                alone = slice(row, row + 1)
                borders = torch.tensor([0, 1], dtype=torch.int32)
                assert torch.equal(attend(q[alone], k, v, tables[alone], borders, lens[alone])[0], results[-1][row])
        assert all(torch.equal(result, results[0]) for result in results)


def test_many_rows_on_several_threads_are_the_same_as_few_on_one(used: With, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    torch.manual_seed(0)
    x, weight = torch.randn(700, 1024), torch.randn(1024)
    many = rms_norm(x, weight, 1e-6)
    assert torch.equal(many[123:125], rms_norm(x[123:125], weight, 1e-6))
    q, *rest = decode(lambda *shape: torch.randn(shape), [600] * 24, num_blocks=60)
    few = paged_attention(q[5:6], *rest[:2], rest[2][5:6], torch.tensor([0, 1]).int(), rest[4][5:6], max_seqlen_q=1)
    assert torch.equal(paged_attention(q, *rest, max_seqlen_q=1)[5:6], few)


def test_gradients_and_other_dtypes_take_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = With("")
    monkeypatch.setattr(dispatch, "extension", refused)
    weight = torch.ones(8, requires_grad=True)
    rms_norm(torch.ones(2, 8), weight, 1e-6).sum().backward()
    assert weight.grad is not None
    with torch.inference_mode():
        rms_norm(torch.ones(2, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64), 1e-6)
        rms_norm(torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(8), 1e-6)
    assert refused.calls == []
