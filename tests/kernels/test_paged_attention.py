from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrail.kernels import dispatch, paged_attention
from vitrail.kernels.attention import causal_attention_reference
from vitrail.kernels.dispatch import Choice
from vitrail.kernels.paged_attention import CONFIGS, paged_attention_reference
from vitrail.kernels.quantize import quantize_rows_reference
from vitrail.kernels.quantized_cache import Cache, QuantizedCache, codes_of
from vitrail.kernels.signature import Launch

from .measure import FP32_BOUND, assert_errs_like, random, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NOWHERE = 2**30  # a page far behind any cache: who looks it up reads out of bounds
# (new tokens, keys) of each sequence: a whole prompt, one decoded token, a chunk behind a cached context, and a border
# of blocks and pages met exactly and missed by one.
RAGGED = [(7, 7), (1, 40), (10, 35), (1, 1), (16, 32), (3, 33)]
DECODED = [(1, 33), (1, 0), (1, 96), (1, 1)]


@dataclass(frozen=True)
class Batch:
    """Sequences in shuffled pages. What they do not use is NaN: other pages, and the end of each one's last page."""

    q: Tensor
    caches: tuple[Cache, Cache]
    block_tables: Tensor
    cu_seqlens_q: Tensor
    context_lens: Tensor
    keys: list[Tensor]  # of each sequence (context, kv_heads, d)
    values: list[Tensor]

    @classmethod
    def of(
        cls,
        sequences: list[tuple[int, int]],
        *,
        heads: int,
        kv_heads: int,
        d: int,
        page: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        shuffled: bool = True,
    ) -> "Batch":
        counts = [-(-context // page) for _, context in sequences]
        free = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(0)).tolist()
        tables = torch.full((len(sequences), max(counts) + 1), NOWHERE, dtype=torch.int32)
        caches = torch.full((2, len(free), page, kv_heads, d), torch.nan).to(dtype)
        parts: list[list[Tensor]] = [[], []]
        for index, (_, context) in enumerate(sequences):
            pages = [free.pop() for _ in range(counts[index])]
            pages = pages if shuffled else list(range(sum(counts[:index]), sum(counts[: index + 1])))
            tables[index, : len(pages)] = torch.tensor(pages)
            for cache, part, seed in zip(caches, parts, (1, 2), strict=True):
                part.append(random(context, kv_heads, d, seed=10 * index + seed).to(dtype))
                for token in range(context):
                    cache[pages[token // page], token % page] = part[-1][token]
        news = [new for new, _ in sequences]
        borders = torch.tensor([0, *news]).cumsum(0).int()
        lens = torch.tensor([context for _, context in sequences]).int()
        q = random(sum(news), heads, d).to(dtype)
        keys, values = ([x.to(device) for x in part] for part in parts)
        on = [x.to(device) for x in (q, *caches, tables, borders, lens)]
        return cls(on[0], (on[1], on[2]), *on[3:], keys, values)

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return (self.q, *self.caches, self.block_tables, self.cu_seqlens_q, self.context_lens)

    @property
    def max_seqlen_q(self) -> int:
        return int(self.cu_seqlens_q.diff().max())

    def run(self) -> Tensor:
        return paged_attention.paged_attention(*self.arguments, max_seqlen_q=self.max_seqlen_q)

    def reference(self) -> Tensor:
        return paged_attention_reference(*self.arguments, max_seqlen_q=self.max_seqlen_q)

    def exact(self) -> Tensor:
        """The formula in fp64, a query at a time; zeros where there are no keys."""
        group = self.q.shape[1] // self.caches[0].shape[2]
        out = torch.zeros_like(self.q, dtype=torch.float64)
        borders = self.cu_seqlens_q.tolist()
        for index, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            for token in range(borders[index], borders[index + 1]):
                seen = keys.shape[0] - borders[index + 1] + token + 1
                k, v = (x[:seen].double().repeat_interleave(group, dim=1) for x in (keys, values))
                if seen > 0:
                    scores = torch.einsum("hd,nhd->hn", self.q[token].double(), k) / k.shape[2] ** 0.5
                    out[token] = torch.einsum("hn,nhd->hd", scores.softmax(1), v)
        return out

    def in_8_bits(self) -> "Batch":
        """With int8 caches, and the keys and values that these stand for."""
        caches, numbers = [], []
        for cache, parts in zip(self.caches, (self.keys, self.values), strict=True):
            rows = quantize_rows_reference(codes_of(cache))
            assert rows.scales is not None
            caches.append(QuantizedCache(rows.codes, rows.scales))  # where it was NaN, a scale is
            numbers.append([quantize_rows_reference(part).dequantize() for part in parts])
        return replace(self, caches=tuple(caches), keys=numbers[0], values=numbers[1])

    def check(self) -> None:
        """The launcher errs at most twice as much as plain torch in the same dtype."""
        result = self.run()
        assert result.is_contiguous()
        assert_errs_like(result, self.reference(), self.exact())


# --- the reference ---


@pytest.mark.parametrize("page", [1, 3, 16, 64])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("sequences", [RAGGED, DECODED, [(5, 5)], [(1, 9)]])
def test_reference_is_the_formula_wherever_the_pages_lie(sequences, page, shuffled) -> None:
    batch = Batch.of(sequences, heads=6, kv_heads=2, d=8, page=page, shuffled=shuffled)
    assert relative_error(batch.reference(), batch.exact()) < FP32_BOUND


def test_reference_takes_caches_that_keep_the_tokens_of_a_head_together() -> None:
    for shuffled in (False, True):
        batch = Batch.of(RAGGED, heads=6, kv_heads=2, d=8, page=16, shuffled=shuffled)
        # (kv_heads, num_blocks, block_size, d) in memory: what a CPU reads fastest.
        k, v = (codes_of(cache).permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for cache in batch.caches)
        assert relative_error(replace(batch, caches=(k, v)).reference(), batch.exact()) < FP32_BOUND


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_causal_attention_over_the_gathered_keys(dtype) -> None:
    batch = Batch.of(RAGGED, heads=6, kv_heads=2, d=8, page=16, dtype=dtype)
    news = batch.q.split(batch.cu_seqlens_q.diff().tolist())
    parts = [
        causal_attention_reference(new[None], k[None].transpose(1, 2), v[None].transpose(1, 2))[0]
        for new, k, v in zip(news, batch.keys, batch.values, strict=True)
    ]
    assert torch.equal(batch.reference(), torch.cat(parts))


def test_on_the_cpu_the_launcher_is_the_reference() -> None:
    batch = Batch.of(RAGGED, heads=4, kv_heads=4, d=8, page=3)
    assert torch.equal(batch.run(), batch.reference())


# --- the kernels ---


def decoding(block_n: int = 32) -> Choice:
    return paged_attention._decode(block_n, 4, 2, programs_per_sm=1)


def sms_for(num_splits: int, batch: Batch) -> dispatch.Target:
    """A GPU so small that decoding `batch` is split in so many parts, one for each multiprocessor."""
    programs = len(batch.keys) * batch.caches[0].shape[2]
    return dispatch.Target("sm_80", num_splits * programs, "a small GPU")


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_errs_no_more_than_the_reference(any_device, dtype) -> None:
    batch = Batch.of(RAGGED, heads=6, kv_heads=2, d=32, page=16, dtype=dtype, device=any_device)
    with dispatch.override("paged_prefill", paged_attention._prefill(32, 16, 4, 2)):
        batch.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs_per_sm", [0, 2], ids=["whole", "split"])
def test_decoding_errs_no_more_than_the_reference(any_device, dtype, programs_per_sm) -> None:
    batch = Batch.of(DECODED, heads=6, kv_heads=2, d=32, page=32, dtype=dtype, device=any_device)
    with dispatch.override("paged_decode", paged_attention._decode(32, 4, 2, programs_per_sm)):
        batch.check()


def test_prefill_of_a_head_of_internlm2_20b_behind_a_cached_context(device) -> None:
    Batch.of([(25, 150), (45, 45)], heads=6, kv_heads=1, d=128, page=64, dtype=torch.bfloat16, device=device).check()


def test_decoding_of_a_head_of_internlm2_20b_in_splits(device) -> None:
    Batch.of([(1, 300), (1, 64)], heads=6, kv_heads=1, d=128, page=64, dtype=torch.bfloat16, device=device).check()


@pytest.mark.parametrize("operation", ["paged_prefill", "paged_decode"])
def test_every_candidate_of_the_tuner_is_right(device, operation) -> None:
    target = dispatch.target_of(torch.zeros(1, device=device))
    assert target is not None
    sequences = [(20, 90), (1, 70)] if operation == "paged_prefill" else [(1, 90), (1, 200)]
    batch = Batch.of(sequences, heads=7, kv_heads=1, d=64, page=64, dtype=torch.bfloat16, device=device)
    for choice in CONFIGS[operation][target.arch]:
        with dispatch.override(operation, choice):
            batch.check()


@pytest.mark.parametrize("d", [1, 8, 40, 80, 96])
@pytest.mark.parametrize("new", [1, 5])
def test_no_head_dim_is_refused(any_device, d, new) -> None:
    batch = Batch.of([(new, 21), (1, 3)], heads=4, kv_heads=2, d=d, page=16, dtype=torch.float16, device=any_device)
    choice = decoding() if new == 1 else paged_attention._prefill(32, 16, 4, 2)
    with dispatch.override("paged_decode" if new == 1 else "paged_prefill", choice):
        batch.check()


@settings(max_examples=12)
@given(
    chunks=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 70)), min_size=1, max_size=3),
    group=st.integers(1, 8),
    kv_heads=st.integers(1, 2),
    page=st.sampled_from([1, 8, 16, 64]),
    block_m=st.sampled_from([32, 64]),
    block_n=st.sampled_from([16, 32]),
)
def test_prefill_takes_any_lengths_groups_and_pages(
    interpreted, chunks, group, kv_heads, page, block_m, block_n
) -> None:
    sequences = [(2, 2), *((new, new + cached) for new, cached in chunks)]
    batch = Batch.of(sequences, heads=group * kv_heads, kv_heads=kv_heads, d=16, page=page, dtype=torch.float16)
    with interpreted(), dispatch.override("paged_prefill", paged_attention._prefill(block_m, block_n, 4, 2)):
        batch.check()


