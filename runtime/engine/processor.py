"""From a conversation with images to what the engine runs: token ids and uint8 tiles.

Sizes are read from image headers first, so that everything that can be refused is refused before a pixel is decoded;
`count` stops there and still knows every token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt
from PIL.Image import Image

from ..config import InternVLConfig, LlavaConfig
from ..errors import CapacityError, InvalidRequestError
from ..image import (
    Grid,
    ImageLimits,
    ImageSource,
    image_size,
    open_image,
    plan_tiles,
    share_tiles,
    tile_image,
    tile_static,
)
from ..prompt import Piece, Question, encode_bare, expand, get_template, render
from ..request import Usage
from ..resize import fit_image
from ..tokenizer import Tokenizer
from .vision_cache import LoadedImage, VisionCache, domain_key, read_once, source_digest

Tiles = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """An image of a conversation and the most tiles it may take (None: the checkpoint's own maximum)."""

    source: ImageSource
    max_tiles: int | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns of (question, answer), the last answer None, and the images their `<image>` marks stand for, in order."""

    turns: Sequence[tuple[Question, str | None]]
    pictures: Sequence[Picture] = ()
    system: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A prompt as token ids, `<IMG_CONTEXT>` expanded, with the tiles of its images in order.

    pictures: the images instead of their tiles, where those are to be made later, each with the most it may take.
    grids: (columns, rows) of each image's tiles, without the thumbnail.
    """

    token_ids: list[int]
    num_tiles: list[int]
    image_tokens: int
    tiles: list[Tiles] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)

    @property
    def usage(self) -> Usage:
        return Usage(prompt_tokens=len(self.token_ids), image_tokens=self.image_tokens, image_tiles=sum(self.num_tiles))


