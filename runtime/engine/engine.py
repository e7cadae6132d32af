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

from ..errors import CapacityError, InvalidRequestError, VitrailError
from ..layers.kv_cache import BLOCK_SIZE
from ..layers.rotary import inverse_frequencies
from ..models.internvl import InternVLModel
from ..request import FinishReason, GenerationConfig, StreamDelta
from ..sampler import Sampled, SamplingState, StopChecker, sample
from ..tokenizer import Tokenizer
from .block_manager import BlockManager
from .processor import Prepared
from .runner import Runner
from .sequence import Request, Sequence

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
        enforce_eager: bool = False,
    ) -> None:
        self.config = model.config
        self.tokenizer = tokenizer
        self.context_token_id = context_token_id
        self.stop_token_ids = stop_token_ids
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.runner = Runner(model, max_num_seqs=max_num_seqs, max_model_len=max_model_len, enforce_eager=enforce_eager)
        self.device = self.runner.device
        self.runner.warm_up_vision()
        block_bytes = BLOCK_SIZE * self.config.llm.kv_bytes_per_token * self.runner.dtype.itemsize // 2
        self.max_blocks = _memory_for_cache(self.device, gpu_memory_utilization) // block_bytes
        self.blocks = BlockManager(0, BLOCK_SIZE)
        if self.device.type == "cuda":  # elsewhere memory is taken as requests need it
            self.max_blocks = min(self.max_blocks, max_num_seqs * self.blocks.blocks_for(max_model_len))
            if not self.max_blocks:
                raise CapacityError(f"{self.device}: the weights leave no memory for keys and values")
            self._grow_cache(self.max_blocks)
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
        if self.device.type == "cuda" and config.n * self.blocks.blocks_for(planned) > self.max_blocks:
            raise CapacityError(
                f"{config.n} answers to a prompt of {prompt_length} tokens may come to {config.n * planned} tokens of "
                f"keys and values; {self.max_blocks * BLOCK_SIZE} fit the memory of {self.device}"
            )
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
            del self.runner

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
        """Waiting requests, in order, whose sequences find room and blocks; one always does if nothing runs."""
        admitted: list[Request] = []
        rows, blocks = len(self.running), self.blocks.num_used
        while self.waiting:
            request = self.waiting[0]
            needed_rows = rows + len(request.sequences)
            needed_blocks = blocks + len(request.sequences) * self.blocks.blocks_for(request.planned_length)
            if rows and (needed_rows > self.max_num_seqs or needed_blocks > self.max_blocks):
                break
            rows, blocks = needed_rows, needed_blocks
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
        """Lend blocks to the sequences of `requests` for all the tokens they may come to."""
        needed = sum(len(request.sequences) * self.blocks.blocks_for(request.planned_length) for request in requests)
        if needed > self.blocks.num_free:
            # Twice as many as far as memory allows, so that what is copied along stays in proportion.
            self._grow_cache(max(self.blocks.num_used + needed, min(2 * self.blocks.num_blocks, self.max_blocks)))
        for request in requests:
            for sequence in request.sequences:
                self.blocks.allocate(sequence, request.planned_length)

    def _grow_cache(self, num_blocks: int) -> None:
        self.runner.allocate(num_blocks, keep=self.blocks.num_used > 0)
        self.blocks.grow(num_blocks)

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
        encoded = self.runner.encode(tiles)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # so that the time below is the vision half's, not its launch
        per_request = encoded.split([sum(request.prepared.num_tiles) for request in requests])
        elapsed_ms = (perf_counter() - start) * 1e3
        for request in requests:
            request.vision_ms = elapsed_ms
            request.prepared.tiles.clear()
        return {request.request_id: tokens.flatten(0, 1) for request, tokens in zip(requests, per_request, strict=True)}

    def _prefill_one(self, request: Request, visual_tokens: Tensor | None) -> None:
        first, *others = request.sequences
        token_ids = request.prepared.token_ids
        table = self.blocks.table(first)
        logits = self.runner.prefill(token_ids, visual_tokens, self.context_token_id, request.inv_freq, table)
        filled = self.blocks.blocks_for(len(token_ids))
        for other in others:
            self.runner.copy_blocks(table[:filled], self.blocks.table(other)[:filled])
        rows = [(request, sequence) for sequence in request.sequences]
        self.running.extend(rows)
        self._accept(logits.expand(len(rows), -1), rows)

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
        rows = list(self.running)
        logits = self.runner.decode(
            [sequence.token_ids[-1] for _, sequence in rows],
            [len(request.prepared.token_ids) + len(sequence.token_ids) for request, sequence in rows],
            torch.stack([request.inv_freq for request, _ in rows]),
            [self.blocks.table(sequence) for _, sequence in rows],
        )
        self._accept(logits, rows)

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
        if sequence.finish_reason is not None:
            self.blocks.free(sequence)
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
        self._finish(request, "error")

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """Close a request: sequences that are not done yet end for `reason`, with the text they held back."""
        request.finished = perf_counter()
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = reason
                sequence.text.append(sequence.stop.flush())
                request.deltas.append(StreamDelta(sequence.text[-1], [], reason, sequence.index))
            self.blocks.free(sequence)
        self._requests.pop(request.request_id, None)
        if request.admitted is None:
            self.waiting.remove(request)
        self._retire()

    def _retire(self) -> None:
        """Let finished sequences go."""
        self.running = [(request, sequence) for request, sequence in self.running if sequence.finish_reason is None]


def _memory_for_cache(device: torch.device, gpu_memory_utilization: float) -> int:
    """Bytes that keys and values may take beside what is loaded already: on a CPU half of what is available."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading and warming up have freed counts as free
        free, total = torch.cuda.mem_get_info(device)
        return max(0, free - int((1 - gpu_memory_utilization) * total))
    try:
        # Not the free pages alone: a checkpoint that was just read still stands in the page cache.
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return int(found[1]) * 1024 // 2 if found else _UNKNOWN_MEMORY
