"""`Runtime`, one loaded model and the calls users make on it, and `generate` for those who want a single line.

What contrastive models are asked stands in `contrastive.py`, hidden states of the vision half in `features.py`.
"""

import asyncio
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, Self, cast, overload
from uuid import uuid4

import torch
from tqdm import tqdm

from .backends.exported import ExportedVisionModel
from .config import InternVLConfig, VisionConfig, load_any_config
from .contrastive import ContrastiveCalls
from .distributed.halves import Halves, open_halves
from .distributed.placement import place, visible_gpus
from .engine.engine import Engine
from .engine.processor import Conversation, Picture, Prepared, Processor
from .engine.recorder import Recorder
from .engine.replicas import Replicas
from .engine.sequence import Request
from .engine.vision_cache import VisionCache
from .engine.vision_stage import VisionWorkers
from .errors import CapacityError, CheckpointError, ConfigError, InvalidRequestError, VitrailError
from .features import Images, as_list
from .image import ImageLimits, ImageSource
from .loaded import require_chat
from .media import MediaPolicy
from .messages import conversation_of
from .models.internvl import InternVLModel
from .models.vision_tower import VisionTower
from .options import (
    at_least_one,
    read_cache_dtype,
    read_device,
    read_dtype,
    read_image_limit,
    read_media,
    read_positive,
    read_quantization,
    read_share,
)
from .prompt import IMAGE_MARK, get_template, place_images, stop_tokens
from .quantization.config import QuantizationConfig
from .quantization.model import capturable
from .request import (
    Completion,
    GenerationConfig,
    GenerationOutput,
    RequestFailure,
    StreamDelta,
    Usage,
    VisualTokens,
)
from .tokenizer import Tokenizer, load_tokenizer
from .video import Video, frames_of
from .vision_backend import check_backend, open_vision
from .weights import Model, resolve_checkpoint

History = Sequence[tuple[str, str]]

_CONVERSATION_KEYWORDS = ("images", "video", "history", "system", "generation_config")