class Processor:
    """Prepares requests for one checkpoint: its template, its tokenizer, its tiling."""

    def __init__(
        self,
        config: InternVLConfig,
        tokenizer: Tokenizer,
        *,
        limits: ImageLimits,
        max_images: int,
        max_model_len: int,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.template = get_template(config.template)
        self.limits = limits
        self.max_images = max_images
        self.max_model_len = max_model_len

    def count(
        self, conversation: Conversation, *, max_tiles: int | None = None, total_max_tiles: int | None = None
    ) -> Prepared:
        """The prompt without its tiles, from image headers alone."""
        return self._plan(conversation, max_tiles, total_max_tiles)[0]

    def prepare(
        self,
        conversation: Conversation,
        *,
        max_tiles: int | None = None,
        total_max_tiles: int | None = None,
        decode: bool = True,
    ) -> Prepared:
        """The prompt and its tiles, or without `decode` its pictures, which `load` makes tiles of.

        Raises `InvalidRequestError` or `CapacityError` before decoding, where it can.
        """
        prepared, caps = self._plan(conversation, max_tiles, total_max_tiles)
        if len(prepared.token_ids) >= self.max_model_len:
            raise CapacityError(
                f"the prompt has {len(prepared.token_ids)} tokens, {prepared.image_tokens} of them from images; "
                f"the context holds {self.max_model_len} with at least one for the answer"
            )
        for index, (picture, cap) in enumerate(zip(conversation.pictures, caps, strict=True)):
            if not decode:
                prepared.pictures.append(Picture(picture.source, cap))
                continue
            prepared.tiles.append(self.tile(picture.source, cap, name=image_name(index))[0])
        return prepared

    def tile(self, source: ImageSource, max_tiles: int | None = None, *, name: str = "image") -> tuple[Tiles, Grid]:
        """Decode one image and cut it as this checkpoint wants: (n, tile, tile, 3) uint8, and its (columns, rows)."""
        return self._cut(open_image(source, self.limits, name=name), max_tiles, name)

    def load(
        self, picture: Picture, *, name: str, cache: VisionCache | None = None, domain: bytes = b""
    ) -> LoadedImage:
        """The tiles of a picture, or the visual tokens that `cache` has for them; `domain`: see `domain_key`.

        A picture whose tokens are cached is not cut, nor decoded if its file or array was seen before.
        """
        source = picture.source if cache is None else read_once(picture.source, name=name)

        def cut() -> LoadedImage:
            begin = perf_counter()
            image = open_image(source, self.limits, name=name)
            decoded = perf_counter()
            tiles = self._cut(image, picture.max_tiles, name)[0]
            cut = perf_counter()
            return LoadedImage(tiles=tiles, decode_ms=(decoded - begin) * 1e3, tile_ms=(cut - decoded) * 1e3)

        if cache is None:
            return cut()
        digest = source_digest(source)
        if digest is not None:  # the same source is cut in as many ways as it may take tiles
            digest = domain_key(digest.hex(), repr(picture.max_tiles))
        return cache.load(digest, domain, cut)

    def _cut(self, image: Image, max_tiles: int | None, name: str) -> tuple[Tiles, Grid]:
        config = self.config
        if not config.dynamic_image_size:
            if isinstance(config, LlavaConfig) and not config.pad2square:
                return fit_image(image, (config.tile_size, config.tile_size), crop=True)[None], (1, 1)
            return tile_static(image, config.tile_size, pad2square=config.pad2square, name=name), (1, 1)
        cap = config.max_dynamic_patch if max_tiles is None else max_tiles
        floor = min(config.min_dynamic_patch, cap)
        grid, _ = plan_tiles(image.size, config.tile_size, floor, cap, config.use_thumbnail)
        return tile_image(image, config.tile_size, floor, cap, config.use_thumbnail), grid

    def tile_static(self, source: ImageSource, *, name: str = "image") -> Tiles:
        """The whole image stretched to one tile: (1, tile, tile, 3) uint8."""
        return tile_static(open_image(source, self.limits, name=name), self.config.tile_size)

    def _encode(self, pieces: list[Piece], tokens_per_image: list[int]) -> list[int]:
        if not isinstance(self.config, LlavaConfig):
            return self.tokenizer.encode(expand(pieces, tokens_per_image))
        context_id = self.tokenizer.token_to_id(self.config.context_token)
        assert context_id is not None  # or there would be no Runtime
        return encode_bare(self.tokenizer, pieces, tokens_per_image, context_id)

    def _plan(
        self, conversation: Conversation, max_tiles: int | None, total_max_tiles: int | None
    ) -> tuple[Prepared, list[int]]:
        """The prompt, and the most tiles each image may take."""
        config = self.config
        pictures = conversation.pictures
        if len(pictures) > self.max_images:
            raise InvalidRequestError(f"{len(pictures)} images exceed the limit of {self.max_images} per prompt")
        sizes = [
            image_size(picture.source, self.limits, name=image_name(index)) for index, picture in enumerate(pictures)
        ]
        caps = [
            min((cap for cap in (picture.max_tiles, max_tiles) if cap is not None), default=config.max_dynamic_patch)
            for picture in pictures
        ]
        if not config.dynamic_image_size:
            caps = [1] * len(caps)
        floor = min(config.min_dynamic_patch, max(caps, default=1))  # gives way to lower caps
        if total_max_tiles is not None and pictures:
            caps = share_tiles(sizes, caps, total_max_tiles, config.tile_size, floor, config.use_thumbnail)
        plans = [
            plan_tiles(size, config.tile_size, min(floor, cap), cap, config.use_thumbnail)
            for size, cap in zip(sizes, caps, strict=True)
        ]
        num_tiles = [tiles for _, tiles in plans]
        tokens_per_image = [tiles * config.tokens_per_tile for tiles in num_tiles]
        system = conversation.system if conversation.system is not None else config.system_message
        pieces = render(self.template, conversation.turns, system)
        token_ids = self._encode(pieces, tokens_per_image)
        grids = [grid for grid, _ in plans]
        return Prepared(token_ids, num_tiles, sum(tokens_per_image), grids=grids), caps


def image_name(index: int) -> str:
    """How messages call the image at `index`: counted from 1, as users count."""
    return f"image {index + 1}"
