"""POST /v1/embeddings: texts and images, by the contrastive models (InternVL-C and -G)."""

import base64
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..media import fetch_all
from ..models.contrastive import Mode
from .errors import ApiError, as_api_error
from .exchange import JsonResponse, flight_of, read_body, watch_client
from .schemas import EmbeddingBody, ImagePart, TextPart
from .service import Flight, Service

Input = str | TextPart | ImagePart


async def embeddings(service: Service, request: Request) -> Response:
    """Embed texts and images, in the order of the input."""
    async with flight_of(service, request) as flight:
        body = await read_body(request, EmbeddingBody)
        watch_client(request, flight)
        service.require_contrastive(body.model)
        inputs: list[Input] = [body.input] if isinstance(body.input, str) else [*body.input]
        urls = [url for one in inputs if isinstance(one, ImagePart) for url in one.urls]
        images = await service.run_reading(flight, urls, partial(_fetch, service, inputs))
        rows, num_tokens = await service.run_model(
            flight, partial(_embed, service, flight, inputs, images, body.mode or "c")
        )
        if body.dimensions not in (None, rows.shape[1]):
            message = f"dimensions: this model's embeddings have {rows.shape[1]}"
            raise ApiError(400, message, param="dimensions")
        service.metrics.embeddings.labels("image").inc(len(images))
        service.metrics.embeddings.labels("text").inc(len(inputs) - len(images))
        as_base64 = body.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(row.tobytes()).decode() if as_base64 else row.tolist(),
            }
            for index, row in enumerate(rows.astype("<f4"))
        ]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return JsonResponse({"object": "list", "data": data, "model": service.settings.name, "usage": usage})


def _fetch(service: Service, inputs: list[Input]) -> list[bytes]:
    """The files of the images of the input, in order."""
    references = [
        (url, f"input {number}")
        for number, one in enumerate(inputs, start=1)
        if isinstance(one, ImagePart)
        for url in one.urls
    ]
    try:
        return fetch_all(references, service.media)
    except Exception as error:
        raise as_api_error(error, param="input") from error


def _embed(service: Service, flight: Flight, inputs: list[Input], images: list[bytes], mode: Mode) -> tuple[Any, int]:
    """(inputs, embed_dim) float32 and the tokens of the texts. On the model's thread."""
    import numpy as np

    runtime = service.runtime
    if flight.reason is not None:
        raise flight.reason
    texts = [one if isinstance(one, str) else one.text for one in inputs if not isinstance(one, ImagePart)]
    try:
        of_texts = iter(runtime.embed(texts=texts).numpy() if texts else ())
        of_images = iter(runtime.embed(images=images, mode=mode).numpy() if images else ())
        num_tokens = sum(len(runtime.tokenizer.encode(text)) for text in texts) if runtime.tokenizer else 0
    except Exception as error:
        raise as_api_error(error, param="input") from error
    rows = [next(of_images if isinstance(one, ImagePart) else of_texts) for one in inputs]
    return np.stack(rows), num_tokens
