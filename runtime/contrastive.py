"""What InternVL-C/G models are asked: embeddings, scores, zero-shot classes, matches and captions.

Images are decoded by threads while the model works on those before, a batch at a time, so that any number of them
takes a bounded amount of memory.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, get_args, overload

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .captions import MAX_NEW_TOKENS, check_beams, prompt_ids, search_captions, write_captions
from .errors import InvalidRequestError, UnsupportedError, VitrailError
from .features import FeatureCalls, Images, as_list
from .image import ImageLimits, ImageSource, open_image
from .loaded import require_contrastive
from .models.contrastive import ContrastiveModel, Mode
from .prefetch import batched, prefetched
from .request import GenerationConfig, GenerationOutput
from .resize import ImageSize, fit_image, read_image_size
from .texts import embed_texts, encode_texts, read_texts
from .tokenizer import Tokenizer
from .video import Video, interval_indices, sample_frames
from .weights import Model
from .zero_shot import Classification, ClassNames, class_prompts

IMAGES_PER_BATCH = 32
CAPTIONS_PER_BATCH = 16

# The factor on cosines in zero-shot classification, in place of the checkpoint's own logit scale.
CLASS_SCALE = 100.0
_CLASSIFIERS_KEPT = 4

Frames = npt.NDArray[np.uint8]  # (frames, height, width, 3)


class ContrastiveCalls(FeatureCalls):
    """The calls of contrastive models. With any other model each of them raises `UnsupportedError`.

    mode: "c" or "g", InternVL-C or InternVL-G. Texts are embedded alike in both.
    image_size: pixels, a multiple of the patch size; None is the checkpoint's own. crop: cut the middle out of an
    image, as the checkpoint's image processor does, instead of stretching it to a square.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer | None, *, name: str, limits: ImageLimits, load_ms: float
    ) -> None:
        super().__init__(model, tokenizer, name=name, limits=limits, load_ms=load_ms)
        self._classifiers: dict[tuple[tuple[str, ...], ...], Tensor] = {}

    @torch.no_grad()
    def embed(
        self,
        texts: str | Sequence[str] | None = None,
        images: Images = None,
        *,
        videos: Video | Sequence[Video] | None = None,
        mode: Mode = "c",
        normalize: bool = True,
        image_size: ImageSize | None = None,
        crop: bool = True,
        num_frames: int = 8,
        batch_size: int = IMAGES_PER_BATCH,
    ) -> Tensor:
        """Embeddings of texts, of images or of videos: (n, embed_dim) float32, on the CPU.

        A video is the mean of the raw embeddings of `num_frames` frames, the middles of equal intervals. In mode "g"
        the raw embedding of an image is a sum of two unit vectors. A single text, image or video file counts as a list
        of one. Texts of more than 80 tokens are cut, with a warning. An image that cannot be read raises; `embed_each`
        goes on.
        """
        self._contrastive("embed")
        given = [kind for kind in (texts, images, videos) if kind is not None]
        if len(given) != 1:
            raise InvalidRequestError(f"embed takes exactly one of texts, images and videos, not {len(given)}")
        if texts is not None:
            self._grounded("embed", mode)
            rows = self._embed_texts("embed", read_texts("embed", texts))
            return F.normalize(rows, dim=-1) if normalize else rows
        sources: list[Any] = as_list(images) if videos is None else _video_list(videos)
        kind = "image" if videos is None else "video"
        if not sources:
            raise InvalidRequestError(f"embed: no {kind}s were given")
        settings = {"image_size": image_size, "crop": crop, "num_frames": num_frames, "batch_size": batch_size}
        return self._embed_all(sources, kind, mode=mode, normalize=normalize, **settings)

    def embed_each(
        self,
        sources: Iterable[Any],
        *,
        kind: str = "image",
        mode: Mode = "c",
        normalize: bool = True,
        image_size: ImageSize | None = None,
        crop: bool = True,
        num_frames: int = 8,
        batch_size: int = IMAGES_PER_BATCH,
        start: int = 1,
    ) -> Iterator[Tensor | VitrailError]:
        """The embedding (embed_dim,) of each image, or of each video with kind="video", or why it cannot be read.

        In order, as they are ready, from any iterable, with no more than two batches of images in memory.
        start: the number of the first source in messages.
        """
        model = self._grounded("embed", mode)
        side = self._side(image_size)
        if kind not in ("image", "video"):
            raise InvalidRequestError(f"kind={kind!r}: must be 'image' or 'video'")
        for setting, value in (("batch_size", batch_size), ("num_frames", num_frames)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidRequestError(f"{setting}={value!r}: must be a positive integer")

        def load(numbered: tuple[int, Any]) -> Frames | VitrailError:
            number, source = numbered
            name = f"{kind} {number}"
            try:
                frames = [source] if kind == "image" else self._frames(source, num_frames, name)
                return np.stack([self._square(frame, side, crop, name) for frame in frames])
            except VitrailError as error:
                return error

        size = items_at_once(kind, batch_size, num_frames)
        loaded = prefetched(load, enumerate(sources, start), ahead=size)
        return self._embed_batches(model, batched(loaded, size), mode, normalize, batch_size)

    @torch.no_grad()
    def score(
        self,
        images: Images,
        texts: str | Sequence[str],
        *,
        mode: Mode = "c",
        image_size: ImageSize | None = None,
        crop: bool = True,
    ) -> Tensor:
        """(images, texts) float32 logits, the cosines times the checkpoint's logit scale; softmax over either."""
        model = self._contrastive("score")
        sources, written = as_list(images), read_texts("score", texts)
        if not sources:
            raise InvalidRequestError("score: no images were given")
        rows = self._embed_all(sources, "image", mode=mode, image_size=image_size, crop=crop)
        columns = F.normalize(self._embed_texts("score", written), dim=-1)
        return model.logit_scale.float().exp().cpu() * rows @ columns.T

    @torch.no_grad()
    def classify(
        self,
        images: Images,
        class_names: ClassNames,
        templates: str | Sequence[str] | None = None,
        *,
        mode: Mode = "c",
        image_size: ImageSize | None = None,
        crop: bool = True,
    ) -> Classification:
        """The likeliest of `class_names` for each image.

        class_names: a list, an entry of which may be a list of names for one class, or one of the ready-made sets,
        `zero_shot.CLASS_SETS`. templates: prompts with a `{}` for the name, or a language of `zero_shot.TEMPLATES`;
        None is the set's own language, English for a list. All prompts of a class are averaged.
        """
        self._contrastive("classify")
        names, _ = class_prompts(class_names, templates)
        sources = as_list(images)
        if not sources:
            raise InvalidRequestError("classify: no images were given")
        columns = self.classifier(class_names, templates)
        rows = self._embed_all(sources, "image", mode=mode, image_size=image_size, crop=crop)
        return Classification(names, (CLASS_SCALE * rows @ columns.T).softmax(-1))

    @torch.no_grad()
    def classifier(self, class_names: ClassNames, templates: str | Sequence[str] | None = None) -> Tensor:
        """(classes, embed_dim) float32: the unit mean of the unit embeddings of each class's prompts.

        Arguments as in `classify`, which compares images with these rows. The latest few are kept.
        """
        self._contrastive("classifier")
        _, prompts = class_prompts(class_names, templates)
        if prompts not in self._classifiers:
            rows = F.normalize(self._embed_texts("classify", [text for texts in prompts for text in texts]), dim=-1)
            means = [part.mean(0) for part in rows.split([len(texts) for texts in prompts])]
            self._classifiers[prompts] = F.normalize(torch.stack(means), dim=-1)
            while len(self._classifiers) > _CLASSIFIERS_KEPT:
                self._classifiers.pop(next(iter(self._classifiers)))
        return self._classifiers[prompts]

    @torch.no_grad()
    def match(
        self,
        images: Images,
        texts: str | Sequence[str],
        *,
        image_size: ImageSize | None = None,
        crop: bool = True,
    ) -> Tensor:
        """(pairs,) float32: how likely InternVL-G's matching head finds it that a text describes its image.

        The image and the text at one place of their lists are a pair; a single one goes with all of the others.
        """
        model = self._grounded("match")
        sources, written = as_list(images), read_texts("match", texts)
        if not sources:
            raise InvalidRequestError("match: no images were given")
        if len(sources) != len(written) and 1 not in (len(sources), len(written)):
            raise InvalidRequestError(f"match: {len(sources)} images and {len(written)} texts do not pair up")
        pairs = max(len(sources), len(written))
        encoded = encode_texts(self._text_tokenizer(), written, call="match", prefix="") * (pairs // len(written))
        side = self._side(image_size)
        found = torch.empty(pairs)
        states: Tensor | None = None
        for start in range(0, pairs, IMAGES_PER_BATCH):
            batch = encoded[start : start + IMAGES_PER_BATCH]
            if states is None or len(sources) > 1:
                tiles = [
                    self._square(source, side, crop, f"image {number}")
                    for number, source in enumerate(sources[start : start + IMAGES_PER_BATCH], start=start + 1)
                ]
                states = model.vision_model(self._on_device(np.stack(tiles)))
            # Texts of one length go together: bidirectional attention knows no padding.
            order = sorted(range(len(batch)), key=lambda row: len(batch[row].token_ids))
            for _, group in groupby(order, key=lambda row: len(batch[row].token_ids)):
                rows = list(group)
                token_ids = torch.tensor([batch[row].token_ids for row in rows], device=self.device)
                vision = states.expand(len(rows), -1, -1) if len(sources) == 1 else states[rows]
                found[[start + row for row in rows]] = model.match(vision, token_ids).softmax(-1)[:, 1].cpu()
        return found

    @overload
    def caption(
        self,
        image: ImageSource,
        prompt: str = ...,
        *,
        num_beams: int = 1,
        image_size: ImageSize | None = None,
        crop: bool = False,
        generation_config: GenerationConfig | None = None,
        **gen_kwargs: Any,
    ) -> GenerationOutput: ...

    @overload
    def caption(
        self,
        image: Sequence[ImageSource],
        prompt: str = ...,
        *,
        num_beams: int = 1,
        image_size: ImageSize | None = None,
        crop: bool = False,
        generation_config: GenerationConfig | None = None,
        **gen_kwargs: Any,
    ) -> list[GenerationOutput]: ...

    def caption(
        self,
        image: Any,
        prompt: str = "English caption:",
        *,
        num_beams: int = 1,
        image_size: ImageSize | None = None,
        crop: bool = False,
        generation_config: GenerationConfig | None = None,
        **gen_kwargs: Any,
    ) -> GenerationOutput | list[GenerationOutput]:
        """A caption of one image, or a list of them for a list, by InternVL-G.

        num_beams: above 1 the best of a beam search, which goes with `max_new_tokens` and `min_new_tokens` alone; the
        paper's captions are those of 5 beams and at least 8 tokens.
        gen_kwargs: any field of `GenerationConfig`, on top of `generation_config`; `max_new_tokens` is 30 unless given.
        """
        model = self._grounded("caption")
        base = generation_config or GenerationConfig(max_new_tokens=MAX_NEW_TOKENS)
        known = ("image", "prompt", "num_beams", "image_size", "crop", "generation_config")
        config = GenerationConfig.from_kwargs(base, gen_kwargs, also_known=known)
        check_beams(config, num_beams)
        if config.response_format is not None:
            raise InvalidRequestError("response_format: captions follow no form")
        if not isinstance(prompt, str):
            raise InvalidRequestError(f"prompt must be a string, not {type(prompt).__name__}")
        sources = as_list(image)
        if not sources:
            raise InvalidRequestError("caption: no images were given")
        tokenizer = self._text_tokenizer()
        ids = prompt_ids(tokenizer, model, prompt)
        side = self._side(image_size)

        def load(numbered: tuple[int, ImageSource]) -> Frames:
            return self._square(numbered[1], side, crop, f"image {numbered[0]}")

        size = max(1, CAPTIONS_PER_BATCH // max(config.n, num_beams))
        outputs: list[GenerationOutput] = []
        for frames in batched(prefetched(load, enumerate(sources, start=1), ahead=size), size):
            tiles = self._on_device(np.stack(frames))
            if num_beams > 1:
                outputs += search_captions(model, tokenizer, tiles, ids, config, num_beams)
            else:
                outputs += write_captions(model, tokenizer, tiles, ids, config)
        return outputs if isinstance(image, list | tuple) else outputs[0]

    # --- inside ---

    def _contrastive(self, call: str) -> ContrastiveModel:
        self._check_open()
        require_contrastive(self._model.config, self.name, call)
        assert isinstance(self._model, ContrastiveModel)
        return self._model

    def _grounded(self, call: str, mode: Mode = "g") -> ContrastiveModel:
        """The model, which must have queries for everything but InternVL-C's embeddings."""
        model = self._contrastive(call)
        _read_mode(mode)
        if mode == "g" and not model.config.num_query_tokens:
            raise UnsupportedError(f"{call}: {self.name} is InternVL-C alone, without what makes InternVL-G of it")
        return model

    def _text_tokenizer(self) -> Tokenizer:
        assert self.tokenizer is not None  # no contrastive model is made without
        return self.tokenizer

    def _side(self, image_size: ImageSize | None) -> tuple[int, int]:
        return read_image_size(image_size, self._own_image_size(), self._model.vision_model.config.patch_size)

    def _square(self, source: ImageSource, size: tuple[int, int], crop: bool, name: str) -> Frames:
        return fit_image(open_image(source, self.limits, name=name), size, crop=crop)

    def _frames(self, video: Video, num_frames: int, name: str) -> list[ImageSource]:
        """Frames sampled from a file or its bytes, or those of a list, which are sampled already."""
        if isinstance(video, list | tuple):
            if not video:
                raise InvalidRequestError(f"{name}: has no frames")
            return list(video)
        source: Any = video
        return list(sample_frames(source, num_frames, choose=interval_indices, limits=self.limits, name=name))

    def _on_device(self, tiles: npt.NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(tiles).to(self.device)

    def _embed_all(self, sources: list[Any], kind: str, **keywords: Any) -> Tensor:
        """Embeddings of all sources, or the error of the first that cannot be read."""
        rows = []
        for row in self.embed_each(sources, kind=kind, **keywords):
            if isinstance(row, VitrailError):
                raise row
            rows.append(row)
        return torch.stack(rows)

    @torch.no_grad()
    def _embed_batches(
        self,
        model: ContrastiveModel,
        batches: Iterable[list[Frames | VitrailError]],
        mode: Mode,
        normalize: bool,
        frames_at_once: int,
    ) -> Iterator[Tensor | VitrailError]:
        for batch in batches:
            read = [item for item in batch if not isinstance(item, VitrailError)]
            means: Iterator[Tensor] = iter(())
            if read:
                tiles = self._on_device(np.concatenate(read)).split(frames_at_once)
                raw = torch.cat([model.embed_images(part, mode) for part in tiles]).cpu()
                means = iter([frames.mean(0) for frames in raw.split([len(frames) for frames in read])])
            for item in batch:
                if isinstance(item, VitrailError):
                    yield item
                else:
                    row = next(means)
                    yield F.normalize(row, dim=-1) if normalize else row

    def _embed_texts(self, call: str, texts: Sequence[str]) -> Tensor:
        return embed_texts(self._contrastive(call), encode_texts(self._text_tokenizer(), texts, call=call))


def items_at_once(kind: str, batch_size: int, num_frames: int) -> int:
    """How many images, or videos, `embed_each` takes together: `batch_size` pictures."""
    return batch_size if kind == "image" else max(1, batch_size // num_frames)


def _read_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise InvalidRequestError(f"mode={mode!r}: must be 'c' (InternVL-C) or 'g' (InternVL-G)")


def _video_list(videos: Video | Sequence[Video]) -> list[Any]:
    """Videos as a list; a list of lists is several videos given as frames."""
    return list(videos) if isinstance(videos, list | tuple) else [videos]
