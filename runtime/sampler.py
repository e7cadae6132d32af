"""From logits to tokens, and from tokens to the text a caller may see.

A row of logits is worked on in this order, each step where the request asks for it:

1. `logit_bias` is added;
2. `repetition_penalty`: logits of tokens in the prompt or the answer so far are divided by it where positive,
   multiplied where negative, once a token. The prompt counts, as in transformers; image context tokens do not. (The
   official demo feeds its prompts as embeddings, so that only the answer counts: hand over no prompt for that.)
3. `presence_penalty`, `frequency_penalty`: subtracted from tokens of the answer, once and once an occurrence;
4. `bad_words`: a token that would complete one is ruled out;
5. `min_new_tokens`: until then, tokens that would end the answer are ruled out;
6. greedy rows take the best token; the others are divided by `temperature`;
7. `top_k`, then `top_p`, then `min_p` rule out unlikely tokens;
8. one token is drawn from what is left, by one number of the sequence's own random stream.

Log-probabilities are the model's own, of the logits before step 1: they do not depend on how a token was picked.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import InvalidRequestError, VitrailError
from .request import FinishReason, GenerationConfig, TokenLogprobs

# Below this float32 overflows on the way; every difference between logits already decides by itself.
MIN_TEMPERATURE = 1e-5

# Nuclei are rarely wider: the 1024 best of 92,553 logits take 0.5 ms to find on one CPU core, sorting all takes 9 ms.
NUCLEUS_CANDIDATES = 1024


class SamplingState:
    """What the sampler knows of one sequence.

    `prompt_token_ids` and `image_token_id`, the id of the image context token, matter to `repetition_penalty` alone.
    `bad_words` are the config's, as token ids; a word that is written in several ways stands there several times.
    `index` tells the completions of one request apart: each has a random stream of its own.
    Without a seed the stream differs from run to run.
    """

    def __init__(
        self,
        config: GenerationConfig,
        *,
        prompt_token_ids: Collection[int] = (),
        image_token_id: int | None = None,
        eos_token_ids: Collection[int] = (),
        bad_words: Collection[Sequence[int]] = (),
        index: int = 0,
    ) -> None:
        self.config = config
        self.token_ids: list[int] = []  # the answer so far
        self._counts: Counter[int] = Counter()
        self._prompt = frozenset(prompt_token_ids) - {image_token_id} if config.repetition_penalty != 1 else frozenset()
        self._bad_words = [tuple(word) for word in bad_words if word]
        self._stop_ids = sorted(stop_ids(config, eos_token_ids))
        # Python's generator takes the whole of its seed; torch's on a CPU only 32 bits of it, and it is slower.
        self._random = random.Random(None if config.seed is None else f"{config.seed}/{index}")
        self._counted = bool(config.presence_penalty or config.frequency_penalty or config.repetition_penalty != 1)
        self.edits = bool(config.logit_bias or self._counted or self._bad_words or config.min_new_tokens)

    def append(self, token_id: int) -> None:
        """Takes `token_id` as the next token of the answer. `sample` does so for what it picks."""
        self.token_ids.append(token_id)
        if self._counted:
            self._counts[token_id] += 1

    def uniform(self) -> float:
        """The next number of the sequence's random stream, in [0, 1)."""
        return self._random.random()

    def edit(self, logits: Tensor) -> None:
        """Applies steps 1 to 5 to `logits` [vocab], in place."""
        config = self.config
        device = logits.device
        if config.logit_bias:
            ids = torch.tensor(list(config.logit_bias), device=device)
            logits[ids] += torch.tensor(list(config.logit_bias.values()), device=device)
        if config.repetition_penalty != 1 and (seen := self._prompt | self._counts.keys()):
            ids = torch.tensor(sorted(seen), device=device)
            scores, penalty = logits[ids], config.repetition_penalty
            logits[ids] = torch.where(scores < 0, scores * penalty, scores / penalty)
        if self._counts and (config.presence_penalty or config.frequency_penalty):
            ids = torch.tensor(list(self._counts), device=device)
            counts = torch.tensor(list(self._counts.values()), device=device)
            logits[ids] -= config.presence_penalty + config.frequency_penalty * counts
        banned = [word[-1] for word in self._bad_words if self._ends_with(word[:-1])]
        if len(self.token_ids) < config.min_new_tokens:
            banned += self._stop_ids
        if banned:
            logits[torch.tensor(banned, device=device)] = -math.inf

    def _ends_with(self, ids: tuple[int, ...]) -> bool:
        return not ids or tuple(self.token_ids[-len(ids) :]) == ids


