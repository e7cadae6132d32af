"""From logits to tokens, and from tokens to the text a caller may see.

A row of logits is worked on in this order, each step where the request asks for it:

1. `logit_bias` is added;
2. `repetition_penalty`: logits of tokens in the prompt or the answer so far are divided by it where positive,
   multiplied where negative, once a token. The prompt counts, as in transformers; image context tokens do not. (The
   official demo feeds its prompts as embeddings, so that only the answer counts: hand over no prompt for that.)
3. `presence_penalty`, `frequency_penalty`: subtracted from tokens of the answer, once and once an occurrence;
4. `bad_words`: a token that would complete one is ruled out;
5. `min_new_tokens`: until then, tokens that would end the answer are ruled out; `response_format`: so is everything
   that its grammar does not allow here;
6. greedy rows take the best token; the others are divided by `temperature`;
7. `top_k`, then `top_p`, then `min_p` rule out unlikely tokens;
8. one token is drawn from what is left, by one number of the sequence's own random stream.

Log-probabilities are the model's own, of the logits before step 1: they do not depend on how a token was picked.
"""

import math
import random
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels.sampling import greedy_tokens, sample_tokens
from .errors import InvalidRequestError, VitrailError
from .request import FinishReason, GenerationConfig, TokenLogprobs


class Grammar(Protocol):
    """Which tokens may come next."""

    def allowed(self) -> Tensor: ...  # (vocab,) bool on the CPU
    def accept(self, token_id: int, /) -> None: ...


class SamplingState:
    """What the sampler knows of one sequence.

    `prompt_token_ids` and `image_token_id`, the id of the image context token, matter to `repetition_penalty` alone.
    `bad_words` are the config's, as token ids; a word that is written in several ways stands there several times.
    `grammar` is the matcher of `response_format`, if any text will not do.
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
        grammar: "Grammar | None" = None,
        index: int = 0,
    ) -> None:
        self.config = config
        self.grammar = grammar
        self.token_ids: list[int] = []  # the answer so far
        self._counts: Counter[int] = Counter()
        self._repetition = config.repetition_penalty != 1
        # What the repetition penalty is for; a dict, since its keys are both found and listed fast.
        self._seen = dict.fromkeys(token for token in prompt_token_ids if self._repetition and token != image_token_id)
        self._bad_words = [tuple(word) for word in bad_words if word]
        self._stop_ids = sorted(stop_ids(config, eos_token_ids))
        # Python's generator takes the whole of its seed; torch's on a CPU only 32 bits of it, and it is slower.
        self._random = random.Random(None if config.seed is None else f"{config.seed}/{index}")
        self._counted = bool(config.presence_penalty or config.frequency_penalty)
        self.edits = bool(
            config.logit_bias
            or self._repetition
            or self._counted
            or self._bad_words
            or config.min_new_tokens
            or grammar is not None
        )

    def append(self, token_id: int) -> None:
        """Takes `token_id` as the next token of the answer. `sample` does so for what it picks."""
        self.token_ids.append(token_id)
        if self._counted:
            self._counts[token_id] += 1
        if self._repetition:
            self._seen[token_id] = None
        if self.grammar is not None:
            self.grammar.accept(token_id)

    def uniform(self) -> float:
        """The next number of the sequence's random stream, in [0, 1)."""
        return self._random.random()

    def token_edits(self, vocab: int) -> list[tuple[list[int], list[float]]]:
        """Steps 1 to 5, the last two as one: the tokens below `vocab` that each changes, and a number for each."""
        config = self.config
        bias = config.logit_bias or {}
        seen = list(self._seen)
        penalties = [-config.presence_penalty - config.frequency_penalty * count for count in self._counts.values()]
        ruled_out = [word[-1] for word in self._bad_words if self._ends_with(word[:-1])]
        if len(self.token_ids) < config.min_new_tokens:
            ruled_out += self._stop_ids
        ruled_out = [token for token in ruled_out if token < vocab]  # the tokenizer may know more
        return [
            (list(bias), list(bias.values())),
            (seen, [config.repetition_penalty] * len(seen)),
            (list(self._counts), penalties),
            (ruled_out, [-math.inf] * len(ruled_out)),
        ]

    def _ends_with(self, ids: tuple[int, ...]) -> bool:
        return not ids or tuple(self.token_ids[-len(ids) :]) == ids


