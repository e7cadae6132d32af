"""Picking tokens: the reference against transformers' logits processors, the kernels against the reference in fp64."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vitrail.kernels import dispatch, sampling
from vitrail.kernels.sampling import (
    NUCLEUS_CANDIDATES,
    draw,
    greedy_tokens,
    greedy_tokens_reference,
    keep_likely,
    sample_tokens,
    sample_tokens_reference,
)

VOCAB = 97
LAST = 1 - 2**-53  # the greatest uniform number
# How far the kernel's probabilities may be from exact ones; see kernels/sampling.py.
EPSILON = 2e-6


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def filters(
    rows: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same filters for every row."""
    numbers = (temperature, top_k, top_p, min_p)
    temperatures, top_ks, top_ps, min_ps = (torch.full((rows,), number, dtype=torch.float64) for number in numbers)
    return temperatures, top_ks.long(), top_ps, min_ps


def sampled(
    device: torch.device, row: Sequence[float] | Tensor, uniforms: Sequence[float], **keywords: Any
) -> list[int]:
    """The tokens that each of the uniform numbers draws from one row of logits."""
    n = len(uniforms)
    logits = torch.as_tensor(row, dtype=torch.float32).expand(n, -1).to(device)
    parameters = (*filters(n, **keywords), torch.tensor(uniforms, dtype=torch.float64))
    return sample_tokens(logits, *(values.to(device) for values in parameters)).tolist()


# --- the reference ---


@pytest.mark.parametrize("vocab", [5, VOCAB, NUCLEUS_CANDIDATES + 500])
@pytest.mark.parametrize(
    "keywords",
    [
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_k": 10_000},
        {"top_p": 0.9},
        {"top_p": 0.05},
        {"top_p": 0.9999},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.8, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 0.2, "top_p": 0.5, "min_p": 0.2},
    ],
)
def test_unlikely_tokens_are_ruled_out_as_transformers_does(keywords: dict[str, Any], vocab: int) -> None:
    theirs = LogitsProcessorList([TemperatureLogitsWarper(keywords.get("temperature", 1.0))])
    theirs += [TopKLogitsWarper(keywords["top_k"])] if "top_k" in keywords else []
    theirs += [TopPLogitsWarper(keywords["top_p"])] if "top_p" in keywords else []
    theirs += [MinPLogitsWarper(keywords["min_p"])] if "min_p" in keywords else []
    logits = random_logits(16, vocab)
    ids: Any = torch.zeros(16, 1, dtype=torch.long)
    kept = keep_likely(logits.clone(), *filters(16, **keywords))
    torch.testing.assert_close(kept, theirs(ids, logits), rtol=1e-6, atol=1e-6)


def test_a_wide_nucleus_is_found_beyond_the_first_candidates() -> None:
    logits = random_logits(2, NUCLEUS_CANDIDATES * 4, scale=0.01)
    kept = keep_likely(logits.clone(), *filters(2, top_p=0.75)) > -math.inf
    assert kept.sum() > 2 * 2 * NUCLEUS_CANDIDATES
    probabilities = logits.softmax(-1)
    assert bool((torch.where(kept, probabilities, 0).sum(-1) >= 0.75 - 1e-4).all())


def test_rows_are_ruled_out_each_by_its_own_filters() -> None:
    several: list[dict[str, Any]] = [
        {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.5}, {"min_p": 0.3, "top_k": 50}, {"top_k": 9}
    ]  # fmt: skip
    rows = [filters(1, **keywords) for keywords in several]
    logits = random_logits(len(several))
    together = keep_likely(logits.clone(), *(torch.cat(column) for column in zip(*rows, strict=True)))
    for row, alone in enumerate(rows):
        assert torch.equal(together[row], keep_likely(logits[row : row + 1].clone(), *alone)[0])


def test_the_reference_leaves_the_callers_logits_alone() -> None:
    logits = random_logits(3)
    kept = logits.clone()
    sample_tokens_reference(logits, *filters(3, top_k=5, top_p=0.5, min_p=0.1), torch.rand(3, dtype=torch.float64))
    assert torch.equal(logits, kept)


