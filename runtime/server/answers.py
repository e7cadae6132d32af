"""What chat and plain completions write alike: usage, tiles, milliseconds, log-probabilities."""

from dataclasses import asdict
from typing import Any

from ..engine.processor import Prepared
from ..engine.sequence import RequestRecord
from ..request import FinishReason, TokenLogprobs
from ..tokenizer import Tokenizer

_LEAST = -9999.0  # JSON has no infinity; OpenAI's API writes this for what cannot come


def usage_of(requests: list[RequestRecord]) -> dict[str, Any]:
    """What requests cost together."""
    usages = [request.usage for request in requests]
    prompt, completion = (sum(getattr(one, f"{kind}_tokens") for one in usages) for kind in ("prompt", "completion"))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(one.cached_tokens for one in usages),
            "image_tokens": sum(one.image_tokens for one in usages),
            "image_tiles": sum(one.image_tiles for one in usages),
        },
    }


def images_of(prepared: Prepared) -> list[dict[str, Any]]:
    """How each image was cut. The thumbnail is the tile beyond the grid."""
    return [
        {"grid": list(grid), "thumbnail": tiles > grid[0] * grid[1], "tiles": tiles}
        for grid, tiles in zip(prepared.grids, prepared.num_tiles, strict=True)
    ]


def extras_of(request: RequestRecord) -> dict[str, Any]:
    """What OpenAI's API has no place for."""
    metrics = {name: round(value, 3) for name, value in asdict(request.metrics).items()}
    return {"images": images_of(request.prepared), "metrics": metrics}


def finish_of(reason: FinishReason | None) -> str | None:
    """OpenAI's word for it. What was aborted or failed is told as an error, not as an answer."""
    return "length" if reason == "length" else None if reason is None else "stop"


def chat_logprobs(tokenizer: Tokenizer, token_ids: list[int], logprobs: list[TokenLogprobs]) -> dict[str, Any]:
    """Log-probabilities of tokens and of the likeliest others."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, _LEAST), "bytes": list(data)}

    content = []
    for token_id, (own, *others) in zip(token_ids, logprobs, strict=True):
        assert isinstance(own, float)
        pairs = [pair for pair in others if isinstance(pair, tuple)]
        content.append(entry(token_id, own) | {"top_logprobs": [entry(*pair) for pair in pairs]})
    return {"content": content}


def text_logprobs(
    tokenizer: Tokenizer, token_ids: list[int], logprobs: list[TokenLogprobs], offset: int = 0
) -> dict[str, Any]:
    """The same in the form of plain completions; offset: of the first token's text in the answer."""
    chat = chat_logprobs(tokenizer, token_ids, logprobs)["content"]
    offsets = []
    for entry in chat:
        offsets.append(offset)
        offset += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in chat],
        "token_logprobs": [entry["logprob"] for entry in chat],
        # Tokens that read alike, as parts of characters do, are one entry: that of the likeliest.
        "top_logprobs": [{one["token"]: one["logprob"] for one in reversed(entry["top_logprobs"])} for entry in chat],
        "text_offset": offsets,
    }
