"""POST /v1/completions: prompts as they stand, without the model's chat template."""

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..request import GenerationConfig
from .answers import finish_of, text_logprobs, usage_of
from .errors import as_api_error
from .exchange import answer_call, event, merged
from .schemas import CompletionBody
from .service import Flight, Service


async def completions(service: Service, request: Request) -> Response:
    """Go on with one prompt or with several."""
    return await answer_call(service, request, CompletionBody, _submit, _Answer)


def _submit(service: Service, flight: Flight, body: CompletionBody, config: GenerationConfig) -> None:
    """On a thread of the pool: check all prompts, then queue them."""
    runtime = service.runtime
    tokenizer = runtime.processor.tokenizer
    try:
        prompts = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
        for prompt in prompts:
            runtime.check_tokens(prompt)
        for prompt in prompts:  # each is the flight's at once, which ends it if one after it is refused
            service.launch(flight, runtime.submit_tokens(prompt, config))
    except Exception as error:
        raise as_api_error(error, param="prompt") from error


class _Answer:
    """What is written about the requests of one call: choice `i * n + j` is the j-th answer to the i-th prompt."""

    def __init__(self, service: Service, flight: Flight, body: CompletionBody) -> None:
        self._flight = flight
        self._body = body
        self._tokenizer = service.runtime.processor.tokenizer
        self._head = {
            "id": f"cmpl-{flight.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.settings.name,
        }

    async def whole(self) -> dict[str, Any]:
        """The answers when they are complete."""
        requests = await self._flight.wait()
        choices = []
        for prompt, request in enumerate(requests):
            for index, completion in enumerate(request.completions):
                logprobs = self._logprobs(prompt, index, 0, len(completion.token_ids), 0)
                choices.append(self._choice(prompt, index, completion.text, logprobs, completion.finish_reason))
        return self._head | {"choices": choices, "usage": usage_of(requests)}

    async def events(self) -> AsyncIterator[bytes]:
        """The answers as they come."""
        told: dict[tuple[int, int], tuple[int, int]] = {}  # tokens and characters written
        tail: dict[str, Any] = {"usage": None} if self._body.includes_usage else {}
        begun: set[tuple[int, int]] = set()
        async for fresh in self._flight.deltas():
            written = b""
            for (prompt, index), delta in merged(fresh):
                wants = self._body.logprobs is not None and delta.token_ids
                if not (delta.text or delta.finish_reason or wants):
                    continue
                tokens, characters = told.get((prompt, index), (0, 0))
                told[prompt, index] = tokens + len(delta.token_ids), characters + len(delta.text)
                logprobs = self._logprobs(prompt, index, tokens, tokens + len(delta.token_ids), characters)
                text = delta.text if (prompt, index) in begun else self._echo(prompt) + delta.text
                begun.add((prompt, index))
                choice = self._choice(prompt, index, text, logprobs, delta.finish_reason, echo=False)
                written += event(self._head | {"choices": [choice]} | tail)
            if written:
                yield written
        if self._body.includes_usage:
            yield event(self._head | {"choices": [], "usage": usage_of(self._flight.requests)})

    def _choice(
        self, prompt: int, index: int, text: str, logprobs: Any, reason: Any, *, echo: bool = True
    ) -> dict[str, Any]:
        return {
            "index": prompt * self._body.num_answers + index,
            "text": self._echo(prompt) + text if echo else text,
            "logprobs": logprobs,
            "finish_reason": finish_of(reason),
        }

    def _echo(self, prompt: int) -> str:
        if not self._body.echo:
            return ""
        given = self._body.prompts[prompt]
        return given if isinstance(given, str) else self._tokenizer.decode(given)

    def _logprobs(self, prompt: int, index: int, first: int, last: int, offset: int) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        sequence = self._flight.requests[prompt].sequences[index]
        return text_logprobs(self._tokenizer, sequence.token_ids[first:last], sequence.logprobs[first:last], offset)
