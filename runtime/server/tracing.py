"""OpenTelemetry: a span for every call, below it one for each request to the engine, and below that its stages.

Needs the extra `otel`. Nothing that was asked or answered is written. Lengths of stages are the engine's own; where a
stage has no time of its own in the records it is drawn beside the moment that it leads to, since passes are shared by
requests.
"""

import asyncio
from time import perf_counter_ns, time_ns
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine.sequence import RequestRecord
from ..errors import UnsupportedError
from .service import Service
from .settings import Settings

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
    from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    from opentelemetry.util.types import AttributeValue
except ImportError:
    raise UnsupportedError("tracing needs OpenTelemetry: pip install 'vitrail[otel]'") from None

QUIET_PATHS = frozenset({"/", "/health", "/ready", "/metrics", "/version"})  # asked for every few seconds


def instrument(app: FastAPI, settings: Settings, exporter: "SpanExporter | None" = None) -> None:
    """Trace the calls of an application that has not started; by default to `settings.otlp_endpoint`.

    An endpoint without a path is a collector's own, whose path for traces is added.
    """
    if exporter is None:
        endpoint = settings.otlp_endpoint or "http://localhost:4318"
        if urlsplit(endpoint).path in ("", "/"):
            endpoint = f"{endpoint.rstrip('/')}/v1/traces"
        exporter = OTLPSpanExporter(endpoint=endpoint)
    provider = TracerProvider(resource=Resource.create({"service.name": "vitrail"}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    service: Service = app.state.service
    traces = _Traces(provider.get_tracer("vitrail.server"), settings.name)
    service.on_request.append(traces.tell)
    # Innermost: within the gate, which gives every call its id and lets in who may come.
    app.user_middleware.append(Middleware(_Tracing, traces=traces, provider=provider))


class _Traces:
    """The spans of calls by their ids, until the engine is done with them."""

    def __init__(self, tracer: Tracer, model: str) -> None:
        self.tracer = tracer
        self.calls: dict[str, Span] = {}
        self._model = model

    def tell(self, request_id: str, requests: list[RequestRecord]) -> None:
        """Write the spans of what a call asked of the engine."""
        call = self.calls.pop(request_id, None)
        if call is not None:
            for request in requests:
                self._tell_one(call, request)

    def _tell_one(self, call: Span, request: RequestRecord) -> None:
        epoch = time_ns() - perf_counter_ns()  # of the engine's clock

        def at(seconds: float) -> int:
            return epoch + int(seconds * 1e9)

        metrics, usage = request.metrics, request.usage
        end = request.finished
        assert end is not None
        first = end if request.first_token is None else request.first_token
        admitted = first if request.admitted is None else request.admitted
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": self._model,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "gen_ai.response.finish_reasons": [one.finish_reason for one in request.completions],
            "vitrail.image_tiles": usage.image_tiles,
            "vitrail.cached_tokens": usage.cached_tokens,
            "vitrail.time_to_first_token_ms": metrics.ttft_ms,
        }
        begin = min(end - metrics.e2e_ms / 1e3, admitted - metrics.preprocess_ms / 1e3)
        whole = self.tracer.start_span(
            "generate", set_span_in_context(call), attributes=attributes, start_time=at(begin)
        )
        if request.error is not None:
            whole.set_status(StatusCode.ERROR, type(request.error).__name__)
        context = set_span_in_context(whole)
        stages = {
            "queue": (request.submitted, metrics.queue_ms),
            "preprocess": (admitted - metrics.preprocess_ms / 1e3, metrics.preprocess_ms),
            "vision": (admitted, metrics.transfer_ms + metrics.vision_ms),
            "prefill": (first - metrics.prefill_ms / 1e3, metrics.prefill_ms),
            "decode": (first, (end - first) * 1e3),
        }
        for name, (start, length_ms) in stages.items():
            if length_ms > 0:
                span = self.tracer.start_span(name, context, start_time=at(start))
                span.end(at(start + length_ms / 1e3))
        whole.end(at(end))


class _Tracing:
    """ASGI middleware: a span a call, child of the caller's own where it sent a `traceparent`."""

    def __init__(self, app: ASGIApp, traces: _Traces, provider: TracerProvider) -> None:
        self._app = app
        self._traces = traces
        self._provider = provider

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":

            async def hand_over(message: Message) -> None:
                if message["type"].startswith("lifespan.shutdown."):  # after which the server waits for nobody
                    await asyncio.to_thread(self._provider.shutdown)
                await send(message)

            await self._app(scope, receive, hand_over)
            return
        if scope["type"] != "http" or scope["path"] in QUIET_PATHS:
            await self._app(scope, receive, send)
            return
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        context = TraceContextTextMapPropagator().extract(carrier)
        request_id = scope["state"]["request_id"]
        with self._traces.tracer.start_as_current_span(
            scope["method"], context, kind=SpanKind.SERVER, record_exception=False
        ) as span:
            self._traces.calls[request_id] = span
            span.set_attributes({"http.request.method": scope["method"], "vitrail.request_id": request_id})

            async def note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                await send(message)

            try:
                await self._app(scope, receive, note)
            finally:
                route = getattr(scope.get("route"), "path", "other")  # any path that a caller makes up
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.route", route)
                if "flight" not in scope["state"]:
                    self._traces.calls.pop(request_id, None)  # nothing was asked of the engine
