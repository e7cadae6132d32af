"""The loop: prepares images ahead, encodes tiles and runs tokens of all requests together, step by step.

Whoever waits for a result drives (`turns.py`), and every step moves all requests, so that callers in several threads,
or interleaved streams in one, share batches. A step belongs to the one who drives it; everybody else leaves messages,
which the next step reads.
"""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..errors import CapacityError, InvalidRequestError, VitrailError
from ..layers.kv_cache import BLOCK_SIZE
from ..layers.rotary import inverse_frequencies
from ..request import FinishReason, GenerationConfig, StreamDelta
from ..sampler import Sampled, SamplingState, StopChecker, sample
from ..structured import Grammars
from ..tokenizer import Tokenizer
from .batch import Batch, Chunk, Tiles, image_places
from .memory import first_blocks
from .preparation import Preparation
from .processor import Prepared, Processor
from .recorder import Recorder
from .runner import Row, Runner
from .scheduler import CHUNK_TOKENS, Scheduler
from .sequence import Request, Sequence
from .turns import Turns
from .vision_cache import LoadedImage, VisionCache, domain_key, tiles_key
from .vision_stage import Arrived, VisionStage, VisionWorkers


class Engine:
    """Runs prepared requests on the model of a runner. Thread-safe.

    `revision` names the model in the keys of caches. With an `exact` runner every pass has a shape that the request
    alone decides, so that its greedy answer is the same to the bit whatever runs beside it. `vision`: workers that the
    vision half runs on, if not where the runner is; whoever made them ends them. `chunk_tokens`: of prompts in a step
    in which others decode.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        processor: Processor,
        *,
        context_token_id: int,
        stop_token_ids: frozenset[int],
        max_num_batched_tokens: int = 8192,
        chunk_tokens: int = CHUNK_TOKENS,
        gpu_memory_utilization: float = 0.9,
        enable_prefix_caching: bool = True,
        vision_cache: VisionCache | None = None,
        recorder: Recorder | None = None,
        vision: VisionWorkers | None = None,
        revision: str = "",
    ) -> None:
        self.runner = runner
        self.vision = vision
        self.config = runner.config
        self.device = runner.device
        self.max_num_seqs = runner.max_num_seqs
        self.max_model_len = runner.max_model_len
        self.tokenizer = tokenizer
        self.processor = processor
        self.context_token_id = context_token_id
        self.stop_token_ids = stop_token_ids
        self.revision = revision
        self.recorder = recorder or Recorder()
        self.vision_cache = vision_cache or VisionCache(2**30)
        self.grammars = Grammars(tokenizer, self.config.llm.vocab_size, stop_token_ids)
        if vision is None:
            runner.warm_up_vision()
        self.blocks = first_blocks(runner, gpu_memory_utilization)
        self.scheduler: Scheduler[Request] = Scheduler(
            self.blocks,
            max_num_seqs=runner.max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
            exact=runner.exact,
            chunk_tokens=chunk_tokens,
            tiles_in_flight=None if vision is None else vision.capacity,
        )
        self.closed = False
        self._failure: VitrailError | None = None
        self._requests: dict[str, Request] = {}
        self._arrivals = count()
        self._registry = threading.Lock()  # of new requests against the end of all
        self.turns = Turns(lambda: self._step())
        # Keys of images are of use only if something is cached.
        self._names_images = enable_prefix_caching or self.vision_cache.max_bytes > 0
        self.preparation = Preparation(
            processor,
            self.vision_cache if self._names_images else None,
            self.recorder,
            self._domain,
            self._report_loaded,
        )
        self.vision_stage = VisionStage(self.runner, self.vision_cache, self.recorder, vision)
        self._pass: tuple[str, list[Chunk[Request]], float] | None = None  # that runs, and since when
        self._decoding: list[Chunk[Request]] = []  # of the step that runs

    # --- what callers do ---

    def submit(
        self,
        request_id: str,
        prepared: Prepared,
        config: GenerationConfig,
        preprocess_ms: float = 0.0,
        loaded: list[LoadedImage] | None = None,
    ) -> Request:
        """Queue a request. Everything that can be wrong with it has been checked by now, or is checked here.

        loaded: its images, from `load`; if there are none yet, threads of the engine load them ahead of their turn.
        """
        config.check_vocabulary(self.config.llm.vocab_size)
        prompt_length = len(prepared.token_ids)
        budget = min(config.max_new_tokens, self.max_model_len - prompt_length)
        planned = prompt_length + budget
        needed = config.n * self.blocks.blocks_for(planned)
        if needed > self.blocks.limit:
            if self.device.type == "cuda":
                raise CapacityError(
                    f"{config.n} answers to a prompt of {prompt_length} tokens may come to {config.n * planned} tokens "
                    f"of keys and values; {self.blocks.limit * BLOCK_SIZE} fit the memory of {self.device}"
                )
            self.blocks.limit = needed  # an estimate on a CPU, of what else is there to be had
        inv_freq = inverse_frequencies(self.config.llm, planned)
        domain = self._domain(config)
        request = Request(
            arrival=next(self._arrivals),
            prompt_token_ids=prepared.token_ids,
            planned_length=planned,
            images=image_places(
                prepared.token_ids, self.context_token_id, prepared.num_tiles, self.config.tokens_per_tile
            ),
            prefix_key=domain_key(domain.hex(), inv_freq.numpy().tobytes().hex()),
            request_id=request_id,
            prepared=prepared,
            config=config,
            sequences=self._sequences(prepared.token_ids, config, budget),
            inv_freq=inv_freq.to(self.device),
            submitted=perf_counter(),
            preprocess_ms=preprocess_ms,
        )
        if loaded is not None:
            request.loaded = loaded
        elif prepared.tiles:
            keys = [tiles_key(tiles, domain) if self._names_images else b"" for tiles in prepared.tiles]
            request.loaded = [LoadedImage(key, tiles) for key, tiles in zip(keys, prepared.tiles, strict=True)]
        with self._registry:
            if self.closed:
                raise InvalidRequestError("this Runtime is closed")
            if self.failure is not None:
                raise self.failure
            if request_id in self._requests:
                raise InvalidRequestError(f"request id {request_id!r} is in use")
            self._requests[request_id] = request
        self.turns.post(partial(self._arrive, request))
        return request

    def load(self, prepared: Prepared, config: GenerationConfig) -> list[LoadedImage]:
        """The images of a prompt for `submit`, on this thread or, if there are several, on those of the engine."""
        return self.preparation.load(prepared, config)

    def stream(self, request: Request) -> Iterator[StreamDelta]:
        """Deltas of a request as they come; leaving the loop early aborts it. Raises the request's own error."""
        deltas = self._stream(request)
        next(deltas)  # one that was never started would not abort the request when it is closed or dropped
        return deltas

    def _stream(self, request: Request) -> Iterator[StreamDelta]:
        try:
            yield StreamDelta("", [])  # `stream` takes this one
            while True:
                self.turns.drive_until(lambda: bool(request.deltas) or request.finished is not None)
                finished = request.finished is not None
                while request.deltas:
                    yield request.deltas.popleft()
                if finished:
                    break
        finally:
            self._abort(request)  # itself, for its id may be another's by now
        if request.error is not None:
            raise request.error

    def run_in_background(self, request: Request, notify: Callable[[], None]) -> None:
        """Have the engine's thread drive until the request is done; `notify` is called there whenever there is news."""
        request.notify = notify
        self.turns.join(request)
        if request.finished is not None:  # so early that it could not be known that anybody waits
            self.turns.leave(request)
            notify()

    def abort(self, request_id: str) -> bool:
        """End a request wherever it is and free what it holds. Returns whether there was one.

        If someone else drives, that happens at the end of the step that runs.
        """
        request = self._requests.get(request_id)
        if request is not None:
            self._abort(request)
        return request is not None

    def _abort(self, request: Request) -> None:
        if request.finished is None:
            self.turns.post(partial(self._finish, request, "abort"), now=True)

    @property
    def failure(self) -> VitrailError | None:
        """Why no request can be answered any more."""
        if self._failure is None and not self.closed:
            self._failure = self.runner.failure
        return self._failure

    def fail_all(self, error: VitrailError) -> None:
        """End every request with `error`, and refuse new ones with it. On any thread."""
        with self._registry:
            self._failure = self._failure or error
        self.turns.post(partial(self._fail_all, error), now=True)

    def close(self) -> None:
        """Abort every request and let go of the model and the cache."""
        with self._registry:
            if self.closed:
                return
            self.closed = True
        for request_id in list(self._requests):
            self.abort(request_id)
        with self.turns.turn():
            self.turns.read()
            self.preparation.close()
            self.vision_cache.clear()
            del self.runner, self.vision_stage

    def step(self) -> None:
        """Read what callers ask for, then run one batch. Waits for images or tiles if there is nothing else to do."""
        with self.turns.turn():
            self._step()

    def stats(self) -> dict[str, dict[str, Any]]:
        """What happened so far and what is there now, in plain types."""
        counts, seconds = self.recorder.snapshot()
        blocks, cache = self.blocks, self.vision_cache
        return {
            "requests": {
                "waiting": len(self.waiting),
                "preprocessing": len(self.preparation.loading),
                "running": len(self.scheduler.running),
                **{name: counts.get(f"requests {name}", 0) for name in ("finished", "aborted", "failed", "preempted")},
            },
            "tokens": {name: counts.get(f"tokens {name}", 0) for name in ("prompt", "cached", "generated")},
            "tiles": {"encoded": counts.get("tiles encoded", 0), "loaded": counts.get("tiles loaded", 0)},
            "stages": {
                name: {"times": counts[name], "seconds": seconds[name]} for name in sorted(seconds) if name in counts
            },
            "batches": {
                "steps": counts.get("steps", 0),
                "decode_rows": _ratio(counts.get("decode tokens", 0), counts.get("decode", 0)),
                "tiles": _ratio(counts.get("tiles encoded", 0), counts.get("vision", 0)),
            },
            "per_second": {
                "tiles": _ratio(counts.get("tiles encoded", 0), seconds.get("vision", 0.0)),
                "prompt_tokens": _ratio(counts.get("prefill tokens", 0), seconds.get("prefill", 0.0)),
                "generated_tokens": _ratio(counts.get("decode tokens", 0), seconds.get("decode", 0.0)),
            },
            "kv_cache": {
                "blocks": blocks.num_blocks,
                "used": blocks.num_used,
                "idle": blocks.num_idle,
                "evicted": blocks.num_evicted,
            },
            "vision_cache": {"bytes": cache.num_bytes, "hits": cache.hits, "misses": cache.misses},
            **({"vision_workers": self._vision_stats()} if self.vision is not None else {}),
        }

    def _vision_stats(self) -> dict[str, object]:
        assert self.vision is not None
        in_flight = self.scheduler.tiles_in_flight
        return {**self.vision.stats(), "tiles_in_flight": self.scheduler.num_in_flight, "capacity": in_flight}

    @property
    def num_requests(self) -> int:
        """Requests that are not done."""
        return len(self._requests)

    def has(self, request_id: str) -> bool:
        """Whether a request of this name is not done."""
        return request_id in self._requests

    @property
    def num_steps(self) -> int:
        """Steps that were taken."""
        return self.recorder.counts["steps"]

    @property
    def reading(self) -> bool:
        """Whether images are being read."""
        return bool(self.preparation.loading)

    @property
    def broken(self) -> bool:
        """Whether the thread that drives in the background has ended though there is work."""
        return self.turns.broken

    @property
    def running(self) -> list[tuple[Request, Sequence]]:
        """The rows of requests that were admitted."""
        return [
            (request, sequence)
            for request in self.scheduler.running
            for sequence in request.sequences
            if sequence.finish_reason is None
        ]

    @property
    def waiting(self) -> list[Request]:
        """Requests that were never admitted or had to give their place back."""
        return [request for request in list(self._requests.values()) if request not in self.scheduler.running]

    # --- a step ---

    @torch.inference_mode()
    def _step(self) -> None:
        try:
            self._run_step()
        except Exception as error:  # of the engine's own making: better that all end than that one waits for ever
            self._fail_all(error)

    def _run_step(self) -> None:
        self.turns.read()
        self.preparation.go_on(self.scheduler.waiting)
        if not self.scheduler and self.preparation.loading:
            self.turns.read(wait=True)
            self.preparation.go_on(self.scheduler.waiting)
        if self.failure is not None:
            self._fail_all(self.failure)
        batch = self.scheduler.schedule()
        self._admit(batch)
        if not batch.tiles and not batch.chunks:
            if self.scheduler and self.scheduler.num_in_flight:
                self.turns.read(wait=True)  # for tiles, or for whatever comes first
            return
        self._guarded(batch, partial(self._run_vision, batch))
        chunks = [chunk for chunk in batch.chunks if chunk.request.finished is None]
        if chunks:
            self._run_language(chunks)
        self.recorder.count("steps")
        self.turns.read()

    def _guarded(self, batch: Batch[Request], run: Callable[[], None]) -> None:
        """Run a part of a step that must not be left half done: if it is, the requests of the step end."""
        try:
            run()
        except BaseException as error:
            for request in batch.requests:
                self._fail(request, error)
            if not isinstance(error, Exception):  # an interrupt is for the caller
                raise

    def _admit(self, batch: Batch[Request]) -> None:
        """Note who begins and who has to begin again."""
        now = perf_counter()
        for request in batch.preempted:
            request.visual.clear()
            self.recorder.count("requests preempted")
        for request in batch.requests:
            if request.admitted is None:
                request.admitted = now
                self.recorder.add("queue", "requests", request.submitted, now, request_id=request.request_id)

    # --- images ---

    def _arrive(self, request: Request) -> None:
        """A new request: to the scheduler if its images are ready, or else to those who wait for theirs."""
        if request.finished is not None:
            return
        if request.prepared.pictures and not request.loaded:
            self.preparation.waiting.append(request)
        else:
            self._ready(request)

    def _report_loaded(self, request: Request) -> None:
        # Now, so that one that was aborted meanwhile lets go of its tiles.
        self.turns.post(partial(self._loaded, request), now=True)

    def _loaded(self, request: Request) -> None:
        self.preparation.loading.discard(request)
        loading, request.loading = request.loading, None  # which knows the request: a circle that would live on
        if request.finished is not None or loading is None or loading.cancelled():
            return
        error = loading.exception()
        if error is not None:
            self._fail(request, error)
            return
        request.loaded = loading.result()
        self._ready(request)

    def _ready(self, request: Request) -> None:
        """Hand a request with its images to the scheduler."""
        for image, loaded in zip(request.images, request.loaded, strict=True):
            request.image_decode_ms += loaded.decode_ms
            request.tile_ms += loaded.tile_ms
            image.key = loaded.key
            image.kept = loaded.tokens is not None
            image.num_sent = image.num_encoded = image.num_tiles if image.kept else 0
            self.recorder.count("tiles loaded", 0 if image.kept else image.num_tiles)
        self.recorder.count("tokens prompt", len(request.prompt_token_ids))
        self.scheduler.add(request)

    # --- the vision half ---

    def _run_vision(self, batch: Batch[Request]) -> None:
        """Copy blocks that are about to be written, and encode the tiles of all requests together, or send them."""
        if self.vision is not None:
            # Before memory is asked for: tiles of who must wait for it are on their way by then, and counted.
            tiles, batch.tiles = batch.tiles, []
            self.vision_stage.send(tiles, self._report_tiles)
        if self.runner.cache is None or self.runner.cache.num_blocks < self.blocks.num_blocks:
            self._grow_cache(batch)
        if batch.copies:
            self.runner.copy_blocks(*zip(*batch.copies, strict=True))
        parts = [part for part in batch.tiles if part.request.finished is None]
        if parts:
            self.vision_stage.run(parts, self._fail)

    def _report_tiles(self, part: Tiles[Request], result: Arrived | VitrailError) -> None:
        # Now, so that what nobody waits for any more is let go of at once.
        self.turns.post(partial(self._take_tiles, part, result), now=True)

    def _take_tiles(self, part: Tiles[Request], result: Arrived | VitrailError) -> None:
        """Tiles came back from a worker: as tokens of a request that may be gone, or as an error that ends it."""
        if not self.scheduler.arrived(part):
            return
        try:
            if isinstance(result, VitrailError):
                raise result
            self.vision_stage.take(part, result)
        except Exception as error:
            self._fail(part.request, error)

    # --- the language half ---

    def _run_language(self, chunks: list[Chunk[Request]]) -> None:
        """Run all chunks in one pass, or in parts if that fails, so that an error finds the request it belongs to."""
        decoding = [chunk for chunk in chunks if chunk.decodes]
        prompts = [chunk for chunk in chunks if not chunk.decodes]
        if prompts and not self.scheduler.exact:
            try:
                self._accept_chunks(chunks, self._forward(chunks))
                return
            except _PassError:
                pass
        for chunk in prompts:  # each by itself
            if chunk.request.finished is None:
                try:
                    self._accept_chunks([chunk], self._forward([chunk]))
                except _PassError as error:
                    self._fail(chunk.request, error.__cause__ or error)
        self._decoding = [chunk for chunk in decoding if chunk.request.finished is None]
        if not self._decoding:
            return
        try:
            # Whose fault it is when this fails cannot be told. The request that came last is failed and the others try
            # again without it: enough where memory was short, and an end, one by one, where nothing helps.
            logits = self._decode()
        except Exception as error:
            self._fail(self._decoding[-1].request, error)
        else:
            self._accept_chunks(self._decoding, logits)

    def _forward(self, chunks: list[Chunk[Request]]) -> Tensor:
        """One pass with prompts in it: logits (chunks, vocab)."""
        self._pass = ("prefill", chunks, perf_counter())
        try:
            return self.runner.forward([self._row(chunk) for chunk in chunks])
        except Exception as error:
            raise _PassError from error

    def _row(self, chunk: Chunk[Request]) -> Row:
        request, sequence = chunk.request, chunk.request.sequences[chunk.index]
        return Row(
            request.tokens(sequence, chunk.start, chunk.end),
            chunk.end,
            self.blocks.table(sequence),
            request.inv_freq,
            self.vision_stage.tokens(request, chunk.start, chunk.end),
        )

    def _decode(self) -> Tensor:
        """One token of every sequence of the step: logits (sequences, vocab)."""
        self._pass = ("decode", self._decoding, perf_counter())
        rows = [(chunk.request, chunk.request.sequences[chunk.index]) for chunk in self._decoding]
        return self.runner.decode(
            [sequence.token_ids[-1] for _, sequence in rows],
            [chunk.end for chunk in self._decoding],
            torch.stack([request.inv_freq for request, _ in rows]),
            [self.blocks.table(sequence) for _, sequence in rows],
        )

    def _accept_chunks(self, chunks: list[Chunk[Request]], logits: Tensor) -> None:
        """Note what has been run, then sample where a sequence's next token is due."""
        self._guarded(Batch(chunks=chunks), partial(self._accept_unguarded, chunks, logits))

    def _accept_unguarded(self, chunks: list[Chunk[Request]], logits: Tensor) -> None:
        rows: list[tuple[Request, Sequence]] = []
        sampled: list[int] = []
        for number, chunk in enumerate(chunks):
            request = chunk.request
            first = chunk.samples and not request.started
            self.scheduler.update(chunk)
            if not chunk.samples:
                continue
            fresh = request.sequences if first else [request.sequences[chunk.index]]
            rows += [(request, sequence) for sequence in fresh]
            sampled += [number] * len(fresh)
        if rows:
            self._accept(logits if sampled == list(range(len(logits))) else logits[sampled], rows)
        else:
            self._note_pass()

    def _accept(self, logits: Tensor, rows: list[tuple[Request, Sequence]]) -> None:
        """Sample the next token of each row, publish what became certain, and retire what is done."""
        with self.recorder.span("sample", "language half", rows=len(rows)):
            now_sampled = _sample(logits, [sequence.sampling for _, sequence in rows])
        self._note_pass()
        now = perf_counter()
        self.recorder.count("tokens generated", len(rows))
        for (request, sequence), sampled in zip(rows, now_sampled, strict=True):
            if request.finished is not None:
                continue  # a sibling row failed
            if isinstance(sampled, VitrailError):
                self._fail(request, sampled)
                continue
            if request.first_token is None:
                request.first_token = now
                self.recorder.count("tokens cached", request.num_cached_tokens)
            try:
                if request.visual:
                    self.vision_stage.keep(request)
                self._extend(request, sequence, sampled)
            except Exception as error:
                self._fail(request, error)
        for request in {request: None for request, _ in rows}:
            if request.finished is None and all(sequence.finish_reason for sequence in request.sequences):
                self._finish(request, "stop")

    def _note_pass(self) -> None:
        """Note the pass that has come to its end: on a GPU only sampling waits for it."""
        if self._pass is None:
            return
        (name, chunks, start), end = self._pass, perf_counter()
        self._pass = None
        tokens = sum(chunk.end - chunk.start for chunk in chunks)
        self.recorder.add(name, "language half", start, end, rows=len(chunks), tokens=tokens)
        self.recorder.count(f"{name} tokens", tokens)
        for request in {chunk.request: None for chunk in chunks if chunk.decodes}:
            request.decode_ms += (end - start) * 1e3
        for request in {chunk.request: None for chunk in chunks if not chunk.decodes}:
            request.prefill_ms += (end - start) * 1e3

    def _extend(self, request: Request, sequence: Sequence, sampled: Sampled) -> None:
        if sampled.logprobs is not None:
            sequence.logprobs.append(sampled.logprobs)
        text, sequence.finish_reason = sequence.stop.push(sampled.token_id)
        if sequence.finish_reason is not None:
            self.scheduler.finish(sequence)
        sequence.text.append(text)
        self._publish(request, StreamDelta(text, [sampled.token_id], sequence.finish_reason, sequence.index))

    # --- endings ---

    def _fail_all(self, error: BaseException) -> None:
        for request in list(self._requests.values()):
            self._fail(request, error)

    def _fail(self, request: Request, error: BaseException) -> None:
        """Close a request for an error."""
        if request.finished is None:
            request.error = _wrapped(self.failure or error)
            for sequence in request.sequences:
                self.blocks.forget(sequence)
        self._finish(request, "error")

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """Close a request: sequences that are not done yet end for `reason`, with the text they held back."""
        if request.finished is not None:
            return
        try:
            self._release(request, reason)
        finally:
            self._requests.pop(request.request_id, None)
            request.finished = perf_counter()  # after all that whoever waits for it will look at
            self.turns.leave(request)
            if request.notify is not None:
                self.turns.announce(request.notify)
        details = {"request_id": request.request_id, "reason": reason}
        self.recorder.add("request", "requests", request.submitted, request.finished, **details)
        ends = {"abort": "aborted", "error": "failed"}
        self.recorder.count(f"requests {ends.get(reason, 'finished')}")

    def _release(self, request: Request, reason: FinishReason) -> None:
        """End the sequences of a request and take back what they hold."""
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = reason
                sequence.text.append(sequence.stop.flush())
                self._publish(request, StreamDelta(sequence.text[-1], [], reason, sequence.index))
        self.scheduler.remove(request)
        self.preparation.drop(request)
        request.loaded.clear()
        request.visual.clear()
        request.prepared.tiles.clear()
        request.prepared.pictures.clear()

    def _publish(self, request: Request, delta: StreamDelta) -> None:
        request.deltas.append(delta)
        if request.notify is not None:
            self.turns.announce(request.notify)

    # --- parts of requests ---

    def _domain(self, config: GenerationConfig) -> bytes:
        """What the keys of a request hold for: this model, how it cuts images, and the tenant."""
        model = self.config
        cutting = f"{model.tile_size} {model.use_thumbnail} {model.pad2square} {model.dynamic_image_size}"
        return domain_key(self.revision, cutting, repr(config.cache_salt))

    def _sequences(self, prompt: list[int], config: GenerationConfig, budget: int) -> list[Sequence]:
        bad_words = [
            self.tokenizer.encode(spelling, add_bos=False)
            for word in config.bad_words
            for spelling in (word, f" {word}")
        ]
        grammar = self.grammars.matcher(config.response_format)
        sequences = []
        for index in range(config.n):
            sampling = SamplingState(
                config,
                prompt_token_ids=prompt,
                image_token_id=self.context_token_id,
                eos_token_ids=self.stop_token_ids,
                bad_words=bad_words,
                grammar=grammar if grammar is None or index == 0 else grammar.copy(),
                index=index,
            )
            stop = StopChecker(
                config,
                self.tokenizer.stream(skip_special_tokens=config.skip_special_tokens),
                eos_token_ids=self.stop_token_ids,
                max_new_tokens=budget,
            )
            sequences.append(Sequence(index, sampling.token_ids, sampling=sampling, stop=stop))
        return sequences

    # --- memory ---

    def _grow_cache(self, batch: Batch[Request]) -> None:
        """Make the cache as large as the blocks lent. If there is no memory, who has blocks beyond it waits again."""
        cache = self.runner.cache
        try:
            self.runner.allocate(self.blocks.num_blocks, keep=cache is not None)
        except Exception as error:
            held = 0 if cache is None else cache.num_blocks
            for request in list(self.scheduler.running):
                if any(max(self.blocks.table(s), default=0) >= held for s in request.live):
                    batch.tiles = [part for part in batch.tiles if part.request is not request]
                    batch.chunks = [chunk for chunk in batch.chunks if chunk.request is not request]
                    self.scheduler.preempt(request)
                    request.visual.clear()
            batch.copies = [(source, target) for source, target in batch.copies if max(source, target) < held]
            self.blocks.give_up(held)
            for request in self.scheduler.waiting[:]:
                if request.num_rows * self.blocks.blocks_for(request.planned_length) > held:
                    self._fail(request, error)


class _PassError(Exception):
    """A pass of the language half did not come to its end; nothing has changed by it."""


def _sample(logits: Tensor, states: list[SamplingState]) -> list[Sampled | VitrailError]:
    """`sample`; if a state makes that fail, the others are sampled without it."""
    try:
        return sample(logits, states)
    except Exception as error:
        if len(states) == 1:
            return [_wrapped(error)]
    return [one for row, state in enumerate(states) for one in _sample(logits[row : row + 1], [state])]


def _wrapped(error: BaseException) -> VitrailError:
    """An error as a caller meets it: ours, whatever it was."""
    if isinstance(error, VitrailError):
        return error
    reason = " ".join(str(error).split())
    ours = VitrailError(f"the request failed inside vitrail: {type(error).__name__}: {reason}")
    ours.__cause__ = error
    return ours


def _ratio(number: float, per: float) -> float:
    return number / per if per else 0.0
