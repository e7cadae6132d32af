"""What the engine knows of a request while it is in flight, and of each completion it asks for."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import perf_counter

from torch import Tensor

from ..errors import VitrailError
from ..request import Completion, GenerationConfig, Metrics, StreamDelta, TokenLogprobs
from ..sampler import SamplingState, StopChecker
from .batch import RequestState, SequenceState
from .processor import Prepared
from .runner import Encoded
from .vision_cache import LoadedImage


@dataclass(eq=False, kw_only=True)
class Sequence(SequenceState):
    """One completion in the making."""

    sampling: SamplingState
    stop: StopChecker
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(eq=False, kw_only=True)
class Request(RequestState):
    """A prepared request, its sequences, what happened to it and when (seconds of `perf_counter`)."""

    request_id: str
    prepared: Prepared
    config: GenerationConfig
    sequences: list[Sequence]
    inv_freq: Tensor
    submitted: float
    preprocess_ms: float
    ahead: bool = False  # whether threads of the engine load its images, which then count as part of its wait
    loading: Future[list[LoadedImage]] | None = None  # while they do
    loaded: list[LoadedImage] = field(default_factory=list)
    visual: dict[int, dict[int, Encoded]] = field(default_factory=dict)  # by image and by its first tile
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None
    vision_ms: float = 0.0
    projector_ms: float = 0.0
    transfer_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    deltas: deque[StreamDelta] = field(default_factory=deque)
    error: VitrailError | None = None
    notify: Callable[[], None] | None = None  # called when there is news, by whoever drove the step

    @property
    def completions(self) -> list[Completion]:
        wants_logprobs = self.config.logprobs is not None
        return [
            Completion(
                "".join(sequence.text),
                sequence.token_ids,
                sequence.finish_reason or "abort",
                sequence.logprobs if wants_logprobs else None,
            )
            for sequence in self.sequences
        ]

    @property
    def metrics(self) -> Metrics:
        end = self.finished if self.finished is not None else perf_counter()
        start = self.admitted if self.admitted is not None else end
        first = self.first_token if self.first_token is not None else end
        later_tokens = max(len(sequence.token_ids) for sequence in self.sequences) - 1
        # What the caller's own thread prepared came before the request was submitted.
        before = 0.0 if self.ahead else self.preprocess_ms
        arrival = self.submitted - before / 1e3
        return Metrics(
            queue_ms=max(0.0, (start - self.submitted) * 1e3 - (self.preprocess_ms - before)),
            preprocess_ms=self.preprocess_ms,
            image_decode_ms=sum(image.decode_ms for image in self.loaded),
            tile_ms=sum(image.tile_ms for image in self.loaded),
            transfer_ms=self.transfer_ms,
            vision_ms=self.vision_ms,
            projector_ms=self.projector_ms,
            prefill_ms=self.prefill_ms,
            decode_ms=self.decode_ms,
            ttft_ms=(first - arrival) * 1e3,
            tpot_ms=(end - first) * 1e3 / later_tokens if later_tokens > 0 else 0.0,
            e2e_ms=(end - arrival) * 1e3,
        )