class Runtime(ContrastiveCalls):
    """A loaded model. Make one with `from_pretrained`; use it as a context manager, or `close` it.

    A chat model generates; a contrastive one embeds, scores, classifies, matches and captions; a vision encoder on its
    own has features, as the others do. Any other call raises `UnsupportedError`.
    Calls may come from several threads; requests in flight together share batches.
    halves: where the model is not all in this process, or there are several of it; `model` is the first one's part.
    engine: what runs requests, if it was made elsewhere; of `model` the config counts then.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        *,
        name: str = "model",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 8192,
        gpu_memory_utilization: float = 0.9,
        enable_prefix_caching: bool = True,
        vision_cache_gb: float = 1.0,
        enforce_eager: bool = False,
        kv_cache_dtype: str = "auto",
        deterministic: bool = False,
        limit_mm_per_prompt: Mapping[str, int] | None = None,
        image_limits: ImageLimits | None = None,
        media: MediaPolicy | None = None,
        revision: str | None = None,
        load_ms: float = 0.0,
        halves: Sequence[Halves] = (),
        engine: Engine | None = None,
    ) -> None:
        super().__init__(model, tokenizer, name=name, limits=image_limits or ImageLimits(), load_ms=load_ms)
        self.media = media or MediaPolicy()
        self._halves: Sequence[Halves] = ()
        self._chat: tuple[Processor, Engine] | None = None
        if isinstance(model, VisionTower):
            return
        if tokenizer is None:
            raise CheckpointError(f"{name}: a model of this kind needs a tokenizer")
        config = model.config
        if tokenizer.vocab_size > config.llm.vocab_size:
            raise CheckpointError(
                f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.llm.vocab_size}"
            )
        if not isinstance(model, InternVLModel):
            return
        longest = model.config.llm.max_model_len
        self.max_model_len = at_least_one("max_model_len", longest if max_model_len is None else max_model_len)
        if self.max_model_len > longest:
            raise ConfigError(f"max_model_len {max_model_len} exceeds the {longest} positions of {name}")
        processor = Processor(
            model.config,
            tokenizer,
            limits=self.limits,
            max_images=read_image_limit(limit_mm_per_prompt),
            max_model_len=self.max_model_len,
        )
        if engine is not None:
            self._chat = (processor, engine)
            return
        limits: dict[str, Any] = {
            "max_num_seqs": at_least_one("max_num_seqs", max_num_seqs),
            "max_model_len": self.max_model_len,
            "enforce_eager": enforce_eager or not capturable(model),
            "exact": deterministic,
            "cache_dtype": read_cache_dtype(kv_cache_dtype),
        }
        shared: dict[str, Any] = {
            "context_token_id": _control_id(tokenizer, model.config.context_token),
            "stop_token_ids": _stop_token_ids(tokenizer, stop_tokens(processor.template)),
            "max_num_batched_tokens": at_least_one("max_num_batched_tokens", max_num_batched_tokens),
            "gpu_memory_utilization": read_share("gpu_memory_utilization", gpu_memory_utilization),
            "enable_prefix_caching": enable_prefix_caching,
            "vision_cache": VisionCache(int(_read_size("vision_cache_gb", vision_cache_gb) * 1e9)),
            "recorder": Recorder(),
            "revision": f"{name}@{revision}",
        }
        self._halves = halves or [Halves(model)]
        engines = []
        for one in self._halves:
            runner = one.runner(**limits)
            engine = Engine(runner, tokenizer, processor, vision=one.vision, chunk_tokens=one.chunk_tokens, **shared)
            if one.ranks is not None:
                one.ranks.on_failure = engine.fail_all
            engines.append(engine)
        # Replicas have all that is called of an engine here and by servers.
        self._chat = (processor, engines[0] if len(engines) == 1 else cast(Engine, Replicas(engines)))

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "nano",
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "bfloat16",
        device: str | torch.device | None = None,
        quantization: str | QuantizationConfig | None = None,
        vision_quantization: str | None = None,
        vision_backend: str = "torch",
        vision_engine: str | Path | None = None,
        vision_devices: Sequence[str] | None = None,
        llm_devices: Sequence[str] | None = None,
        placement: str = "auto",
        tensor_parallel_size: int = 1,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 8192,
        gpu_memory_utilization: float = 0.9,
        kv_cache_dtype: str = "auto",
        enable_prefix_caching: bool = True,
        vision_cache_gb: float = 1.0,
        enforce_eager: bool = False,
        deterministic: bool = False,
        limit_mm_per_prompt: Mapping[str, int] | None = None,
        max_image_pixels: int = 178_956_970,
        max_aspect_ratio: float = 200,
        exif_orientation: bool = True,
        allowed_media_domains: Sequence[str] = (),
        allowed_local_media_path: str | Path | None = None,
        mm_per_request_timeout: float = 10.0,
        vision_workers: VisionWorkers | None = None,
        progress: bool | None = None,
    ) -> Self:
        """Load a local folder, a hub id or the bundled `"nano"`.

        device: "cpu", "cuda", "cuda:1"; None is the best present. dtype: "bfloat16", "float16" or "float32".
        max_model_len: tokens of a prompt and its answer; None is what the checkpoint was made for.
        quantization, vision_quantization: round the weights of a half to nearest while they are loaded: "int8" (with
        activations in int8), "int8-weight", "int4" (language half only), "fp8", "nf4" (language half only), "bnb-int8".
        That is uncalibrated, and a warning says so; what a checkpoint holds quantised is recognised without them. A
        QuantizationConfig in place of the name says both halves, group size and exceptions.
        vision_backend: "torch", our kernels; or an exported vision half, by "onnxruntime" or "tensorrt". vision_engine:
        the folder or file that `vitrail export` wrote; without it onnxruntime exports, once, in fp32 for the CPU.
        enforce_eager: no CUDA graphs, which take some seconds at the start and some memory.
        max_num_batched_tokens: prompt tokens, or tiles counted as their visual tokens, that one step runs at most; 512
        while others decode, or fewer if this is.
        enable_prefix_caching: prompts that begin alike, with the same images, share keys and values.
        vision_cache_gb: host memory for the visual tokens of images seen before; 0 for none.
        kv_cache_dtype: "auto", as the model computes, or "int8", half the memory of 16 bits or less.
        allowed_media_domains: hosts that URLs in messages may name, as `example.org` or `*.example.org`.
        allowed_local_media_path: the folder whose files they may name.
        mm_per_request_timeout: seconds that the media of a request may take to fetch, and one of them to decode.
        llm_devices, vision_devices: what each half runs on, as ["cuda:0", "cuda:1"], or "cpu" several times. Without
        vision_devices the vision half is where the language half is. tensor_parallel_size: devices that share one
        language half; more llm_devices are further replicas. placement: "colocated", "split" (the vision half on
        devices of its own), "replicas", or "auto": what the other options say; without any of them, of several GPUs
        what `vitrail plan` finds best (docs/deployment.md).
        vision_workers: they encode instead, wherever they are; `close` ends them.
        deterministic: the same answer to the bit whatever runs beside a request; slower (docs/engine.md).
        progress: show a loading bar; None means on a terminal only.
        Raises `CheckpointError` or `ConfigError` where the checkpoint is missing or wrong.
        """
        start = perf_counter()
        # All options are read before weights are: a mistake should not cost minutes of loading.
        torch_dtype, torch_device = read_dtype(dtype), read_device(device)
        rounding = read_quantization(quantization, vision_quantization, torch_device)
        check_backend(vision_backend, vision_engine, vision_quantization)
        read_cache_dtype(kv_cache_dtype)
        image_limits = ImageLimits(
            at_least_one("max_image_pixels", max_image_pixels),
            read_positive("max_aspect_ratio", max_aspect_ratio),
            exif_orientation,
            max_decode_s=read_positive("mm_per_request_timeout", mm_per_request_timeout),
        )
        media = replace(read_media(allowed_media_domains, allowed_local_media_path), timeout_s=mm_per_request_timeout)
        at_least_one("max_num_seqs", max_num_seqs)
        at_least_one("max_num_batched_tokens", max_num_batched_tokens)
        _read_size("vision_cache_gb", vision_cache_gb)
        read_image_limit(limit_mm_per_prompt)
        read_share("gpu_memory_utilization", gpu_memory_utilization)
        folder = resolve_checkpoint(model, revision)
        config = load_any_config(folder)
        tokenizer = None if isinstance(config, VisionConfig) else load_tokenizer(folder)
        if isinstance(config, InternVLConfig):
            get_template(config.template)
        placed = place(
            config,
            device=device,
            placement=placement,
            vision_devices=vision_devices,
            llm_devices=llm_devices,
            tensor_parallel_size=tensor_parallel_size,
            quantization=quantization,
            vision_quantization=vision_quantization,
            dtype=torch_dtype,
            visible=visible_gpus(),
        )
        if vision_backend != "torch" and placed.vision_devices:
            raise ConfigError(f"vision_backend={vision_backend!r} runs in one process: vision_devices are for 'torch'")
        torch_device = torch.device(placed.llm_devices[0])
        session = open_vision(vision_backend, vision_engine, folder, config, torch_device, str(model), progress)
        halves = open_halves(
            *(folder, config, placed),
            dtype=torch_dtype,
            quantization=rounding,
            vision_workers=vision_workers,
            has_session=session is not None,
            deterministic=deterministic,
            enforce_eager=enforce_eager,
            progress=progress,
        )
        if session is not None:
            for one in halves:
                one.model = ExportedVisionModel(cast(InternVLModel, one.model), session)
        try:
            return cls(
                halves[0].model,
                tokenizer,
                name=str(model),
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                gpu_memory_utilization=gpu_memory_utilization,
                enable_prefix_caching=enable_prefix_caching,
                vision_cache_gb=vision_cache_gb,
                enforce_eager=enforce_eager,
                kv_cache_dtype=kv_cache_dtype,
                deterministic=deterministic,
                limit_mm_per_prompt=limit_mm_per_prompt,
                image_limits=image_limits,
                media=media,
                revision=revision,
                load_ms=(perf_counter() - start) * 1e3,
                halves=halves,
            )
        except BaseException:
            for one in halves:
                one.close()
            raise

    # --- generation ---

    @overload
    def generate(
        self,
        prompt: str,
        images: Images = None,
        *,
        video: Video | None = None,
        history: History | None = None,
        system: str | None = None,
        generation_config: GenerationConfig | None = None,
        use_tqdm: bool = False,
        **gen_kwargs: Any,
    ) -> GenerationOutput: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str],
        images: Sequence[Images] | None = None,
        *,
        video: Video | None = None,
        history: History | None = None,
        system: str | None = None,
        generation_config: GenerationConfig | None = None,
        use_tqdm: bool = False,
        **gen_kwargs: Any,
    ) -> list[GenerationOutput]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        images: Any = None,
        *,
        video: Video | None = None,
        history: History | None = None,
        system: str | None = None,
        generation_config: GenerationConfig | None = None,
        use_tqdm: bool = False,
        **gen_kwargs: Any,
    ) -> GenerationOutput | list[GenerationOutput]:
        """Answer a prompt, or a list of prompts as one batch, in order.

        images: one image or a list of them; with a list of prompts, one such entry per prompt.
        An `<image>` in the prompt marks where an image goes; without marks images stand before it.
        video: a file, of which 8 frames are sampled evenly, or a list of frames; they stand before the prompt.
        history: earlier (question, answer) pairs.
        gen_kwargs: any field of `GenerationConfig`, on top of `generation_config`.
        A single bad prompt raises; in a list it becomes an output whose `finish_reason` is "error", and the others
        are answered.
        """
        config = _config(generation_config, gen_kwargs, *_CONVERSATION_KEYWORDS, "use_tqdm")
        if isinstance(prompt, str):
            conversation = self._conversation(prompt, images, video, history, system)
            return self._finish(self._submit(conversation, config))
        if not isinstance(prompt, list | tuple):
            raise InvalidRequestError(f"prompt must be a string or a list of them, not {type(prompt).__name__}")
        if video is not None or history:
            raise InvalidRequestError("video and history go with a single prompt, not with a list")
        return self._generate_list(prompt, images, system, config, use_tqdm)

    def _generate_list(
        self,
        prompts: Sequence[str],
        images: Sequence[Images] | None,
        system: str | None,
        config: GenerationConfig,
        use_tqdm: bool,
    ) -> list[GenerationOutput]:
        per_prompt = [None] * len(prompts) if images is None else images
        if not isinstance(per_prompt, list | tuple) or len(per_prompt) != len(prompts):
            given = f"{len(per_prompt)} entries" if isinstance(per_prompt, list | tuple) else type(per_prompt).__name__
            raise InvalidRequestError(f"{len(prompts)} prompts need a list of as many image entries, not {given}")
        submitted: list[Request | VitrailError] = []
        outputs: list[GenerationOutput] = []
        # Enough ahead to keep every row busy; more would only hold tiles in memory.
        ahead = 2 * self.engine.max_num_seqs
        try:
            with tqdm(total=len(prompts), desc="generating", unit="prompt", disable=not use_tqdm) as bar:
                for index in range(len(prompts) + ahead):
                    if index < len(prompts):
                        submitted.append(self._try_submit(prompts[index], per_prompt[index], system, config))
                    if 0 <= index - ahead < len(prompts):
                        outputs.append(self._outcome(submitted[index - ahead]))
                        bar.update()
        finally:
            for item in submitted[len(outputs) :]:
                if isinstance(item, Request):
                    self.engine.abort(item.request_id)
        return outputs

    def _try_submit(
        self, prompt: str, images: Images, system: str | None, config: GenerationConfig
    ) -> Request | VitrailError:
        try:
            return self._submit(self._conversation(prompt, images, None, None, system), config, ahead=True)
        except VitrailError as error:
            return error

    def _outcome(self, item: Request | VitrailError) -> GenerationOutput:
        try:
            return _failure(item) if isinstance(item, VitrailError) else self._finish(item)
        except VitrailError as error:
            return _failure(error)

    def stream(
        self,
        prompt: str,
        images: Images = None,
        *,
        video: Video | None = None,
        history: History | None = None,
        system: str | None = None,
        generation_config: GenerationConfig | None = None,
        request_id: str | None = None,
        **gen_kwargs: Any,
    ) -> Iterator[StreamDelta]:
        """The answer as it comes: all texts together are `generate`'s. Leaving the loop early aborts the request.

        The request is checked and queued at once, so that a mistake raises here and not at the first delta.
        """
        config = _config(generation_config, gen_kwargs, *_CONVERSATION_KEYWORDS, "request_id")
        conversation = self._conversation(prompt, images, video, history, system)
        return self.engine.stream(self._submit(conversation, config, request_id))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        generation_config: GenerationConfig | None = None,
        **gen_kwargs: Any,
    ) -> GenerationOutput:
        """Answer an OpenAI-style message list: system, user and assistant messages, text, image and video parts.

        `image_url` parts take data URLs, http and https URLs of `allowed_media_domains` and files below
        `allowed_local_media_path`; `image` and `video` parts take whatever `generate` takes. An `<image>` that stands
        in a text part is text.
        """
        config = _config(generation_config, gen_kwargs, "messages", "generation_config")
        conversation = conversation_of(
            messages, media=self.media, limits=self.limits, max_images=self.processor.max_images
        )
        return self._finish(self._submit(conversation, config))

    async def agenerate(
        self, prompt: str, images: Images = None, *, request_id: str | None = None, **keywords: Any
    ) -> GenerationOutput:
        """`generate` of one prompt without blocking the event loop. Cancelling the task aborts the request."""
        config, conversation = await asyncio.to_thread(self._read_call, prompt, images, keywords)
        name = request_id or uuid4().hex
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        cancelled = threading.Event()

        def submit() -> Request:
            request = self._submit(conversation, config, name, ahead=True)
            if cancelled.is_set():  # while headers were read, when there was nothing to abort yet
                self.abort(name)
            return request

        def notify() -> None:
            with suppress(RuntimeError):  # the event loop was closed meanwhile
                loop.call_soon_threadsafe(news.set)

        try:
            request = await asyncio.to_thread(submit)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        self.engine.run_in_background(request, notify)
        try:
            while request.finished is None:
                await news.wait()
                news.clear()
        except asyncio.CancelledError:
            self.abort(name)
            while request.finished is None:  # a step may be under way: when this returns everything is free
                await news.wait()
                news.clear()
            raise
        if request.error is not None:
            raise request.error
        return _output(request)

    def _read_call(
        self, prompt: str, images: Images, keywords: dict[str, Any]
    ) -> tuple[GenerationConfig, Conversation]:
        call = {key: keywords.pop(key, None) for key in ("video", "history", "system", "generation_config")}
        config = _config(call.pop("generation_config"), keywords, *_CONVERSATION_KEYWORDS, "request_id")
        return config, self._conversation(prompt, images, **call)

    def submit(self, conversation: Conversation, config: GenerationConfig, request_id: str | None = None) -> Request:
        """Queue a conversation for `engine.run_in_background`: checked now, its images read by threads of the engine.

        For a server, which waits for many requests at a time.
        """
        return self._submit(conversation, config, request_id, ahead=True)

    def submit_tokens(self, token_ids: Sequence[int], config: GenerationConfig) -> Request:
        """The same for a prompt as it stands, without images and without the model's template."""
        self.check_tokens(token_ids)
        return self.engine.submit(uuid4().hex, Prepared(list(token_ids), [], 0), config)

    def check_tokens(self, token_ids: Sequence[int]) -> None:
        """Raise `InvalidRequestError` or `CapacityError` for what `submit_tokens` would refuse."""
        self._check_open()
        context_token = self.engine.context_token_id
        for token_id in token_ids:
            if not 0 <= token_id < self.processor.tokenizer.vocab_size or token_id == context_token:
                raise InvalidRequestError(f"prompt: {token_id} is not the id of a token of text")
        if not 0 < len(token_ids) < self.max_model_len:
            raise CapacityError(
                f"the prompt has {len(token_ids)} tokens; it needs one, and the context holds {self.max_model_len} "
                f"with at least one for the answer"
            )

    def abort(self, request_id: str) -> bool:
        """End a request; whoever waits for it gets what there is, with `finish_reason` "abort"."""
        return self.engine.abort(request_id)

    # --- what the model sees ---

    @torch.no_grad()  # and not inference mode, whose tensors no probe could be trained on
    def encode_image(self, image: ImageSource, max_tiles: int | None = None) -> VisualTokens:
        """The visual tokens of one image; `.tokens` is (num_tiles * tokens_per_tile, llm hidden), on the device."""
        self._check_open()
        tiles, grid = self.processor.tile(image, GenerationConfig(max_tiles=max_tiles).max_tiles)
        return VisualTokens(self.engine.vision_stage.encode(torch.from_numpy(tiles)), len(tiles), grid)

    def count_tokens(
        self,
        prompt: str,
        images: Images = None,
        *,
        video: Video | None = None,
        history: History | None = None,
        system: str | None = None,
        max_tiles: int | None = None,
        total_max_tiles: int | None = None,
    ) -> Usage:
        """What `generate` would report for the prompt, from image headers alone: no image is decoded, nothing run.

        A prompt that is too long for the context is counted as well.
        """
        self._check_open()
        conversation = self._conversation(prompt, images, video, history, system)
        limits = GenerationConfig(max_tiles=max_tiles, total_max_tiles=total_max_tiles)
        return self.processor.count(
            conversation, max_tiles=limits.max_tiles, total_max_tiles=limits.total_max_tiles
        ).usage

    # --- what happens inside ---

    def stats(self) -> dict[str, Any]:
        """Requests, tokens, tiles, seconds by stage, batches and caches since the start, in plain types."""
        self._check_open()
        return self.engine.stats()

    @contextmanager
    def trace(self, file: str | Path) -> Iterator[None]:
        """Write a timeline of both halves while the block runs, in the format of chrome://tracing and Perfetto."""
        recorder = self.engine.recorder
        recorder.start_trace()
        try:
            yield
        finally:
            recorder.write_trace(file)

    # --- life ---

    def close(self) -> None:
        """Abort what runs and let go of the model. Later calls raise `InvalidRequestError`."""
        if self._chat is not None:
            self.engine.close()
            for one in self._halves:
                one.close()
        if not self._closed and isinstance(self._model, ExportedVisionModel):
            self._model.session.close()
        super().close()

    # --- inside ---

    @property
    def processor(self) -> Processor:
        """What prepares the requests of a chat model."""
        return self._chat_parts()[0]

    @property
    def engine(self) -> Engine:
        """What runs the requests of a chat model."""
        return self._chat_parts()[1]

    def _chat_parts(self) -> tuple[Processor, Engine]:
        if self._chat is None:
            self._check_open()
            require_chat(self._model.config, self.name)
        assert self._chat is not None
        return self._chat

    def _conversation(
        self, prompt: str, images: Images, video: Video | None, history: History | None, system: str | None
    ) -> Conversation:
        self._chat_parts()
        if not isinstance(prompt, str):
            raise InvalidRequestError(f"prompt must be a string, not {type(prompt).__name__}")
        if system is not None and not isinstance(system, str):
            raise InvalidRequestError(f"system must be a string, not {type(system).__name__}")
        pictures = [Picture(source) for source in as_list(images)]
        turns: list[tuple[str, str | None]] = list(_checked_history(history))
        if video is not None:
            if pictures:
                raise InvalidRequestError("give images or a video, not both")
            pictures = [Picture(frame, max_tiles=1) for frame in frames_of(video, limits=self.limits)]
        turns.append((prompt, None))
        if not any(IMAGE_MARK in question for question, _ in turns):
            # Shown with the first question, as when that one was asked.
            label = "Image" if video is None else "Frame"
            turns[0] = (place_images(turns[0][0], len(pictures), has_history=False, label=label), turns[0][1])
        return Conversation(turns, pictures, system)

    def _submit(
        self,
        conversation: Conversation,
        config: GenerationConfig,
        request_id: str | None = None,
        *,
        ahead: bool = False,
    ) -> Request:
        """Queue a request, its images read already, or `ahead` of its turn by threads of the engine."""
        self._check_open()
        start = perf_counter()
        prepared = self.processor.prepare(
            conversation, max_tiles=config.max_tiles, total_max_tiles=config.total_max_tiles, decode=False
        )
        loaded = [] if ahead else [self.engine.load(prepared, config)]
        elapsed_ms = (perf_counter() - start) * 1e3
        return self.engine.submit(request_id or uuid4().hex, prepared, config, elapsed_ms, *loaded)

    def _finish(self, request: Request) -> GenerationOutput:
        """Drive the engine until the request is done."""
        for _ in self.engine.stream(request):
            pass
        return _output(request)


