"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..engine.processor import Conversation
from ..messages import conversation_of
from ..request import GenerationConfig
from .answers import chat_logprobs, extras_of, finish_of, usage_of
from .errors import as_api_error
from .exchange import answer_call, event, merged
from .schemas import ChatBody, Message
from .service import Flight, Service


def read_messages(service: Service, messages: list[Message]) -> Conversation:
    """The conversation, its media fetched: for a thread of the pool. Raises `ApiError`."""
    runtime = service.runtime
    plain = [message.model_dump(include={"role", "content"}, exclude_none=True) for message in messages]
    try:
        return conversation_of(
            plain,
            media=service.media,
            limits=runtime.limits,
            max_images=runtime.processor.max_images,
            urls_only=True,
        )
    except Exception as error:
        raise as_api_error(error, param="messages") from error


async def chat_completions(service: Service, request: Request) -> Response:
    """Answer a conversation, at once or as a stream."""
    return await answer_call(service, request, ChatBody, _submit, _Answer)


def _submit(service: Service, flight: Flight, body: ChatBody, config: GenerationConfig) -> None:
    """On a thread of the pool: read, check, queue."""
    conversation = read_messages(service, body.messages)
    try:
        request = service.runtime.submit(conversation, config)
    except Exception as error:
        raise as_api_error(error, param="messages") from error
    service.launch(flight, request)


class _Answer:
    """What is written about one request."""

    def __init__(self, service: Service, flight: Flight, body: ChatBody) -> None:
        self._service = service
        self._flight = flight
        self._body = body
        self._head = {
            "id": f"chatcmpl-{flight.id}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": service.settings.name,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer when it is complete."""
        [request] = await self._flight.wait()
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "logprobs": self._logprobs(index, 0, len(completion.token_ids)),
                "finish_reason": finish_of(completion.finish_reason),
            }
            for index, completion in enumerate(request.completions)
        ]
        return self._head | {"choices": choices, "usage": usage_of([request]), "vitrail": extras_of(request)}

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as it comes."""
        [request] = self._flight.requests
        told = [0] * self._body.num_answers  # tokens whose log-probabilities have been written
        begun: set[int] = set()
        # With `include_usage` every chunk has the field, null in all but the last.
        tail: dict[str, Any] = {"usage": None} if self._body.includes_usage else {}
        async for fresh in self._flight.deltas():
            written = b""
            for (_, index), delta in merged(fresh):
                wants = self._body.logprobs and delta.token_ids
                if not (delta.text or delta.finish_reason or wants):
                    continue  # text that is held back, in case a stop string begins with it
                message: dict[str, Any] = {} if index in begun else {"role": "assistant"}
                if delta.text or index not in begun:
                    message["content"] = delta.text
                begun.add(index)
                first, told[index] = told[index], told[index] + len(delta.token_ids)
                choice = {
                    "index": index,
                    "delta": message,
                    "logprobs": self._logprobs(index, first, told[index]) if wants else None,
                    "finish_reason": finish_of(delta.finish_reason),
                }
                written += event(self._head | {"choices": [choice]} | tail)
            if written:
                yield written
        if self._body.includes_usage:
            yield event(self._head | {"choices": [], "usage": usage_of([request]), "vitrail": extras_of(request)})

    def _logprobs(self, index: int, first: int, last: int) -> dict[str, Any] | None:
        """Those of the tokens first .. last of an answer."""
        if not self._body.logprobs:
            return None
        sequence = self._flight.requests[0].sequences[index]
        tokenizer = self._service.runtime.processor.tokenizer
        return chat_logprobs(tokenizer, sequence.token_ids[first:last], sequence.logprobs[first:last])
