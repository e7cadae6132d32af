"""Prometheus metrics: what the engine counts, read when they are asked for, and histograms of requests by stage."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..api import Runtime
from ..engine.sequence import RequestRecord
from ..errors import VitrailError
from ..models.internvl import InternVLModel
from .engine_process import EngineProcess

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# What of a request's metrics is a stage, in the order it meets them; `time to first token` and the like stand apart.
STAGES = ("queue", "preprocess", "image_decode", "tile", "transfer", "vision", "projector", "prefill", "decode")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_COUNTS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
_TILES = (1, 2, 4, 7, 13, 26, 52, 128)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a time beside every number
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory and CPU time of the process
        self.responses = Counter(
            "vitrail_http_responses", "Responses by route and status.", ("route", "status"), registry=registry
        )

        def histogram(name: str, text: str, labels: tuple[str, ...] = (), buckets: Iterable[float] = _SECONDS) -> Any:
            return Histogram(f"vitrail_{name}", text, labels, buckets=tuple(buckets), registry=registry)

        self._stage = histogram("request_stage_seconds", "Time of a request in each stage.", ("stage",))
        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._token = histogram("time_per_output_token_seconds", "Mean of a request, after its first token.")
        self._whole = histogram("request_seconds", "From arrival to the last token.")
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", buckets=_COUNTS)
        self._answer = histogram("request_generated_tokens", "Tokens of the answers to a prompt.", buckets=_COUNTS)
        self._tiles = histogram("request_tiles", "Tiles of the images of a prompt.", buckets=_TILES)
        self.embeddings = Counter("vitrail_embeddings", "Embeddings by kind.", ("kind",), registry=registry)

    def watch(self, runtime: Runtime) -> None:
        """Tell what the engine of a chat model counts from now on."""
        if isinstance(runtime.model, InternVLModel):
            self.registry.register(_EngineCollector(runtime))
            engine: object = runtime.engine
            if isinstance(engine, EngineProcess):
                pid = engine.worker.pid
                ProcessCollector("vitrail_engine", lambda: pid, registry=self.registry)

    def count(self, *, calls: Callable[[], float], answers: Callable[[], float]) -> None:
        """Tell how much is in flight, by asking."""
        for name, text, ask in (
            ("calls", "Calls in flight.", calls),
            ("answers", "Answers that the calls in flight ask for.", answers),
        ):
            Gauge(f"vitrail_server_{name}", text, registry=self.registry).set_function(ask)

    def observe(self, requests: list[RequestRecord]) -> None:
        """Note requests that have ended."""
        for request in requests:
            if request.first_token is None:
                continue  # it was aborted before it had an answer
            metrics, usage = request.metrics, request.prepared.usage
            for stage in STAGES:
                self._stage.labels(stage).observe(getattr(metrics, f"{stage}_ms") / 1e3)
            self._first.observe(metrics.ttft_ms / 1e3)
            if metrics.tpot_ms:
                self._token.observe(metrics.tpot_ms / 1e3)
            self._whole.observe(metrics.e2e_ms / 1e3)
            self._prompt.observe(usage.prompt_tokens)
            self._answer.observe(sum(len(sequence.token_ids) for sequence in request.sequences))
            if usage.image_tiles:
                self._tiles.observe(usage.image_tiles)

    def expose(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """`Runtime.stats()` as metrics."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def describe(self) -> Iterable[Metric]:
        return ()  # or registering would ask the engine for them

    def collect(self) -> Iterator[Metric]:
        try:
            stats = self._runtime.stats()
        except VitrailError:
            return  # an engine that has ended counts nothing
        requests, cache = stats["requests"], stats["kv_cache"]
        states = {name: requests[name] for name in ("waiting", "preprocessing", "running")}
        ends = {name: requests[name] for name in ("finished", "aborted", "failed", "preempted")}
        stages = stats["stages"]
        seconds = {name.replace(" ", "_"): stage["seconds"] for name, stage in stages.items()}
        times = {name.replace(" ", "_"): stage["times"] for name, stage in stages.items()}
        yield _gauge("requests", "Requests with the engine by what they do.", "state", states)
        yield _counter("request_ends", "Requests that ended, and preemptions.", "event", ends)
        yield _counter("tokens", "Tokens: of prompts, found in caches, generated.", "kind", stats["tokens"])
        yield _counter("tiles", "Tiles loaded, and encoded by the vision half.", "event", stats["tiles"])
        yield _counter("stage_seconds", "Time the engine spent by stage.", "stage", seconds)
        yield _counter("stage_runs", "How often each stage ran.", "stage", times)
        yield CounterMetricFamily("vitrail_engine_steps", "Steps of the engine.", value=stats["batches"]["steps"])
        means = {"decode_rows": stats["batches"]["decode_rows"], "tiles": stats["batches"]["tiles"]}
        yield _gauge("mean_batch_size", "Mean batch since the start.", "of", means)
        yield _gauge("stage_throughput", "Per second of the stage's own time.", "of", stats["per_second"])
        blocks = {"used": cache["used"], "idle": cache["idle"], "free": cache["blocks"] - cache["used"] - cache["idle"]}
        yield _gauge("kv_cache_blocks", "Blocks of keys and values; idle ones may be reused.", "state", blocks)
        yield CounterMetricFamily(
            "vitrail_engine_kv_cache_evicted_blocks", "Idle blocks given up.", value=cache["evicted"]
        )
        vision = stats["vision_cache"]
        found = {"hit": vision["hits"], "miss": vision["misses"]}
        yield _counter("vision_cache_lookups", "Images looked for in the cache of visual tokens.", "result", found)
        yield GaugeMetricFamily(
            "vitrail_engine_vision_cache_bytes", "Bytes of visual tokens kept.", value=vision["bytes"]
        )


def _gauge(name: str, text: str, label: str, values: dict[str, float]) -> Metric:
    return _filled(GaugeMetricFamily(f"vitrail_engine_{name}", text, labels=[label]), values)


def _counter(name: str, text: str, label: str, values: dict[str, float]) -> Metric:
    return _filled(CounterMetricFamily(f"vitrail_engine_{name}", text, labels=[label]), values)


def _filled(family: Any, values: dict[str, float]) -> Metric:
    for value, number in values.items():
        family.add_metric([value], number)
    return family