@settings(max_examples=12)
@given(
    contexts=st.lists(st.integers(0, 200), min_size=1, max_size=3),
    group=st.integers(1, 17),
    kv_heads=st.integers(1, 2),
    page=st.sampled_from([1, 8, 16, 64]),
    block_n=st.sampled_from([16, 32]),
    num_splits=st.integers(1, 5),
)
def test_decoding_takes_any_contexts_groups_pages_and_splits(
    interpreted, contexts, group, kv_heads, page, block_n, num_splits
) -> None:
    sequences = [(1, context) for context in contexts]
    batch = Batch.of(sequences, heads=group * kv_heads, kv_heads=kv_heads, d=16, page=page, dtype=torch.float16)
    with dispatch.simulate(sms_for(num_splits, batch)), dispatch.override("paged_decode", decoding(block_n)):
        batch.check()


@pytest.mark.parametrize("sequences", [[(3, 0), (4, 20)], [(1, 0), (1, 40)], [(1, 0)]])
def test_rows_that_pad_a_batch_come_out_as_zeros(any_device, sequences) -> None:
    batch = Batch.of(sequences, heads=2, kv_heads=1, d=16, page=16, dtype=torch.float16, device=any_device)
    for choice in (decoding(), paged_attention._decode(32, 4, 2, programs_per_sm=0)):
        with dispatch.override("paged_decode", choice):
            result = batch.run()
        padding = result[: sequences[0][0]]
        assert torch.equal(padding, torch.zeros_like(padding))
        assert_errs_like(result, batch.reference(), batch.exact())


