"""Texts as InternVL-C/G reads them: cut to 80 tokens, sorted by length, padded no further than their batch needs."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InvalidRequestError, UnsupportedError
from .models.contrastive import ContrastiveModel
from .prefetch import batched
from .tokenizer import Tokenizer

PREFIX = "summarize:"  # of a text that is embedded; one that is matched has none
MAX_TOKENS = 80  # `<s>` and `</s>` among them
TEXTS_PER_BATCH = 128

_UNKNOWN = 0  # the id of the unknown token, which is the padding's too


@dataclass(frozen=True)
class EncodedText:
    """A text as the model reads it. `last` is the index of the token that stands for it."""

    token_ids: list[int]
    positions: list[int]
    last: int
    truncated: bool


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], *, call: str, prefix: str = PREFIX) -> list[EncodedText]:
    """Token ids of texts, `<s>` first and `</s>` last. Warns, naming `call`, of those that are cut."""
    end = tokenizer.eos_token_id
    if end is None:
        raise UnsupportedError(f"{call}: the tokenizer of this checkpoint has no end token")
    encoded = [encode_ids(tokenizer.encode(prefix + text), end) for text in texts]
    cut = [number for number, text in enumerate(encoded, start=1) if text.truncated]
    if cut:
        warnings.warn(
            f"{call}: {len(cut)} of {len(texts)} texts have more than {MAX_TOKENS} tokens and were cut there, "
            f"text {cut[0]} first",
            stacklevel=4,
        )
    return encoded


def encode_ids(ids: Sequence[int], end: int) -> EncodedText:
    """`ids`, which start with `<s>`, cut to leave room for the end token, and that.

    Unknown tokens are hidden from the others and keep their places, and the place of the token that stands for the
    text is the number of those that are not unknown: one too early for each that is. Kept, since the weights know no
    other way; a tokenizer that falls back to bytes, as the released one does, never gives one.
    """
    kept = [*ids[: MAX_TOKENS - 1], end]
    seen = [(position, token) for position, token in enumerate(kept) if token != _UNKNOWN]
    positions = [position for position, _ in seen]
    last = max(index for index, position in enumerate(positions) if position < len(seen))
    return EncodedText([token for _, token in seen], positions, last, truncated=len(ids) >= MAX_TOKENS)


def embed_texts(model: ContrastiveModel, encoded: Sequence[EncodedText]) -> Tensor:
    """Raw embeddings (texts, embed_dim) float32, on the CPU."""
    device = model.text_projection.device
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].token_ids), reverse=True)
    rows = torch.empty(len(encoded), model.config.embed_dim)
    for batch in batched(order, TEXTS_PER_BATCH):
        part = [encoded[index] for index in batch]
        longest = len(part[0].token_ids)
        token_ids = torch.tensor([_padded(text.token_ids, longest) for text in part], device=device)
        positions = torch.tensor([_padded(text.positions, longest) for text in part], device=device)
        last = torch.tensor([text.last for text in part], device=device)
        rows[batch] = model.embed_texts(token_ids, positions, last).cpu()
    return rows


def read_texts(call: str, texts: str | Sequence[str]) -> list[str]:
    """A text or a list of them as a list. Raises `InvalidRequestError` for an empty list and for an empty text."""
    written = [texts] if isinstance(texts, str) else texts
    if not isinstance(written, list | tuple):
        raise InvalidRequestError(f"{call}: texts must be a string or a list of them, not {type(texts).__name__}")
    if not written:
        raise InvalidRequestError(f"{call}: no texts were given")
    for number, text in enumerate(written, start=1):
        if not isinstance(text, str):
            raise InvalidRequestError(f"{call}: text {number} must be a string, not {type(text).__name__}")
        if not text.strip():
            raise InvalidRequestError(f"{call}: text {number} is empty")
    return list(written)


def _padded(values: list[int], length: int) -> list[int]:
    return values + [0] * (length - len(values))