class Sampled(NamedTuple):
    """A picked token, and with `logprobs=k` its log-probability followed by the k best pairs (id, log-probability)."""

    token_id: int
    logprobs: TokenLogprobs | None


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled | VitrailError]:
    """The next token of each sequence, which its state has taken note of, or the error that ends that sequence alone.

    logits: [num_sequences, vocab] float32, on any device; unchanged. A row's outcome does not depend on the others.
    """
    peaks, best = logits.max(dim=-1)  # NaN counts as the greatest, so that the peak of a broken row is not finite
    tokens: list[int] = best.tolist()
    errors: dict[int, VitrailError] = {
        row: VitrailError(f"the model gave logits that are not finite ({peak}) for output token {len(state.token_ids)}")
        for row, (peak, state) in enumerate(zip(peaks.tolist(), states, strict=True))
        if not math.isfinite(peak)
    }
    rows = [row for row, state in enumerate(states) if (state.edits or not state.config.greedy) and row not in errors]
    if rows:
        for row, token in zip(rows, _pick(logits[rows], [states[row] for row in rows]), strict=True):
            if token is None:
                errors[row] = InvalidRequestError("bad_words and min_new_tokens together rule out every token")
            else:
                tokens[row] = token
    logprobs = _logprobs(logits, tokens, {row: states[row] for row in range(len(states)) if row not in errors})
    outcome: list[Sampled | VitrailError] = []
    for row, state in enumerate(states):
        if row in errors:
            outcome.append(errors[row])
        else:
            state.append(tokens[row])
            outcome.append(Sampled(tokens[row], logprobs.get(row)))
    return outcome


def _pick(logits: Tensor, states: Sequence[SamplingState]) -> list[int | None]:
    """A token for each row of `logits`, which is overwritten; None where every token is ruled out."""
    for row, state in zip(logits, states, strict=True):
        if state.edits:
            state.edit(row)
    peaks, picked = logits.max(dim=-1)
    possible = peaks > -math.inf
    drawn = [row for row, state in enumerate(states) if not state.config.greedy]
    if drawn:
        random_states = [states[row] for row in drawn]
        picked[drawn] = draw(
            keep_likely(logits[drawn], [state.config for state in random_states]),
            [state.uniform() for state in random_states],
        )
    return [token if ok else None for token, ok in zip(picked.tolist(), possible.tolist(), strict=True)]


def keep_likely(logits: Tensor, configs: Sequence[GenerationConfig]) -> Tensor:
    """`logits` [n, vocab] after temperature, top_k, top_p and min_p of each row's config; -inf where ruled out."""
    temperatures = [max(config.sampling_temperature, MIN_TEMPERATURE) for config in configs]
    logits = logits / torch.tensor(temperatures, device=logits.device)[:, None]
    logits = _where_given(top_k, logits, [config.top_k for config in configs])
    # a nucleus of everything is no filter, though its sum in floating point may reach 1 early
    logits = _where_given(top_p, logits, [None if config.top_p == 1 else config.top_p for config in configs])
    return _where_given(min_p, logits, [config.min_p for config in configs])


def _where_given(keep: Callable[[Tensor, Tensor], Tensor], logits: Tensor, values: Sequence[float | None]) -> Tensor:
    """`logits`, which may be overwritten, with `keep` applied to the rows that have a value."""
    rows = [row for row, value in enumerate(values) if value is not None]
    if not rows:
        return logits
    given = torch.tensor([values[row] for row in rows], dtype=torch.float64, device=logits.device)
    if len(rows) == len(values):
        return keep(logits, given)
    logits[rows] = keep(logits[rows], given)
    return logits


def top_k(logits: Tensor, k: Tensor) -> Tensor:
    """`logits` [n, vocab] without those below each row's `k`-th best [n]; ties with that one are kept."""
    k = k.long().clamp(max=logits.shape[-1])
    best = logits.topk(int(k.max())).values
    return logits.masked_fill(logits < best.gather(-1, (k - 1)[:, None]), -math.inf)


def top_p(logits: Tensor, p: Tensor) -> Tensor:
    """`logits` [n, vocab] of the fewest tokens whose probabilities sum to `p` [n]; ties with the last one are kept."""
    p = p.double()[:, None]
    total = logits.double().logsumexp(-1, keepdim=True)  # in double: the tail of a wide nucleus is made of tiny parts
    best = logits.topk(min(NUCLEUS_CANDIDATES, logits.shape[-1])).values
    reached = (best - total).exp().cumsum(-1)
    if bool((reached[:, -1:] < p).any()):
        best = logits.sort(descending=True).values
        reached = (best - total).exp().cumsum(-1)
    # a token belongs to the nucleus if those before it do not reach p
    last = (reached[:, :-1] < p).sum(-1, keepdim=True)
    return logits.masked_fill(logits < best.gather(-1, last), -math.inf)


def min_p(logits: Tensor, p: Tensor) -> Tensor:
    """`logits` [n, vocab] without those of tokens less likely than `p` [n] times the likeliest."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + p.log().float()[:, None], -math.inf)


def draw(logits: Tensor, uniforms: Sequence[float]) -> Tensor:
    """A token id for each row of `logits` [n, vocab]: where the row's cumulative probability passes its `uniform`."""
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    # Counted from the far end, the target is above 0 and at most the total: a token of probability 0 is never hit.
    shares = torch.tensor([1 - uniform for uniform in uniforms], dtype=torch.float64, device=logits.device)
    return torch.searchsorted(cumulative, cumulative[:, -1:] * shares[:, None]).squeeze(-1)