@pytest.mark.parametrize("longest", [1, 5])
@pytest.mark.parametrize("programs_per_sm", [0, 1])
def test_sequences_without_new_tokens_are_passed_over(any_device, longest, programs_per_sm) -> None:
    sequences = [(0, 20), (1, 40), (0, 0), (longest, 9), (0, 5)]
    batch = Batch.of(sequences, heads=2, kv_heads=1, d=16, page=16, dtype=torch.float16, device=any_device)
    with dispatch.override("paged_decode", paged_attention._decode(32, 4, 2, programs_per_sm)):
        batch.check()


def test_a_sequence_gets_in_a_batch_what_it_gets_alone(any_device) -> None:
    sequences = [(7, 7), (1, 40), (10, 35)]
    batch = Batch.of(sequences, heads=4, kv_heads=2, d=16, page=16, dtype=torch.float16, device=any_device)
    news = batch.cu_seqlens_q.diff().tolist()
    together, queries = batch.run().split(news), batch.q.split(news)
    for index in (0, 2):
        alone = paged_attention.paged_attention(
            queries[index],
            *batch.caches,
            batch.block_tables[index : index + 1],
            torch.tensor([0, news[index]], dtype=torch.int32, device=any_device),
            batch.context_lens[index : index + 1],
            max_seqlen_q=news[index],
        )
        assert torch.equal(alone, together[index])


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_may_be_beyond_what_an_exponential_can_hold(any_device, new, sign) -> None:
    batch = Batch.of([(new, 40)], heads=2, kv_heads=1, d=16, page=16, dtype=torch.float16, device=any_device)
    keys, values = batch.caches
    loud = replace(
        batch, q=batch.q.abs() * sign * 200, caches=(codes_of(keys).abs(), values), keys=[k.abs() for k in batch.keys]
    )
    with dispatch.override("paged_decode", decoding()):
        loud.check()


