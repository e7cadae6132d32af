"""Captions of InternVL-G: one prefill of image and prompt, then a token a step for all images of a batch at once."""

from time import perf_counter

import torch
from torch import Tensor

from .beam import BeamSearch
from .errors import CapacityError, InvalidRequestError, VitrailError
from .models.contrastive import ContrastiveModel
from .models.qllama import QLLaMACache
from .request import Completion, FinishReason, GenerationConfig, GenerationOutput, Metrics, TokenLogprobs, Usage
from .sampler import SamplingState, StopChecker, sample
from .tokenizer import Tokenizer

# As in the reference's evaluation, which also asks for 5 beams and 8 tokens at least.
MAX_NEW_TOKENS = 30
MAX_BEAMS = 64


class _Caption:
    """One completion in the making."""

    def __init__(self, sampling: SamplingState, stop: StopChecker) -> None:
        self.sampling = sampling
        self.stop = stop
        self.text = ""
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None

    def completion(self, wants_logprobs: bool) -> Completion:
        reason = self.finish_reason or "abort"
        return Completion(self.text, self.sampling.token_ids, reason, self.logprobs if wants_logprobs else None)


def prompt_ids(tokenizer: Tokenizer, model: ContrastiveModel, prompt: str) -> list[int]:
    """The ids of a caption's prompt. Raises `CapacityError` where no room for an answer is left behind it."""
    ids = tokenizer.encode(prompt)
    room = model.config.llm.max_position_embeddings - model.config.num_query_tokens
    if len(ids) >= room:
        raise CapacityError(f"the prompt has {len(ids)} tokens; the context holds {room} with at least one of answer")
    return ids


@torch.inference_mode()
def write_captions(
    model: ContrastiveModel, tokenizer: Tokenizer, tiles: Tensor, prompt: list[int], config: GenerationConfig
) -> list[GenerationOutput]:
    """`config.n` captions of each image. tiles: (images, side, side, 3) uint8, on the model's device."""
    queries = model.config.num_query_tokens
    config.check_vocabulary(model.config.llm.vocab_size)
    device = tiles.device
    start = perf_counter()
    budget = _budget(model, prompt, config)
    logits, cache = _prefill(model, tiles, prompt, config.n, budget)
    rows = len(logits)
    captions = [_caption(tokenizer, config, prompt, budget, row % config.n) for row in range(rows)]
    _advance(captions, logits)
    first = perf_counter()
    # Rows that are done go along to the end: a step reads the same weights for one row as for all.
    while any(caption.finish_reason is None for caption in captions):
        last = torch.tensor([caption.sampling.token_ids[-1] for caption in captions], device=device)
        _advance(captions, model.continue_caption(last, cache))
    end = perf_counter()
    steps = cache.used - queries - len(prompt)
    metrics = Metrics(
        ttft_ms=(first - start) * 1e3, tpot_ms=(end - first) * 1e3 / max(steps, 1), e2e_ms=(end - start) * 1e3
    )
    return [
        _output(captions[row : row + config.n], prompt, queries, config, metrics) for row in range(0, rows, config.n)
    ]


def search_captions(
    model: ContrastiveModel,
    tokenizer: Tokenizer,
    tiles: Tensor,
    prompt: list[int],
    config: GenerationConfig,
    num_beams: int,
) -> list[GenerationOutput]:
    """The best caption of each image that a search with `num_beams` beams finds. tiles: as in `write_captions`."""
    device, queries = tiles.device, model.config.num_query_tokens
    start = perf_counter()
    budget = _budget(model, prompt, config)
    ends = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    searches = [BeamSearch(num_beams, ends, config.min_new_tokens, budget) for _ in range(len(tiles))]
    logits, cache = _prefill(model, tiles, prompt, num_beams, budget)
    first = perf_counter()
    while not all(search.done for search in searches):
        rows: list[int] = []
        for index, (search, part) in enumerate(zip(searches, logits.split(num_beams), strict=True)):
            continued = range(num_beams) if search.done else search.advance(part)
            rows += [index * num_beams + row for row in continued]
        if all(search.done for search in searches):
            break
        cache.reorder(torch.tensor(rows, device=device))
        last = torch.tensor([beam[-1:] or [0] for search in searches for beam in search.sequences], device=device)
        logits = model.continue_caption(last[:, 0], cache)
    end = perf_counter()
    steps = cache.used - queries - len(prompt)
    metrics = Metrics(
        ttft_ms=(first - start) * 1e3, tpot_ms=(end - first) * 1e3 / max(steps, 1), e2e_ms=(end - start) * 1e3
    )
    captions = [_caption(tokenizer, config, prompt, budget, 0) for _ in searches]
    for caption, search in zip(captions, searches, strict=True):
        for token in search.ended[0][1]:
            caption.sampling.token_ids.append(token)
            text, caption.finish_reason = caption.stop.push(token)
            caption.text += text
    return [_output([caption], prompt, queries, config, metrics) for caption in captions]


