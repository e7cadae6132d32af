"""The next token of each row of logits: the best one, or one drawn after temperature, top_k, top_p and min_p.

Every filter is a threshold: a token stays if its logit reaches a value t. For top_k, t is the greatest value that k
tokens reach; for top_p the greatest whose tokens hold p of the probability; for min_p it is the likeliest token's
logit + temperature * log(min_p). Tokens that tie with the last one stay. Of what is left, one is drawn where the
cumulative probability, in the order of the vocabulary, passes a uniform number.

No row is sorted. One kernel, of many programs a row, reads it once and leaves the peak and the mass, the sum of
exp((x - peak) / temperature), of each group of 64 tokens. From these alone a second kernel, of one program a row, knows
the total, bounds the threshold from below and sees which groups hold tokens that reach the bound: usually few, which it
reads again. It bisects among those tokens; where they are more than fit into registers, passes over them narrow the
range down first. The group to draw from is found by the groups' masses, the token in it likewise.

Masses are fixed-point integers, in units of 2^-44 of the likeliest token's: their sums do not depend on the order, and
a row gets the same token alone and in any batch. exp is fp32's. Against exact arithmetic a nucleus may end elsewhere
where the probability up to there is within 2e-6 of top_p, and a draw may fall on the other side of an edge between
tokens that is within 2e-6. top_k is exact, min_p to the rounding of a logit. (The reference rounds x / temperature,
which may move probabilities by more, and make neighbouring floats tie.)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .dispatch import target_of
from .language import cdiv, jit, kernel, next_power_of_2, tl
from .launch import launch

# Below this float32 overflows on the way; every difference between logits already decides by itself.
MIN_TEMPERATURE = 1e-5

# Nuclei are rarely wider: the 1024 best of 92,553 logits take 0.5 ms to find on one CPU core, sorting all takes 9 ms.
NUCLEUS_CANDIDATES = 1024

GROUP = 64  # tokens
GROUPS_PER_PROGRAM = 16
BLOCK = 2048  # tokens of listed groups, 8 a thread
CANDIDATES = 2048  # that are bisected in registers, 8 a thread
MAX_VOCAB = 2**18  # so many masses of up to 2^44 add up to less than 2^63


@jit
def _mass(x, peak, temperature, times):
    """exp((x - peak) / temperature) * times in fixed point. A row that is not finite has NaN for x - peak."""
    exponent = (x - peak) * (1.4426950408889634 / temperature)
    return (tl.where(exponent <= 0, tl.exp2(exponent), 1.0) * times * 17592186044416.0).to(tl.int64)


@jit
def _key(x):
    """An integer that orders as the float does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _value(key):
    """The float whose key it is."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _share(total, fraction):
    """The least integer that is at least `fraction` of `total`, from 1 to `total`."""
    exact = total.to(tl.float64) * fraction
    whole = exact.to(tl.int64)
    whole += (whole.to(tl.float64) < exact).to(tl.int64)
    return tl.minimum(tl.maximum(whole, 1), total)


@jit
def _load(pointers, mask):
    """Logits; -inf where masked. Without -0.0, whose key differs from that of 0.0."""
    return tl.load(pointers, mask=mask, other=float("-inf")).to(tl.float32) + 0.0


@kernel()
def _group_kernel(
    logits_ptr, temperatures_ptr, peaks_ptr, sums_ptr,  # the last for a temperature alone
    vocab, num_groups,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    tokens = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    out = row * num_groups + groups

    x = tl.load(logits_ptr + row * vocab + tokens, mask=tokens < vocab, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)  # a maximum would pass over NaN
    peaks = tl.max(x, 1)
    tl.store(peaks_ptr + out, peaks, mask=groups < num_groups)
    if temperatures_ptr is not None:
        temperature = tl.maximum(tl.load(temperatures_ptr + row).to(tl.float32), 1e-5)
        peaks = tl.where(peaks > float("-inf"), peaks, 0.0)  # -inf has no mass, in a group of nothing else either
        sums = tl.sum(tl.exp2((x - peaks[:, None]) * (1.4426950408889634 / temperature)), 1)
        tl.store(sums_ptr + out, tl.where(sums == sums, sums, 1.0), mask=groups < num_groups)


@kernel()
def _greedy_kernel(
    logits_ptr, group_peaks_ptr, tokens_ptr, peaks_ptr,
    vocab, num_groups,
    GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    peaks = tl.load(group_peaks_ptr + row * num_groups + groups, mask=groups < num_groups, other=float("-inf"))
    first = tl.argmax(peaks, 0) * GROUP
    places = tl.arange(0, GROUP)
    x = _load(logits_ptr + row * vocab + first + places, first + places < vocab)
    best = tl.argmax(tl.where(x != x, float("inf"), x), 0)
    tl.store(peaks_ptr + row, tl.sum(tl.where(places == best, x, 0.0), 0))  # NaN itself if it is that
    tl.store(tokens_ptr + row, (first + best).to(tl.int64))


@jit
def _bound(peaks, masses, peak, temperature, wanted, by_mass, GROUP: tl.constexpr):
    """A value whose tokens weigh `wanted` or more for certain, by mass or one each; judged by the groups alone.

    A group whose peak reaches the value counts one. Its mass counts without what does not reach it, at most all but
    the peak, and at most GROUP - 1 times the mass of the value.
    """
    others = tl.maximum(masses - _mass(peaks, peak, temperature, 1.0), 0)
    unit = tl.where(by_mass, temperature, 1.0)
    near = tl.full([], 0.0625, tl.float32).to(tl.int32, bitcast=True)
    farthest = tl.full([], 512.0, tl.float32).to(tl.int32, bitcast=True)
    far = farthest
    for _ in range(9):  # the distance from the peak to a fiftieth: bits of positive floats order as they do
        middle = near + (far - near) // 2
        value = peak - middle.to(tl.float32, bitcast=True) * unit
        rest = tl.minimum(others, _mass(value, peak, temperature, 1.0) * (GROUP - 1))
        weights = tl.where(by_mass, masses - rest, 1)
        enough = tl.sum(tl.where(peaks >= value, weights, 0), 0) >= wanted
        near = tl.where(enough, near, middle)
        far = tl.where(enough, middle, far)
    return tl.where(far < farthest, peak - far.to(tl.float32, bitcast=True) * unit, float("-inf"))


@jit
def _list_groups(list_ptr, peaks, low):
    """Lists the groups whose peak reaches `low`, in order; returns how many there are."""
    listed = (peaks >= low) & (peaks > float("-inf"))
    tl.debug_barrier()  # all threads are done with the list before
    tl.store(list_ptr + tl.cumsum(listed.to(tl.int32), 0) - 1, tl.arange(0, peaks.shape[0]), mask=listed)
    tl.debug_barrier()
    return tl.sum(listed.to(tl.int32), 0)


@jit
def _load_listed(row_ptr, list_ptr, num_listed, start, vocab, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Logits of BLOCK tokens of the listed groups, from their token `start` on; -inf past the last."""
    place = start + tl.arange(0, BLOCK)
    inside = place < num_listed * GROUP
    tokens = tl.load(list_ptr + place // GROUP, mask=inside, other=0) * GROUP + place % GROUP
    return _load(row_ptr + tokens, inside & (tokens < vocab))


@jit
def _weigh(
    row_ptr, list_ptr, masses_ptr, num_listed, value, peak, temperature, vocab,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Number and mass of the tokens that reach `value`; leaves the mass in each listed group in `masses_ptr`."""
    counts = tl.zeros([BLOCK // GROUP], tl.int32)
    masses = tl.zeros([BLOCK // GROUP], tl.int64)
    for start in range(0, num_listed, BLOCK // GROUP):
        x = _load_listed(row_ptr, list_ptr, num_listed, start * GROUP, vocab, GROUP, BLOCK)
        x = tl.reshape(x, [BLOCK // GROUP, GROUP])
        mass = tl.sum(tl.where(x >= value, _mass(x, peak, temperature, 1.0), 0), 1)
        place = start + tl.arange(0, BLOCK // GROUP)
        group = tl.load(list_ptr + place, mask=place < num_listed, other=0)
        tl.store(masses_ptr + group, mass, mask=place < num_listed)
        masses += mass
        counts += tl.sum((x >= value).to(tl.int32), 1)
    return tl.sum(counts, 0).to(tl.int64), tl.sum(masses, 0)


@jit
def _threshold(
    row_ptr, list_ptr, masses_ptr, candidates_ptr, num_listed, low, wanted, by_mass, peak, temperature, vocab,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The greatest value such that the tokens that reach it weigh `wanted` or more: by mass, or one each.

    It is `low`, for which that must hold, or the logit of a token. Groups that can reach `low` must be listed.
    """
    lo, hi = _key(low).to(tl.int64), _key(peak).to(tl.int64)  # their difference overflows 32 bits
    none = tl.zeros([], tl.int64)
    above, num_above = none, none  # what tokens above `hi` weigh, and how many there are
    num_reaching = none + num_listed * GROUP  # how many reach `lo`, at most
    while (num_reaching - num_above > CANDIDATES) & (lo < hi):
        middle = lo + (hi - lo + 1) // 2
        count, mass = _weigh(
            row_ptr, list_ptr, masses_ptr, num_listed, _value(middle), peak, temperature, vocab, GROUP, BLOCK
        )
        weight = tl.where(by_mass, mass, count)
        enough = weight >= wanted
        lo = tl.where(enough, middle, lo)
        num_reaching = tl.where(enough, count, num_reaching)
        hi = tl.where(enough, hi, middle - 1)
        above = tl.where(enough, above, weight)
        num_above = tl.where(enough, num_above, count)

    lowest, highest = _value(lo), _value(hi)
    found = 0
    tl.debug_barrier()  # all threads are done with the candidates before
    for start in range(0, num_listed * GROUP, BLOCK):
        x = _load_listed(row_ptr, list_ptr, num_listed, start, vocab, GROUP, BLOCK)
        among = (x >= lowest) & (x <= highest)
        place = found + tl.cumsum(among.to(tl.int32), 0) - 1
        # More than fit in are left only if all are the same value: then nothing is left to find.
        tl.store(candidates_ptr + place, x, mask=among & (place < CANDIDATES))
        found += tl.sum(among.to(tl.int32), 0)
    tl.debug_barrier()
    places = tl.arange(0, CANDIDATES)
    x = tl.load(candidates_ptr + places, mask=places < found, other=float("-inf"))
    weights = tl.where(by_mass, _mass(x, peak, temperature, 1.0), (x > float("-inf")).to(tl.int64))
    keys = _key(x)
    while lo < hi:
        middle = lo + (hi - lo + 1) // 2
        reach = keys >= middle
        weight = above + tl.sum(tl.where(reach, weights, 0), 0)
        enough = weight >= wanted
        # On to the next candidate on that side. Without one to spare the threshold is found.
        nearest = tl.max(tl.where(reach == enough, tl.where(enough, -keys, keys), -2147483647), 0)
        lo = tl.where(enough, tl.maximum(middle, -nearest), lo)
        hi = tl.where(enough, tl.where(weight == wanted, lo, hi), tl.minimum(middle - 1, nearest))
    return _value(lo)


@kernel()
def _sample_kernel(
    logits_ptr, group_peaks_ptr, group_sums_ptr,
    temperatures_ptr, top_ks_ptr, top_ps_ptr, min_ps_ptr, uniforms_ptr,
    lists_ptr, masses_ptr, candidates_ptr,  # a row's own memory: an entry a group, and CANDIDATES
    tokens_ptr,
    vocab, num_groups,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * vocab
    list_ptr = lists_ptr + row * num_groups
    masses_ptr += row * num_groups
    candidates_ptr += row * CANDIDATES
    temperature = tl.maximum(tl.load(temperatures_ptr + row).to(tl.float32), 1e-5)
    top_k = tl.load(top_ks_ptr + row).to(tl.int64)
    top_p = tl.load(top_ps_ptr + row).to(tl.float64)
    min_p = tl.load(min_ps_ptr + row).to(tl.float64)
    groups = tl.arange(0, GROUPS)
    there = groups < num_groups
    peaks = tl.load(group_peaks_ptr + row * num_groups + groups, mask=there, other=float("-inf"))
    sums = tl.load(group_sums_ptr + row * num_groups + groups, mask=there, other=0.0)
    peak = tl.max(peaks, 0) + 0.0
    masses = _mass(peaks, peak, temperature, sums)

    threshold = tl.full([], float("-inf"), tl.float32)
    total = tl.sum(masses, 0)
    for stage in range(3):  # a loop, so that there is one copy of what it does
        given = tl.where(stage == 0, (top_k > 0) & (top_k < vocab), tl.where(stage == 1, top_p < 1, min_p > 0))
        if given:
            wanted = tl.where(stage == 0, top_k, _share(total, top_p))
            if stage < 2:
                low = tl.maximum(threshold, _bound(peaks, masses, peak, temperature, wanted, stage == 1, GROUP))
            else:
                low = tl.maximum(threshold, peak + tl.log(min_p).to(tl.float32) * temperature)
            num_listed = _list_groups(list_ptr, peaks, low)
            threshold = low
            if stage < 2:
                threshold = _threshold(
                    row_ptr, list_ptr, masses_ptr, candidates_ptr, num_listed, low, wanted, stage == 1,
                    peak, temperature, vocab, GROUP, BLOCK, CANDIDATES,
                )  # fmt: skip
            _, total = _weigh(
                row_ptr, list_ptr, masses_ptr, num_listed, threshold, peak, temperature, vocab, GROUP, BLOCK
            )
    if threshold > float("-inf"):
        tl.debug_barrier()
        masses = tl.load(masses_ptr + groups, mask=there & (peaks >= threshold), other=0)

    # Counted from the far end, the target is above 0 and at most the total: a token of probability 0 is never hit.
    fraction = 1 - tl.load(uniforms_ptr + row).to(tl.float64)
    target = _share(tl.sum(masses, 0), fraction)
    group = tl.minimum(tl.sum((tl.cumsum(masses, 0) < target).to(tl.int32), 0), num_groups - 1)
    target -= tl.sum(tl.where(groups < group, masses, 0), 0)
    mass = tl.maximum(tl.sum(tl.where(groups == group, masses, 0), 0), 1)
    tokens = group * GROUP + tl.arange(0, GROUP)
    x = _load(row_ptr + tokens, tokens < vocab)
    # Within the group masses are relative to its own peak: by the row's all may round to 0.
    masses = tl.where(x >= threshold, _mass(x, tl.max(x, 0), temperature, 1.0), 0)
    target = _share(tl.sum(masses, 0), target.to(tl.float64) / mass.to(tl.float64))
    token = group * GROUP + tl.sum((tl.cumsum(masses, 0) < target).to(tl.int32), 0)
    tl.store(tokens_ptr + row, tl.minimum(token, vocab - 1).to(tl.int64))


def greedy_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the best tokens of each row (n,) int64, and its logit (n,) float32, not finite if the row is broken.

    logits: (n, vocab). NaN counts as the greatest.
    """
    if target_of(logits) is None:
        return greedy_tokens_reference(logits)
    logits = logits.contiguous()
    peaks = _launch_groups(logits, None)[0]
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    best = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    launch(
        _greedy_kernel,
        (len(logits),),
        *(logits, peaks, tokens, best),
        *(logits.shape[1], peaks.shape[1]),
        GROUP=GROUP,
        GROUPS=next_power_of_2(peaks.shape[1]),
    )
    return tokens, best


def greedy_tokens_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    peaks, tokens = logits.max(dim=-1)
    return tokens, peaks


def sample_tokens(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, uniforms: Tensor
) -> Tensor:
    """A token of each row (n,) int64, drawn by the row's uniform number in [0, 1) from those that its filters leave.

    logits: (n, vocab); the others: (n,), floats in float64 and top_ks whole numbers in any dtype.
    A top_k of 0, a top_p of 1 and a min_p of 0 rule out nothing. A row's token does not depend on the other rows;
    that of a row that has NaN, +inf or no finite logit at all may be any.
    """
    for name, values in {
        "temperatures": temperatures, "top_ks": top_ks, "top_ps": top_ps, "min_ps": min_ps, "uniforms": uniforms
    }.items():  # fmt: skip
        if values.shape != logits.shape[:1]:
            raise ValueError(f"sample_tokens: {name} is {tuple(values.shape)} for {len(logits)} rows")
    if target_of(logits) is None:
        return sample_tokens_reference(logits, temperatures, top_ks, top_ps, min_ps, uniforms)
    logits = logits.contiguous()
    peaks, sums = _launch_groups(logits, temperatures)
    (n, vocab), num_groups = logits.shape, peaks.shape[1]
    tokens = torch.empty(n, dtype=torch.int64, device=logits.device)
    launch(
        _sample_kernel,
        (n,),
        *(logits, peaks, sums),
        *(temperatures, top_ks, top_ps, min_ps, uniforms),
        torch.empty(n, num_groups, dtype=torch.int32, device=logits.device),
        torch.empty(n, num_groups, dtype=torch.int64, device=logits.device),
        torch.empty(n, CANDIDATES, dtype=torch.float32, device=logits.device),
        tokens,
        *(vocab, num_groups),
        num_warps=8,
        GROUP=GROUP,
        GROUPS=next_power_of_2(num_groups),
        BLOCK=BLOCK,
        CANDIDATES=CANDIDATES,
    )
    return tokens


def sample_tokens_reference(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, uniforms: Tensor
) -> Tensor:
    return draw(keep_likely(logits, temperatures, top_ks, top_ps, min_ps), uniforms)


def keep_likely(logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor) -> Tensor:
    """`logits` (n, vocab) over the temperatures, -inf where a filter rules a token out."""
    logits = logits / temperatures.float().clamp(min=MIN_TEMPERATURE)[:, None]
    logits = _where_between(0, logits.shape[1], top_ks, _keep_top_k, logits)
    # a nucleus of everything is no filter, though its sum in floating point may reach 1 early
    logits = _where_between(0, 1, top_ps, _keep_top_p, logits)
    return _where_between(0, math.inf, min_ps, _keep_min_p, logits)


def _where_between(
    low: float, high: float, values: Tensor, keep: Callable[[Tensor, Tensor], Tensor], logits: Tensor
) -> Tensor:
    """`logits`, which may be overwritten, with `keep` applied to the rows whose value is between `low` and `high`."""
    rows = [row for row, value in enumerate(values.tolist()) if low < value < high]
    if len(rows) == len(logits):
        return keep(logits, values)
    if rows:
        logits[rows] = keep(logits[rows], values[rows])
    return logits


def _keep_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """`logits` (n, vocab) without those below each row's `k`-th best (n,); ties with that one are kept."""
    k = k.long()
    best = logits.topk(int(k.max())).values
    return logits.masked_fill(logits < best.gather(-1, (k - 1)[:, None]), -torch.inf)


def _keep_top_p(logits: Tensor, p: Tensor) -> Tensor:
    """`logits` (n, vocab) of the fewest tokens whose probabilities sum to `p` (n,); ties with the last one are kept."""
    p = p.double()[:, None]
    total = logits.double().logsumexp(-1, keepdim=True)  # in double: the tail of a wide nucleus is made of tiny parts
    best = logits.topk(min(NUCLEUS_CANDIDATES, logits.shape[-1])).values
    reached = (best - total).exp().cumsum(-1)
    if bool((reached[:, -1:] < p).any()):
        best = logits.sort(descending=True).values
        reached = (best - total).exp().cumsum(-1)
    # a token belongs to the nucleus if those before it do not reach p
    last = (reached[:, :-1] < p).sum(-1, keepdim=True)
    return logits.masked_fill(logits < best.gather(-1, last), -torch.inf)


def _keep_min_p(logits: Tensor, p: Tensor) -> Tensor:
    """`logits` (n, vocab) without those of tokens less likely than `p` (n,) times the likeliest."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + p.log().float()[:, None], -torch.inf)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """A token of each row of `logits` (n, vocab): where the row's cumulative probability passes its uniform (n,)."""
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    # Counted from the far end, the target is above 0 and at most the total: a token of probability 0 is never hit.
    return torch.searchsorted(cumulative, cumulative[:, -1:] * (1 - uniforms.double())[:, None]).squeeze(-1)


def _launch_groups(logits: Tensor, temperatures: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The peak of each group, and with temperatures the mass relative to it: (n, num_groups)."""
    n, vocab = logits.shape
    if vocab > MAX_VOCAB:
        raise ValueError(f"a vocabulary of {vocab} is above {MAX_VOCAB}, for which sums of probabilities are made")
    num_groups = cdiv(vocab, GROUP)
    peaks = torch.empty(n, num_groups, dtype=torch.float32, device=logits.device)
    sums = None if temperatures is None else torch.empty_like(peaks)
    launch(
        _group_kernel,
        (cdiv(num_groups, GROUPS_PER_PROGRAM), n),
        *(logits, temperatures, peaks, sums),
        *(vocab, num_groups),
        num_warps=1,
        GROUP=GROUP,
        GROUPS=GROUPS_PER_PROGRAM,
    )
    return peaks, sums
