"""What the engine knows of a request while it is in flight, and of each completion it asks for."""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as TypingSequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from time import perf_counter

from torch import Tensor

from ..errors import VitrailError
from ..request import Completion, GenerationConfig, Metrics, StreamDelta, TokenLogprobs, Usage
from ..sampler import SamplingState, StopChecker
from .batch import RequestState, SequenceState
from .processor import Prepared
from .runner import Encoded
from .vision_cache import LoadedImage


@dataclass(eq=False)
class SequenceRecord(SequenceState):
    """One completion as far as it has come."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(eq=False, kw_only=True)
class RequestRecord:
    """What callers see of a request: its answers, what happened to it and when (seconds of `perf_counter`).

    Every process of a machine reads the same clock.
    """

    request_id: str
    prepared: Prepared
    config: GenerationConfig
    sequences: TypingSequence[SequenceRecord]
    submitted: float
    preprocess_ms: float
    ahead: bool = False  # whether threads of the engine load its images, which then count as part of its wait
    loading: object = None  # something while they do
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None
    image_decode_ms: float = 0.0
    tile_ms: float = 0.0
    transfer_ms: float = 0.0
    vision_ms: float = 0.0
    projector_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    num_cached_tokens: int = 0
    deltas: deque[StreamDelta] = field(default_factory=deque)
    error: VitrailError | None = None

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
    def usage(self) -> Usage:
        """What it cost so far."""
        return replace(
            self.prepared.usage,
            completion_tokens=sum(len(sequence.token_ids) for sequence in self.sequences),
            cached_tokens=self.num_cached_tokens,
        )

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
            image_decode_ms=self.image_decode_ms,
            tile_ms=self.tile_ms,
            transfer_ms=self.transfer_ms,
            vision_ms=self.vision_ms,
            projector_ms=self.projector_ms,
            prefill_ms=self.prefill_ms,
            decode_ms=self.decode_ms,
            ttft_ms=(first - arrival) * 1e3,
            tpot_ms=(end - first) * 1e3 / later_tokens if later_tokens > 0 else 0.0,
            e2e_ms=(end - arrival) * 1e3,
        )


@dataclass(eq=False, kw_only=True)
class Sequence(SequenceRecord):
    """One completion in the making."""

    sampling: SamplingState
    stop: StopChecker


@dataclass(eq=False, kw_only=True)
class Request(RequestRecord, RequestState):
    """A prepared request while the engine works on it."""

    sequences: list[Sequence]
    inv_freq: Tensor
    loading: Future[list[LoadedImage]] | None = None  # while threads of the engine load its images
    loaded: list[LoadedImage] = field(default_factory=list)
    visual: dict[int, dict[int, Encoded]] = field(default_factory=dict)  # by image and by its first tile
    notify: Callable[[], None] | None = None  # called when there is news, by whoever drove the step