def check_beams(config: GenerationConfig, num_beams: int) -> None:
    """Raise `InvalidRequestError` for a number of beams, or beside it a setting, that a search has no place for."""
    if isinstance(num_beams, bool) or not isinstance(num_beams, int) or not 1 <= num_beams <= MAX_BEAMS:
        raise InvalidRequestError(f"num_beams={num_beams!r}: must be an integer from 1 to {MAX_BEAMS}")
    plain = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        skip_special_tokens=config.skip_special_tokens,
    )
    if num_beams > 1 and config != plain:
        raise InvalidRequestError(f"num_beams={num_beams} goes with max_new_tokens and min_new_tokens alone")


def _budget(model: ContrastiveModel, prompt: list[int], config: GenerationConfig) -> int:
    """Tokens that a caption may have."""
    room = model.config.llm.max_position_embeddings - model.config.num_query_tokens - len(prompt)
    return min(config.max_new_tokens, room)


def _prefill(
    model: ContrastiveModel, tiles: Tensor, prompt: list[int], times: int, budget: int
) -> tuple[Tensor, QLLaMACache]:
    """First logits of `times` captions of each image, and the cache that they go on with."""
    vision = model.vision_model(tiles).repeat_interleave(times, dim=0)
    length = model.config.num_query_tokens + len(prompt) + budget
    cache = QLLaMACache(model.config.llm, len(vision), length, dtype=vision.dtype, device=tiles.device)
    prompts = torch.tensor(prompt, device=tiles.device).expand(len(vision), -1)
    return model.begin_caption(vision, prompts, cache), cache


def _caption(tokenizer: Tokenizer, config: GenerationConfig, prompt: list[int], budget: int, index: int) -> _Caption:
    ends = frozenset(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
    spellings = [spelling for word in config.bad_words for spelling in (word, f" {word}")]
    bad_words = [tokenizer.encode(spelling, add_bos=False) for spelling in spellings]
    stream = tokenizer.stream(skip_special_tokens=config.skip_special_tokens)
    return _Caption(
        SamplingState(config, prompt_token_ids=prompt, eos_token_ids=ends, bad_words=bad_words, index=index),
        StopChecker(config, stream, eos_token_ids=ends, max_new_tokens=budget),
    )


def _advance(captions: list[_Caption], logits: Tensor) -> None:
    """Give every unfinished caption its next token. Raises what the sampler finds wrong with one of them."""
    open_rows = [row for row, caption in enumerate(captions) if caption.finish_reason is None]
    outcomes = sample(logits[open_rows], [captions[row].sampling for row in open_rows])
    for row, outcome in zip(open_rows, outcomes, strict=True):
        if isinstance(outcome, VitrailError):
            raise outcome
        caption = captions[row]
        text, caption.finish_reason = caption.stop.push(outcome.token_id)
        caption.text += text
        if outcome.logprobs is not None:
            caption.logprobs.append(outcome.logprobs)


def _output(
    captions: list[_Caption], prompt: list[int], queries: int, config: GenerationConfig, metrics: Metrics
) -> GenerationOutput:
    completions = [caption.completion(config.logprobs is not None) for caption in captions]
    return GenerationOutput(
        outputs=completions,
        prompt_token_ids=prompt,
        num_tiles=[1],
        usage=Usage(
            prompt_tokens=queries + len(prompt),
            completion_tokens=sum(len(completion.token_ids) for completion in completions),
            image_tokens=queries,
            image_tiles=1,
        ),
        metrics=metrics,
    )