def _output(request: Request) -> GenerationOutput:
    prepared = request.prepared
    return GenerationOutput(
        outputs=request.completions,
        prompt_token_ids=prepared.token_ids,
        num_tiles=prepared.num_tiles,
        usage=request.usage,
        metrics=request.metrics,
    )


def _failure(error: VitrailError) -> GenerationOutput:
    """The output of a list entry that could not be answered."""
    return GenerationOutput(
        outputs=[Completion("", [], "error")],
        prompt_token_ids=[],
        num_tiles=[],
        usage=Usage(prompt_tokens=0),
        error=RequestFailure(type(error).__name__, str(error)),
    )


def _checked_history(history: History | None) -> History:
    if history is not None and not isinstance(history, list | tuple):
        raise InvalidRequestError(f"history must be a list of (question, answer), not {type(history).__name__}")
    for number, turn in enumerate(history or (), start=1):
        if not (isinstance(turn, tuple | list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise InvalidRequestError(f"history: turn {number} must be a (question, answer) pair of strings")
    return [(question, answer) for question, answer in history or ()]


def _config(base: GenerationConfig | None, keywords: Mapping[str, Any], *call_keywords: str) -> GenerationConfig:
    """`base` with `keywords` on top; `call_keywords` are the call's own, which a misspelling may be nearest to."""
    return GenerationConfig.from_kwargs(base, keywords, also_known=call_keywords)


def _read_size(name: str, value: float) -> float:
    """`value`, a number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"{name} must be a number of at least 0, not {value!r}")
    return value


def _control_id(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise CheckpointError(f"the tokenizer has no {token} token")
    return token_id


def _stop_token_ids(tokenizer: Tokenizer, stops: Sequence[str]) -> frozenset[int]:
    """The template's stop tokens, and the language model's own end of text, which chat models emit now and then."""
    ids = {_control_id(tokenizer, token) for token in stops}
    # Qwen2's chat tokenizers call <|im_end|> their end token and keep this one for padding.
    own = (tokenizer.eos_token_id, tokenizer.token_to_id("<|endoftext|>"))
    return frozenset(ids.union(token_id for token_id in own if token_id is not None))


_runtimes: dict[tuple[str, str], Runtime] = {}
_runtimes_lock = threading.Lock()


def generate(
    prompt: str | Sequence[str],
    images: Any = None,
    *,
    model: str | Path = "nano",
    runtime_options: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> Any:
    """`Runtime.generate` on a Runtime that is loaded once per model and options, and kept.

    runtime_options: keywords of `Runtime.from_pretrained`. The other keywords are those of `Runtime.generate`.
    """
    # Before the model: a mistake should not cost the minutes that loading takes.
    call_keywords = (*_CONVERSATION_KEYWORDS, "use_tqdm")
    settings = {name: value for name, value in keywords.items() if name not in call_keywords}
    _config(keywords.get("generation_config"), settings, *call_keywords, "model", "runtime_options")
    options = dict(runtime_options or {})
    key = (str(model), repr(sorted(options.items())))
    with _runtimes_lock:
        if key not in _runtimes:
            require_chat(load_any_config(resolve_checkpoint(model, options.get("revision"))), str(model))
            _runtimes[key] = Runtime.from_pretrained(model, **options)
        runtime = _runtimes[key]
    return runtime.generate(prompt, images, **keywords)
