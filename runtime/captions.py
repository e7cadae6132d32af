"""Captions of InternVL-G: one prefill of image and prompt, then a token a step for all images of a batch at once."""

from time import perf_counter

import torch
from torch import Tensor

from .errors import CapacityError, VitrailError
from .models.contrastive import ContrastiveModel
from .models.qllama import QLLaMACache
from .request import Completion, FinishReason, GenerationConfig, GenerationOutput, Metrics, TokenLogprobs, Usage
from .sampler import SamplingState, StopChecker, sample
from .tokenizer import Tokenizer

# As in the reference's evaluation.
MAX_NEW_TOKENS = 30


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
    llm, queries = model.config.llm, model.config.num_query_tokens
    config.check_vocabulary(llm.vocab_size)
    device = tiles.device
    start = perf_counter()
    vision = model.vision_model(tiles).repeat_interleave(config.n, dim=0)
    rows = len(vision)
    budget = min(config.max_new_tokens, llm.max_position_embeddings - queries - len(prompt))
    captions = [_caption(tokenizer, config, prompt, budget, row % config.n) for row in range(rows)]
    length = queries + len(prompt) + budget
    cache = QLLaMACache(llm, rows, length, dtype=vision.dtype, device=device)
    prompts = torch.tensor(prompt, device=device).expand(rows, -1)
    logits = model.begin_caption(vision, prompts, cache)
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
