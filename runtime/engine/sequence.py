"""What the engine knows of a request while it is in flight, and of each completion it asks for."""

from collections import deque
from dataclasses import dataclass, field
from time import perf_counter

from torch import Tensor

from ..errors import VitrailError
from ..request import Completion, FinishReason, GenerationConfig, Metrics, StreamDelta, TokenLogprobs
from ..sampler import SamplingState, StopChecker
from .processor import Prepared


@dataclass(eq=False)
class Sequence:
    """One completion in the making. Its row in the KV cache is its place in `Engine.running`."""

    index: int
    sampling: SamplingState
    stop: StopChecker
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def token_ids(self) -> list[int]:
        return self.sampling.token_ids


@dataclass(eq=False)
class Request:
    """A prepared request, its sequences, what happened to it and when (seconds of `perf_counter`)."""

    request_id: str
    prepared: Prepared
    config: GenerationConfig
    sequences: list[Sequence]
    planned_length: int  # tokens of the prompt and of the longest answer
    inv_freq: Tensor
    submitted: float
    preprocess_ms: float
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None
    vision_ms: float = 0.0
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
    def metrics(self) -> Metrics:
        end = self.finished if self.finished is not None else perf_counter()
        start = self.admitted if self.admitted is not None else end
        first = self.first_token if self.first_token is not None else end
        later_tokens = max(len(sequence.token_ids) for sequence in self.sequences) - 1
        arrival = self.submitted - self.preprocess_ms / 1e3
        return Metrics(
            queue_ms=(start - self.submitted) * 1e3,
            preprocess_ms=self.preprocess_ms,
            vision_ms=self.vision_ms,
            ttft_ms=(first - arrival) * 1e3,
            tpot_ms=(end - first) * 1e3 / later_tokens if later_tokens > 0 else 0.0,
            e2e_ms=(end - arrival) * 1e3,
        )