def edit(logits: Tensor, states: Sequence[SamplingState]) -> None:
    """Applies steps 1 to 5 to `logits` [num_sequences, vocab], in place."""
    vocab = logits.shape[-1]
    flat = logits.view(-1)
    for number, step in enumerate(zip(*(state.token_edits(vocab) for state in states), strict=True), start=1):
        places: list[int] = []
        operands: list[float] = []
        for row, (ids, values) in enumerate(step):
            places += [row * vocab + token for token in ids]
            operands += values
        if not places:
            continue
        place = _to_device(places, torch.int64, logits.device)
        operand = _to_device(operands, torch.float32, logits.device)
        if number == 2:  # the repetition penalty; the others add
            scores = flat.index_select(0, place)
            flat.index_copy_(0, place, torch.where(scores < 0, scores * operand, scores / operand))
        else:
            flat.index_add_(0, place, operand)
    constrained = {row: state.grammar.allowed() for row, state in enumerate(states) if state.grammar is not None}
    if constrained:
        rows = _to_device(list(constrained), torch.int64, logits.device)
        ruled_out = ~torch.stack(list(constrained.values())).to(logits.device, non_blocking=True)
        logits[rows] = logits[rows].masked_fill_(ruled_out, -math.inf)


class Sampled(NamedTuple):
    """A picked token, and with `logprobs=k` its log-probability followed by the k best pairs (id, log-probability)."""

    token_id: int
    logprobs: TokenLogprobs | None


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled | VitrailError]:
    """The next token of each sequence, which its state has taken note of, or the error that ends that sequence alone.

    logits: [num_sequences, vocab] float32, on any device; unchanged. A row's outcome does not depend on the others.
    The device is waited for once, for the tokens, and again only for log-probabilities.
    """
    rows = [row for row, state in enumerate(states) if state.edits or not state.config.greedy]
    picked = _pick(logits, rows, [states[row] for row in rows]) if rows else ()
    best, peaks, *picks = _to_lists(*greedy_tokens(logits), *picked)
    tokens = [int(token) for token in best]
    errors: dict[int, VitrailError] = {}
    for row, token, *left in zip(rows, *picks, strict=True):
        tokens[row] = int(token)
        if left == [-math.inf]:
            errors[row] = InvalidRequestError(
                "bad_words, min_new_tokens and response_format together rule out every token"
            )
    for row, (peak, state) in enumerate(zip(peaks, states, strict=True)):
        if not math.isfinite(peak):  # whatever was made of it since
            position = len(state.token_ids)
            errors[row] = VitrailError(
                f"the model gave logits that are not finite ({peak}) for output token {position}"
            )
    logprobs = _logprobs(logits, tokens, {row: states[row] for row in range(len(states)) if row not in errors})
    outcome: list[Sampled | VitrailError] = []
    for row, state in enumerate(states):
        if row in errors:
            outcome.append(errors[row])
        else:
            state.append(tokens[row])
            outcome.append(Sampled(tokens[row], logprobs.get(row)))
    return outcome


def _pick(logits: Tensor, rows: Sequence[int], states: Sequence[SamplingState]) -> tuple[Tensor, ...]:
    """A token for each of the `rows` of `logits`, whose `states` edit or draw; with edits, the peaks they leave."""
    edited = any(state.edits for state in states)
    if edited or len(rows) < len(logits):
        logits = logits[_to_device(rows, torch.int64, logits.device)]
    if not edited:
        return (_draw(logits, states),)
    edit(logits, states)
    tokens, peaks = greedy_tokens(logits)
    drawn = [row for row, state in enumerate(states) if not state.config.greedy]
    if len(drawn) == len(states):
        tokens = _draw(logits, states)
    elif drawn:
        index = _to_device(drawn, torch.int64, logits.device)
        tokens[index] = _draw(logits[index], [states[row] for row in drawn])
    return tokens, peaks


def _draw(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """A token for each row of `logits`, at random."""
    configs = [state.config for state in states]
    columns: list[list[float]] = [
        [config.sampling_temperature for config in configs],
        [config.top_k or 0 for config in configs],
        [1.0 if config.top_p is None else config.top_p for config in configs],
        [config.min_p or 0.0 for config in configs],
        [state.uniform() for state in states],
    ]
    # Of an even length, so that each begins at a multiple of 16 bytes: kernels are compiled for that.
    even = len(states) + len(states) % 2
    settings = _to_device([[*column, 0.0][:even] for column in columns], torch.float64, logits.device)
    return sample_tokens(logits, *(column[: len(states)] for column in settings))


def _to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a tensor on `device`, which is not waited for."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def _to_lists(*tensors: Tensor) -> list[list[float]]:
    """The values of each tensor (n,), by one copy from the device, which has to be waited for."""
    if not tensors[0].is_cuda:
        return [tensor.tolist() for tensor in tensors]
    values = torch.cat([tensor.double() for tensor in tensors])  # token ids are exact in it
    return [part.tolist() for part in values.cpu().split([len(tensor) for tensor in tensors])]


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