def test_on_the_cpu_the_launchers_are_the_references() -> None:
    logits, parameters = random_logits(8), (*filters(8, top_k=9, top_p=0.9), torch.linspace(0, LAST, 8).double())
    assert torch.equal(sample_tokens(logits, *parameters), sample_tokens_reference(logits, *parameters))
    for ours, reference in zip(greedy_tokens(logits), greedy_tokens_reference(logits), strict=True):
        assert torch.equal(ours, reference)


def test_parameters_for_another_number_of_rows_are_refused_by_name() -> None:
    temperatures, top_ks, _, min_ps = filters(2)
    with pytest.raises(ValueError, match=r"sample_tokens: top_ps is \(3,\) for 2 rows"):
        sample_tokens(random_logits(2), temperatures, top_ks, torch.ones(3), min_ps, torch.zeros(2))


# --- the kernels ---


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds values that would be noticed, if a kernel read what it had not written."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **kw: empty(*size, **kw).fill_(math.nan if kw["dtype"].is_floating_point else 3)
    )


@pytest.mark.parametrize("vocab", [1, 2, 7, 64, 1000, 92_553])
def test_the_greedy_kernel_finds_the_first_of_the_best_tokens(any_device, poisoned, vocab) -> None:
    logits = random_logits(3, vocab).to(any_device)
    logits[1] = logits[1].round()  # ties
    logits[2] = -math.inf
    logits[2, vocab // 2] = -50.0
    tokens, peaks = greedy_tokens(logits)
    expected, _ = greedy_tokens_reference(logits.cpu())
    assert tokens.tolist() == expected.tolist()
    assert torch.equal(peaks, logits.amax(-1))


@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf])
def test_the_peak_of_a_broken_row_is_not_finite(any_device, poison) -> None:
    logits = random_logits(4).to(any_device)
    logits[1, 70] = poison
    logits[3] = -math.inf
    tokens, peaks = greedy_tokens(logits)
    assert peaks.isfinite().tolist() == [True, False, True, False]
    assert peaks.isnan().tolist() == [False, math.isnan(poison), False, False]
    assert tokens[1] == 70
    assert all(0 <= token < VOCAB for token in sampled(any_device, logits[1].cpu(), [0.0, 0.5], top_k=5, top_p=0.9))
    assert all(0 <= token < VOCAB for token in sampled(any_device, logits[3].cpu(), [0.0, 0.5], top_k=5, top_p=0.9))


def check_against_exact(
    tokens: Sequence[int], row: Tensor, uniforms: Sequence[float], top_p: float, **rest: Any
) -> None:
    """Each token is drawn, in exact arithmetic, by a number and from a nucleus within EPSILON of the given ones."""
    right = [False] * len(tokens)
    for near in {top_p} if top_p == 1 else {top_p, max(top_p - EPSILON, 1e-9), min(top_p + EPSILON, 1.0)}:
        kept = keep_likely(row[None].double(), *filters(1, top_p=near, **rest))
        for place, (token, uniform) in enumerate(zip(tokens, uniforms, strict=True)):
            edges = torch.tensor([min(uniform + EPSILON, LAST), max(uniform - EPSILON, 0.0)], dtype=torch.float64)
            first, last = draw(kept.expand(2, -1).contiguous(), edges).tolist()
            right[place] |= first <= token <= last and bool(kept[0, token] > -math.inf)
    assert all(right), (tokens, right)


several_filters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1.0, 0.7, 1e-5, 0.05, 3.0, 100.0]),
        "top_k": st.sampled_from([0, 1, 2, 5, 40, 150, 10**9]),
        "top_p": st.one_of(st.just(1.0), st.sampled_from([0.999999, 0.95, 0.5, 0.05]), st.floats(1e-6, 1)),
        "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.9, 1.0]),
    }
)


any_row_and_filters = given(
    vocab=st.integers(1, 300),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
    step=st.sampled_from([None, 0.5]),
    banned=st.floats(0, 1),
    keywords=several_filters,
    uniforms=st.tuples(st.floats(0, LAST), st.sampled_from([0.0, LAST])),
)