def recorded(num_seqs: int, max_blocks: int) -> list[str]:
    """The kernels of a decode step of InternLM2-20B, as launches of tensors without memory."""
    launches: list[Launch] = []

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with dispatch.simulate(dispatch.H200, launches):
        out = paged_attention.paged_attention(
            meta(num_seqs, 48, 128),
            *(meta(99, 64, 8, 128), meta(99, 64, 8, 128)),
            *(meta(*shape, dtype=torch.int32) for shape in ((num_seqs, max_blocks), (num_seqs + 1,), (num_seqs,))),
            max_seqlen_q=1,
        )
    assert out.shape == (num_seqs, 48, 128)
    return [launch.name for launch in launches]


def test_few_sequences_are_split_and_many_are_not() -> None:
    both = ["_paged_decode_kernel", "_join_splits_kernel"]
    assert recorded(num_seqs=1, max_blocks=32) == both
    assert recorded(num_seqs=16, max_blocks=32) == both
    assert recorded(num_seqs=1, max_blocks=1) == ["_paged_decode_kernel"]
    assert recorded(num_seqs=64, max_blocks=32) == ["_paged_decode_kernel"]


# --- caches of 8 bits ---


@pytest.mark.parametrize("sequences", [RAGGED, DECODED])
@pytest.mark.parametrize("shuffled", [False, True])
def test_reference_reads_caches_of_8_bits(sequences, shuffled) -> None:
    batch = Batch.of(sequences, heads=6, kv_heads=2, d=8, page=16, shuffled=shuffled).in_8_bits()
    assert relative_error(batch.reference(), batch.exact()) < FP32_BOUND


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequences", [RAGGED, DECODED], ids=["prefill", "decode"])
def test_caches_of_8_bits_cost_no_more_than_what_they_stand_for(any_device, dtype, sequences) -> None:
    batch = Batch.of(sequences, heads=6, kv_heads=2, d=32, page=32, dtype=dtype, device=any_device).in_8_bits()
    with dispatch.override("paged_prefill_int8", paged_attention._prefill(32, 16, 4, 2)):
        for programs_per_sm in (0, 2):
            choice = paged_attention._decode(32, 4, 2, programs_per_sm)
            with dispatch.override("paged_decode_int8", choice):
                batch.check()


@pytest.mark.parametrize("operation", ["paged_prefill_int8", "paged_decode_int8"])
def test_every_candidate_of_the_tuner_reads_caches_of_8_bits(device, operation) -> None:
    target = dispatch.target_of(torch.zeros(1, device=device))
    assert target is not None
    sequences = [(20, 90), (1, 70)] if "prefill" in operation else [(1, 90), (1, 200)]
    batch = Batch.of(sequences, heads=7, kv_heads=1, d=64, page=64, dtype=torch.bfloat16, device=device).in_8_bits()
    for choice in CONFIGS[operation][target.arch]:
        with dispatch.override(operation, choice):
            batch.check()


@settings(max_examples=8)
@given(
    contexts=st.lists(st.integers(0, 100), min_size=1, max_size=2),
    new=st.integers(1, 6),
    group=st.integers(1, 8),
    page=st.sampled_from([1, 8, 64]),
    block_n=st.sampled_from([16, 32]),
)
def test_caches_of_8_bits_may_have_any_lengths_groups_and_pages(
    interpreted, contexts, new, group, page, block_n
) -> None:
    sequences = [(new if context >= new else 1, context) for context in contexts]
    batch = Batch.of(sequences, heads=2 * group, kv_heads=2, d=16, page=page, dtype=torch.float16).in_8_bits()
    prefill, decode = paged_attention._prefill(32, block_n, 4, 2), decoding(block_n)
    with (
        dispatch.override("paged_prefill_int8", prefill),
        dispatch.override("paged_decode_int8", decode),
        interpreted(),
    ):
        batch.check()


# --- refusals ---


def test_shapes_that_do_not_fit_are_refused() -> None:
    batch = Batch.of([(2, 2)], heads=4, kv_heads=2, d=8, page=16)
    with pytest.raises(ValueError, match=r"q \(2, 3, 8\) and caches \(3, 16, 2, 8\)"):
        replace(batch, q=batch.q[:, :3]).run()
    with pytest.raises(ValueError, match=r"borders \(3,\)"):
        replace(batch, cu_seqlens_q=torch.tensor([0, 1, 2])).run()


def test_kernels_want_whole_caches_in_pages_of_a_power_of_two(any_device) -> None:
    batch = Batch.of([(1, 2)], heads=4, kv_heads=2, d=8, page=16, device=any_device)
    spread = tuple(codes_of(cache).transpose(1, 2).contiguous().transpose(1, 2) for cache in batch.caches)
    with pytest.raises(ValueError, match="caches of strides"):
        replace(batch, caches=spread).run()
    with pytest.raises(ValueError, match="blocks of 3"):
        Batch.of([(1, 2)], heads=4, kv_heads=2, d=8, page=3, device=any_device).run()
