"""The loop: admits waiting requests, encodes their tiles together, prefills, and decodes all running sequences at once.

There is no thread of its own. Whoever waits for a result drives `step` under the engine's lock, and every step moves
all requests, so that callers in several threads, or interleaved streams in one, share batches.
"""

import re
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from ..errors import InvalidRequestError, VitrailError
from ..layers.kv_cache import KVCache, KVSlice
from ..layers.rotary import inverse_frequencies
from ..models.internvl import InternVLModel
from ..request import FinishReason, GenerationConfig, StreamDelta
from ..sampler import Sampled, SamplingState, StopChecker, sample
from ..tokenizer import Tokenizer
from .processor import Prepared
from .sequence import Request, Sequence

# Tiles in one pass of the vision half: enough to fill the matrix products, few enough to bound its activations.
TILES_PER_BATCH = 16

# What keys and values may take where the system does not tell how much memory is available.
_UNKNOWN_MEMORY = 4 * 2**30


class Engine:
    """Runs prepared requests on one model. Thread-safe."""

    def __init__(
        self,
        model: InternVLModel,
        tokenizer: Tokenizer,
        *,
        context_token_id: int,
        stop_token_ids: frozenset[int],
        max_num_seqs: int,
        max_model_len: int,
        gpu_memory_utilization: float = 0.9,
    ) -> None:
        self.model = model
        self.config = model.config
        self.tokenizer = tokenizer
        self.context_token_id = context_token_id
        self.stop_token_ids = stop_token_ids
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        token_bytes = self.config.llm.kv_bytes_per_token * self.dtype.itemsize // 2
        self.max_cached_tokens = _memory_for_cache(self.device, gpu_memory_utilization) // token_bytes
        self.cache: KVCache | None = None
        self.waiting: deque[Request] = deque()
        self.running: list[tuple[Request, Sequence]] = []
        self.closed = False
        self._requests: dict[str, Request] = {}
        self._lock = threading.RLock()
        self._in_step = False
        self._dropped: list[str] = []  # ids aborted in the middle of a step

    def submit(
        self, request_id: str, prepared: Prepared, config: GenerationConfig, preprocess_ms: float = 0.0
    ) -> Request:
        """Queue a request. Everything that can be wrong with it has been checked by now, or is checked here."""
        config.check_vocabulary(self.config.llm.vocab_size)
        prompt_length = len(prepared.token_ids)
        budget = min(config.max_new_tokens, self.max_model_len - prompt_length)
        bad_words = [
            self.tokenizer.encode(spelling, add_bos=False)
            for word in config.bad_words
            for spelling in (word, f" {word}")
        ]
        sequences = [
            Sequence(
                index,
                SamplingState(
                    config,
                    prompt_token_ids=prepared.token_ids,
                    image_token_id=self.context_token_id,
                    eos_token_ids=self.stop_token_ids,
                    bad_words=bad_words,
                    index=index,
                ),
                StopChecker(
                    config,
                    self.tokenizer.stream(skip_special_tokens=config.skip_special_tokens),
                    eos_token_ids=self.stop_token_ids,
                    max_new_tokens=budget,
                ),
            )
            for index in range(config.n)
        ]
        planned = prompt_length + budget
        inv_freq = inverse_frequencies(self.config.llm, planned).to(self.device)
        now = perf_counter()
        request = Request(request_id, prepared, config, sequences, planned, inv_freq, now, preprocess_ms)
        with self._lock:
            if self.closed:
                raise InvalidRequestError("this Runtime is closed")
            if request_id in self._requests:
                raise InvalidRequestError(f"request id {request_id!r} is in use")
            self._requests[request_id] = request
            self.waiting.append(request)
        return request

    def stream(self, request: Request) -> Iterator[StreamDelta]:
        """Deltas of a request as they come; leaving the loop early aborts it. Raises the request's own error."""
        deltas = self._stream(request)
        next(deltas)  # one that was never started would not abort the request when it is closed or dropped
        return deltas

    def _stream(self, request: Request) -> Iterator[StreamDelta]:
        try:
            yield StreamDelta("", [])  # `stream` takes this one
            while True:
                with self._lock:
                    if not request.deltas and request.finished is None:
                        self.step()
                    deltas = list(request.deltas)
                    request.deltas.clear()
                yield from deltas
                if request.finished is not None and not request.deltas:
                    break
        finally:
            self.abort(request.request_id)
        if request.error is not None:
            raise request.error

    @torch.inference_mode()
    def abort(self, request_id: str) -> bool:
        """End a request wherever it is and free what it holds. Returns whether there was one."""
        with self._lock:
            request = self._requests.get(request_id)
            if request is None:
                return False
            if self._in_step:  # the garbage collector closes a dropped stream wherever this thread happens to be
                self._dropped.append(request_id)
            else:
                self._finish(request, "abort")
            return True

    def close(self) -> None:
        """Abort every request and let go of the model and the cache."""
        with self._lock:
            if self.closed:
                return
            for request_id in list(self._requests):
                self.abort(request_id)
            self.closed = True
            self.cache = None
            del self.model

    @torch.inference_mode()
    def step(self) -> None:
        """Admit what fits, otherwise decode one token of every running sequence."""
        with self._lock:
            self._in_step = True
            try:
                if admitted := self._admit():
                    self._start(admitted)
                elif self.running:
                    self._decode_all()
            finally:
                self._in_step = False
                while self._dropped:
                    self.abort(self._dropped.pop())

    # --- admission and prefill ---

    def _admit(self) -> list[Request]:
        """Waiting requests, in order, whose sequences find free rows and memory; one always does if nothing runs."""
        admitted: list[Request] = []
        rows = len(self.running)
        length = max((request.planned_length for request, _ in self.running), default=0)
        while self.waiting:
            request = self.waiting[0]
            needed_rows = rows + len(request.sequences)
            needed_length = max(length, request.planned_length)
            full = needed_rows > self.max_num_seqs or needed_rows * needed_length > self.max_cached_tokens
            if full and rows:
                break
            rows, length = needed_rows, needed_length
            request.admitted = perf_counter()
            admitted.append(self.waiting.popleft())
        return admitted

    def _start(self, requests: list[Request]) -> None:
        """Find memory for admitted requests and prefill them; what fails here fails those that have no row yet."""
        try:
            self._reserve(requests)
            self._prefill(requests)
        except BaseException as error:
            started = [request for request, _ in self.running]
            for request in requests:
                if request.finished is None and request not in started:
                    self._fail(request, error)
            if not isinstance(error, Exception):  # an interrupt is for the caller
                raise

    def _reserve(self, requests: list[Request]) -> None:
        """Make the cache hold what runs, which is kept, and the sequences of `requests`."""
        cache, running = self.cache, len(self.running)
        rows = running + sum(len(request.sequences) for request in requests)
        length = max(request.planned_length for request in [*requests, *(request for request, _ in self.running)])
        if cache is not None:
            if cache.rows >= rows and cache.length >= length:
                return
            # What was needed once is needed again, as long as both fit together.
            if max(rows, cache.rows) * max(length, cache.length) <= self.max_cached_tokens:
                rows, length = max(rows, cache.rows), max(length, cache.length)
        if not running:
            cache = self.cache = None  # its memory goes back before the new one is taken
        grown = KVCache(self.config.llm, rows, length, dtype=self.dtype, device=self.device)
        if cache is not None:
            grown.copy_from(cache, running)
        self.cache = grown

    def _prefill(self, requests: list[Request]) -> None:
        """Encode the tiles of all requests together, then run each prompt and sample its first tokens."""
        visual_tokens = self._encode(requests)
        for request in requests:
            try:
                if request.error is None:
                    self._prefill_one(request, visual_tokens.pop(request.request_id, None))
            except Exception as error:
                self._fail(request, error)

    def _encode(self, requests: list[Request]) -> dict[str, Tensor]:
        """Visual tokens (tokens, hidden) of each request that has tiles."""
        tiled = [request for request in requests if request.prepared.tiles]
        try:
            return self._encode_together(tiled)
        except Exception:
            # One request must not take the others with it: find out whose tiles it was.
            tokens: dict[str, Tensor] = {}
            for request in tiled:
                try:
                    tokens |= self._encode_together([request])
                except Exception as error:
                    self._fail(request, error)
            return tokens

    def _encode_together(self, requests: list[Request]) -> dict[str, Tensor]:
        if not requests:
            return {}
        start = perf_counter()
        tiles = torch.cat([torch.from_numpy(tiles) for request in requests for tiles in request.prepared.tiles])
        encoded = [self.model.encode_tiles(part.to(self.device)) for part in tiles.split(TILES_PER_BATCH)]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # so that the time below is the vision half's, not its launch
        per_request = torch.cat(encoded).split([sum(request.prepared.num_tiles) for request in requests])
        elapsed_ms = (perf_counter() - start) * 1e3
        for request in requests:
            request.vision_ms = elapsed_ms
            request.prepared.tiles.clear()
        return {request.request_id: tokens.flatten(0, 1) for request, tokens in zip(requests, per_request, strict=True)}

    def _prefill_one(self, request: Request, visual_tokens: Tensor | None) -> None:
        assert self.cache is not None
        row = len(self.running)
        token_ids = torch.tensor(request.prepared.token_ids, device=self.device)
        decoder = self.model.language_model
        if visual_tokens is None:
            x = decoder.embed(token_ids)
        else:
            x = self.model.splice(token_ids, visual_tokens, self.context_token_id)
        length = len(token_ids)
        positions = torch.arange(length, device=self.device)[None]
        hidden = decoder(x[None], positions, request.inv_freq, KVSlice(self.cache, row, positions, length))
        logits = decoder.logits(hidden[:, -1])
        for copy in range(1, len(request.sequences)):
            self.cache.copy_row(row, row + copy, length)
        self.running.extend((request, sequence) for sequence in request.sequences)
        self._accept(logits.expand(len(request.sequences), -1), self.running[row:])

    # --- decode ---

    def _decode_all(self) -> None:
        """One token of every running sequence.

        Whose fault it is when a whole step fails cannot be told. The request that came last is failed and the others
        try again without it: enough where memory was short, and an end, one by one, where nothing helps.
        """
        try:
            self._decode()
        except Exception as error:
            self._fail(self.running[-1][0], error)

    def _decode(self) -> None:
        assert self.cache is not None
        lens = [len(request.prepared.token_ids) + len(sequence.token_ids) for request, sequence in self.running]
        tokens = torch.tensor([sequence.token_ids[-1] for _, sequence in self.running], device=self.device)
        context_lens = torch.tensor(lens, device=self.device)
        positions = context_lens[:, None] - 1
        ragged = min(lens) != max(lens)
        kv = KVSlice(self.cache, 0, positions, max(lens), context_lens if ragged else None)
        inv_freq = torch.stack([request.inv_freq for request, _ in self.running])
        decoder = self.model.language_model
        hidden = decoder(decoder.embed(tokens)[:, None], positions, inv_freq, kv)
        self._accept(decoder.logits(hidden[:, 0]), list(self.running))

    def _accept(self, logits: Tensor, rows: list[tuple[Request, Sequence]]) -> None:
        """Sample the next token of each row, publish what became certain, and retire what is done."""
        now_sampled = sample(logits, [sequence.sampling for _, sequence in rows])
        now = perf_counter()
        for (request, sequence), sampled in zip(rows, now_sampled, strict=True):
            if request.finished is not None:
                continue  # a sibling row failed
            if isinstance(sampled, VitrailError):
                self._fail(request, sampled)
                continue
            if request.first_token is None:
                request.first_token = now
            self._extend(request, sequence, sampled)
        for request in {id(request): request for request, _ in rows}.values():
            if request.finished is None and all(sequence.finish_reason for sequence in request.sequences):
                self._finish(request, "stop")
        self._retire()

    def _extend(self, request: Request, sequence: Sequence, sampled: Sampled) -> None:
        if sampled.logprobs is not None:
            sequence.logprobs.append(sampled.logprobs)
        text, sequence.finish_reason = sequence.stop.push(sampled.token_id)
        sequence.text.append(text)
        request.deltas.append(StreamDelta(text, [sampled.token_id], sequence.finish_reason, sequence.index))

    # --- endings ---

    def _fail(self, request: Request, error: BaseException) -> None:
        """Close a request for an error; one that is not ours is wrapped, so that a caller meets only ours."""
        if not isinstance(error, VitrailError):
            inside = error
            reason = " ".join(str(inside).split())
            error = VitrailError(f"the request failed inside vitrail: {type(inside).__name__}: {reason}")
            error.__cause__ = inside
        request.error = error
        if self.cache is not None:
            for row, (owner, _) in enumerate(self.running):
                if owner is request:
                    # NaN in masked places still reaches a sum: the row's next sequence must not find any.
                    self.cache.clear_row(row)
        self._finish(request, "error")

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """Close a request: sequences that are not done yet end for `reason`, with the text they held back."""
        request.finished = perf_counter()
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = reason
                sequence.text.append(sequence.stop.flush())
                request.deltas.append(StreamDelta(sequence.text[-1], [], reason, sequence.index))
        self._requests.pop(request.request_id, None)
        if request.admitted is None:
            self.waiting.remove(request)
        self._retire()

    def _retire(self) -> None:
        """Give back the rows of finished sequences; the last row moves into each gap, so that rows stay dense."""
        row = 0
        while row < len(self.running):
            sequence = self.running[row][1]
            if sequence.finish_reason is None:
                row += 1
                continue
            moved_request, moved = self.running.pop()
            if moved is sequence:
                continue
            self.running[row] = (moved_request, moved)
            if self.cache is not None and moved.finish_reason is None:
                length = len(moved_request.prepared.token_ids) + len(moved.token_ids)
                self.cache.copy_row(len(self.running), row, length)


def _memory_for_cache(device: torch.device, gpu_memory_utilization: float) -> int:
    """Bytes that keys and values may take beside what is loaded already: on a CPU half of what is available."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, free - int((1 - gpu_memory_utilization) * total))
    try:
        # Not the free pages alone: a checkpoint that was just read still stands in the page cache.
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return int(found[1]) * 1024 // 2 if found else _UNKNOWN_MEMORY