def check_draw(interpreted, vocab, seed, scale, step, banned, keywords, uniforms) -> None:
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(vocab, generator=generator) * scale
    row = row if step is None else (row / step).round() * step  # ties
    ruled_out = torch.rand(vocab, generator=generator) < banned**4
    ruled_out[seed % vocab] = False
    row[ruled_out] = -math.inf
    with interpreted():
        tokens = sampled(torch.device("cpu"), row, uniforms, **keywords)
    check_against_exact(tokens, row, uniforms, **keywords)


@settings(max_examples=20)
@any_row_and_filters
def test_the_kernel_draws_what_exact_arithmetic_does(interpreted, **drawn) -> None:
    check_draw(interpreted, **drawn)


@pytest.mark.slow
@settings(max_examples=1000)
@any_row_and_filters
def test_the_kernel_draws_what_exact_arithmetic_does_from_many_rows(interpreted, **drawn) -> None:
    check_draw(interpreted, **drawn)


@pytest.mark.parametrize(
    "keywords",
    [
        {"temperature": 1.7},
        {"top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 3.0, "min_p": 0.5},
        {"temperature": 0.8, "top_k": 4, "top_p": 0.95, "min_p": 0.05},
    ],
)
def test_every_token_is_drawn_on_its_share_and_no_other(any_device, poisoned, keywords) -> None:
    row = torch.tensor([0.3, -math.inf, 2.0, 1.0, 2.0, 0.1, -1.0])
    kept = keep_likely(row[None].double(), *filters(1, **keywords))[0]
    shares = kept.softmax(-1)
    tokens = (shares > 0).nonzero().flatten().tolist()
    begins, ends = (1 - shares.cumsum(-1))[tokens], (1 - shares.cumsum(-1) + shares)[tokens]
    uniforms = [*(begins + 5 * EPSILON).clamp(min=0).tolist(), *(ends - 5 * EPSILON).tolist()]
    assert sampled(any_device, row, uniforms, **keywords) == tokens * 2


@pytest.mark.parametrize("keywords", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": math.exp(-0.9)}])
def test_tokens_that_tie_with_the_last_one_stay(any_device, keywords) -> None:
    # Two of the best have 0.64 of the probability, with its ties the second 0.86.
    row = [1.0, 4.0, 3.5, -2.0, 3.5, 2.5, 3.5]
    assert sampled(any_device, row, [0.0, 0.3, 0.5, LAST], **keywords) == [6, 4, 2, 1]


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_neighbouring_floats_are_told_apart(any_device, top_k) -> None:
    row = 1 + torch.arange(8) * 2**-23
    assert sampled(any_device, row, [LAST], top_k=top_k) == [8 - top_k]


@pytest.mark.parametrize("keywords", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.5}])
def test_the_only_possible_token_is_drawn_by_any_number(any_device, keywords) -> None:
    for place in (63, 64):
        row = torch.full((65,), -math.inf)
        row[place] = -3.0
        assert sampled(any_device, row, [0.0, LAST], **keywords) == [place] * 2


def test_a_token_of_probability_0_is_never_drawn(any_device) -> None:
    row = torch.full((150,), -200.0)
    row[[70, 80]] = 0.0
    assert sampled(any_device, row, [0.0, 0.6, 0.4, LAST]) == [80, 70, 80, 70]


@pytest.mark.parametrize("base", [1.02, 1.7])
@pytest.mark.parametrize(("filters_for", "kept"), [("top_k", 2), ("top_k", 5), ("top_k", 9), ("top_p", 5)])
def test_the_last_token_that_stays_may_be_alone_in_its_group_at_any_distance(
    any_device, base, filters_for, kept
) -> None:
    # One token a group, in a distance that grows; hot enough that all are about as likely.
    row = torch.full((640,), -math.inf)
    row[::64] = -(base ** torch.arange(10))
    keywords = {"top_k": kept} if filters_for == "top_k" else {"top_p": (kept - 0.5) / 10}
    uniforms = [0.1 / kept, 1 - 0.1 / kept]
    assert sampled(any_device, row, uniforms, temperature=100.0 * base**9, **keywords) == [64 * (kept - 1), 0]