def _logprobs(logits: Tensor, tokens: Sequence[int], states: dict[int, SamplingState]) -> dict[int, TokenLogprobs]:
    """Log-probabilities of `tokens` and of the best alternatives, by row, for the rows whose config asks for them."""
    counts = {row: state.config.logprobs for row, state in states.items() if state.config.logprobs is not None}
    if not counts:
        return {}
    rows = list(counts)
    scores = logits[rows].log_softmax(-1)
    chosen = scores.gather(-1, torch.tensor([[tokens[row]] for row in rows], device=logits.device))
    best = scores.topk(min(max(counts.values()), scores.shape[-1]))
    lists = zip(rows, chosen.squeeze(-1).tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
    return {row: [own, *list(zip(ids, values, strict=True))[: counts[row]]] for row, own, ids, values in lists}


def stop_ids(config: GenerationConfig, eos_token_ids: Collection[int]) -> frozenset[int]:
    """The token ids that end an answer: the checkpoint's, unless `ignore_eos`, and the request's own."""
    return frozenset(config.stop_token_ids) | (frozenset() if config.ignore_eos else frozenset(eos_token_ids))


class TextStream(Protocol):
    """An incremental detokeniser: `push` gives the characters that are complete, `flush` what is left."""

    def push(self, ids: Sequence[int], /) -> str: ...
    def flush(self) -> str: ...


class StopChecker:
    """Decides token by token whether an answer ends, and which text may be released.

    Text is held back while it may be the beginning of a stop string, so that what was released never has to be taken
    back and the concatenation of all of it is the final text, however the text falls into tokens. The answer ends at
    the stop string that is complete first; of several complete at once, the one that began first. A stop token's own
    text and the stop string are left out unless `include_stop_str_in_output`. Neither counts among the first
    `min_new_tokens` tokens. `stop_strings` are the template's, beside the request's own; `max_new_tokens`, where
    given, is what the context leaves room for and replaces the config's.
    """

    def __init__(
        self,
        config: GenerationConfig,
        stream: TextStream,
        *,
        eos_token_ids: Collection[int] = (),
        stop_strings: Collection[str] = (),
        max_new_tokens: int | None = None,
    ) -> None:
        self._stream = stream
        self._stop_ids = stop_ids(config, eos_token_ids)
        self._stops = tuple(dict.fromkeys((*config.stop, *stop_strings)))
        self._longest = max(map(len, self._stops), default=0)
        self._keeps_stop = config.include_stop_str_in_output
        self._min_new_tokens = config.min_new_tokens
        self._max_new_tokens = config.max_new_tokens if max_new_tokens is None else max_new_tokens
        self._num_tokens = 0
        self._held = ""
        self._exempt = 0  # characters at the beginning of `_held` that came before a stop string counts

    def push(self, token_id: int) -> tuple[str, FinishReason | None]:
        """The text that `token_id` releases, and the finish reason if the answer ends with it."""
        self._num_tokens += 1
        ended = self._num_tokens > self._min_new_tokens and token_id in self._stop_ids
        if not ended or self._keeps_stop:
            self._take(self._stream.push([token_id]))
        if ended or self._num_tokens >= self._max_new_tokens or self._find_stop() is not None:
            text, at_stop_string = self._close()
            return text, "stop" if ended or at_stop_string else "length"
        certain = self._certain()
        text, self._held = self._held[:certain], self._held[certain:]
        self._exempt = max(0, self._exempt - certain)
        return text, None

    def flush(self) -> str:
        """All the text that is still held back, for an answer that ends for a reason of its own."""
        return self._close()[0]

    def _take(self, text: str) -> None:
        self._held += text
        if self._num_tokens <= self._min_new_tokens:
            self._exempt = len(self._held)

    def _close(self) -> tuple[str, bool]:
        """The text up to its end or the first stop string, and whether it was one; nothing is held after that."""
        self._take(self._stream.flush())
        cut = self._find_stop()
        text, self._held = self._held[:cut], ""
        return text, cut is not None

    def _find_stop(self) -> int | None:
        """Where to cut the held text for the stop string that is complete first, None if none is."""
        found = []
        for stop in self._stops:
            begin = self._held.find(stop, max(0, self._exempt - len(stop) + 1))
            if begin >= 0:
                found.append((begin + len(stop), begin))
        if not found:
            return None
        end, begin = min(found)
        return end if self._keeps_stop else begin

    def _certain(self) -> int:
        """How much of the held text cannot be the beginning of a stop string."""
        for begin in range(max(0, len(self._held) - self._longest + 1), len(self._held)):
            tail = self._held[begin:]
            if any(stop.startswith(tail) and stop != tail for stop in self._stops):
                return begin
        return len(self._held)
