"""Greedy decoding three ways: vitrail with its KV cache, vitrail without, transformers with its own."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitrail.runtime.layers.kv_cache import KVBatch, KVCache
from vitrail.runtime.layers.rotary import inverse_frequencies
from vitrail.runtime.models.decoder import Decoder


@dataclass
class Greedy:
    """Chosen ids, the logits they were chosen from, and the smallest lead of a chosen token over the next best."""

    ids: list[int]
    logits: Tensor

    @property
    def smallest_gap(self) -> float:
        best, second = self.logits.topk(2, dim=-1).values.unbind(-1)
        return (best - second).min().item()


def all_logits(decoder: Decoder, embeddings: Tensor, planned_length: int = 0) -> Tensor:
    """Logits at every position of one prompt. embeddings: (tokens, hidden). Returns (tokens, vocab)."""
    tokens = embeddings.shape[0]
    inv_freq = inverse_frequencies(decoder.config, max(planned_length, tokens))
    return decoder.logits(decoder(embeddings[None], torch.arange(tokens)[None], inv_freq))[0]


def one_block(decoder: Decoder, tokens: int) -> KVCache:
    """A cache whose only block holds a whole sequence."""
    weight = decoder.embedding
    return KVCache(decoder.config, 1, tokens, dtype=weight.dtype, device=weight.device)


def cached(decoder: Decoder, embeddings: Tensor, new_tokens: int) -> Greedy:
    """Prefill once, then one token a step, reading keys and values from the cache."""
    prompt = embeddings.shape[0]
    inv_freq = inverse_frequencies(decoder.config, prompt + new_tokens)
    cache = one_block(decoder, prompt + new_tokens)
    step, positions = embeddings, torch.arange(prompt)
    ids: list[int] = []
    seen: list[Tensor] = []
    for context in range(prompt, prompt + new_tokens):
        kv = KVBatch.of(cache, [[0]], [context], [len(positions)])
        seen.append(decoder.logits(decoder(step, positions, inv_freq, kv)[-1]))
        ids.append(int(seen[-1].argmax()))
        step, positions = decoder.embed(torch.tensor([ids[-1]])), torch.tensor([context])
    return Greedy(ids, torch.stack(seen))


def teacher_forced(decoder: Decoder, embeddings: Tensor, prefill: int) -> Tensor:
    """Logits of the last prompt position and of every given token after it, one cached step each."""
    total = embeddings.shape[0]
    inv_freq = inverse_frequencies(decoder.config, total)
    cache = one_block(decoder, total)
    seen: list[Tensor] = []
    start = 0
    for stop in range(prefill, total + 1):
        kv = KVBatch.of(cache, [[0]], [stop], [stop - start])
        hidden = decoder(embeddings[start:stop], torch.arange(start, stop), inv_freq, kv)
        seen.append(decoder.logits(hidden[-1]))
        start = stop
    return torch.stack(seen)


def uncached(decoder: Decoder, embeddings: Tensor, new_tokens: int) -> Greedy:
    """The whole sequence again for every token."""
    planned = embeddings.shape[0] + new_tokens
    ids: list[int] = []
    seen: list[Tensor] = []
    for _ in range(new_tokens):
        seen.append(all_logits(decoder, embeddings, planned)[-1])
        ids.append(int(seen[-1].argmax()))
        embeddings = torch.cat((embeddings, decoder.embed(torch.tensor(ids[-1:]))))
    return Greedy(ids, torch.stack(seen))


def in_transformers(model: PreTrainedModel, prompt_ids: Tensor, new_tokens: int, **images: Tensor) -> Greedy:
    """transformers with its own cache: the prompt with its images, then one token a step. prompt_ids: (tokens,)."""
    step, cache, inputs = prompt_ids[None], None, images
    ids: list[int] = []
    seen: list[Tensor] = []
    for _ in range(new_tokens):
        output = model(input_ids=step, past_key_values=cache, use_cache=True, **inputs)
        seen.append(output.logits[0, -1])
        ids.append(int(seen[-1].argmax()))
        step, cache, inputs = torch.tensor([ids[-1:]]), output.past_key_values, {}
    return Greedy(ids, torch.stack(seen))