@pytest.mark.parametrize(
    ("keywords", "step"),
    [
        ({"top_p": 0.9}, None),
        ({"top_k": 300}, None),
        ({"temperature": 2.0, "top_k": 200, "top_p": 0.9}, None),
        pytest.param({"top_p": 0.8}, 4.0, id="many ties"),
    ],
)
def test_more_candidates_than_fit_into_registers_are_narrowed_down_first(
    any_device, monkeypatch, poisoned, keywords, step
) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 128)
    monkeypatch.setattr(sampling, "CANDIDATES", 32)
    row = random_logits(1, 400, scale=2.0)[0]
    row = row if step is None else (row / step).round() * step
    uniforms = [0.3]
    check_against_exact(sampled(any_device, row, uniforms, **keywords), row, uniforms, **{"top_p": 1.0, **keywords})


@pytest.mark.parametrize("keywords", [{}, {"temperature": 0.7, "top_k": 200, "top_p": 0.9, "min_p": 0.01}])
def test_tokens_of_the_vocabulary_of_internlm2_are_drawn_exactly(any_device, keywords) -> None:
    row = random_logits(1, 92_553, scale=2.5)[0]
    row[::300] += 9  # a nucleus of some hundred tokens
    check_against_exact(sampled(any_device, row, [0.7], **keywords), row, [0.7], **{"top_p": 1.0, **keywords})


def test_a_row_gets_the_same_token_alone_and_in_any_batch(any_device) -> None:
    rows: list[dict[str, Any]] = [{"top_k": 5}, {"top_p": 0.9}, {}, {"temperature": 2.0, "min_p": 0.05}]
    logits = random_logits(len(rows), 200).to(any_device)
    columns = zip(*(filters(1, **keywords) for keywords in rows), strict=True)
    parameters = [torch.cat(column).to(any_device) for column in columns]
    parameters.append(torch.linspace(0.1, 0.9, len(rows), dtype=torch.float64, device=any_device))
    together = sample_tokens(logits, *parameters)
    for row in range(len(rows)):
        alone = sample_tokens(logits[row : row + 1], *(values[row : row + 1] for values in parameters))
        assert torch.equal(alone, together[row : row + 1])


def test_frequencies_are_those_of_the_distribution(any_device) -> None:
    draws = 50 if any_device.type == "cpu" else 10_000  # the interpreter is slow
    row = random_logits(1, vocab=5, scale=1.0)[0]
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    counts = Counter(sampled(any_device, row, uniforms, temperature=0.8))
    expected = (row / 0.8).softmax(-1) * draws
    chi_square = sum((counts[token] - float(mean)) ** 2 / float(mean) for token, mean in enumerate(expected))
    assert chi_square < 18.5  # 4 degrees of freedom, one in a thousand; the seed is fixed


@pytest.mark.gpu
def test_a_captured_graph_draws_from_what_its_buffers_hold_then() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    logits = torch.zeros(3, 92_553, device="cuda")
    parameters = [values.cuda() for values in (*filters(3, top_k=50, top_p=0.9), torch.zeros(3, dtype=torch.float64))]
    sample_tokens(logits, *parameters), greedy_tokens(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, (best, peaks) = sample_tokens(logits, *parameters), greedy_tokens(logits)
    for seed in range(3):
        logits.copy_(random_logits(3, 92_553, seed=seed))
        parameters[-1].fill_(seed / 3)
        graph.replay()
        assert torch.equal(tokens, sample_tokens(logits, *parameters))
        assert torch.equal(best, logits.argmax(-1))
        assert torch.equal(peaks, logits.amax(-1))


def test_two_launches_draw_and_nothing_is_read_back() -> None:
    # Tensors of the meta device hold nothing that could be read.
    launches: list[Any] = []
    logits = torch.empty(8, 92_553, device="meta")
    with dispatch.simulate(dispatch.A100, launches):
        sample_tokens(logits, *(torch.empty(8, dtype=torch.float64, device="meta") for _ in range(5)))
        greedy_tokens(logits)
    assert [launch.name for launch in launches] == [
        "_group_kernel",
        "_sample_kernel",
        "_group_kernel",
        "_greedy_kernel",
    ]


def test_a_vocabulary_beyond_the_range_of_the_sums_is_refused(any_device) -> None:
    with pytest.raises(ValueError, match="a vocabulary of 262145 is above 262144"):
        greedy_tokens(torch.zeros(1, 2**18 + 1, device=any_device))
