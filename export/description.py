"""What the manifest says beside the parts: how images become tiles, how questions become prompts, sizes, versions."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

from ..kernels.patch_embedding import IMAGENET_MEAN, IMAGENET_STD
from ..runtime.config import ContrastiveConfig, InternVLConfig, LlavaConfig
from ..runtime.errors import CheckpointError
from ..runtime.prompt import ImageSlot, Piece, encode_bare, expand, get_template, place_images, render, stop_tokens
from ..runtime.texts import MAX_TOKENS, PREFIX
from ..runtime.tokenizer import Control, Tokenizer
from .parts import exported_length

TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)
_QUESTION = "\0"  # stands for a user's words; no template and no text has it


def preprocessing(config: InternVLConfig | ContrastiveConfig) -> dict[str, Any]:
    """From an image file to the input `tiles`. Normalisation is inside the graph, its constants are for the reader."""
    common = {
        "layout": "uint8 (tiles, height, width, 3), RGB",
        "resample": "bicubic, antialiased, as Pillow's resize on uint8",
        "normalisation": {"inside": True, "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    }
    if isinstance(config, ContrastiveConfig):
        return {"tile_size": config.vision.image_size, "rule": "the whole image stretched to one tile", **common}
    if config.dynamic_image_size:
        rule = (
            "of all grids (columns, rows) with min_tiles <= columns * rows <= max_tiles the one whose ratio is nearest "
            "to the image's, among equals the last in order of area whose area is below twice the image's; resize to "
            "the grid, cut row by row; with use_thumbnail and more than one tile, the whole image as a last tile"
        )
    else:
        rule = "one tile: the image padded to a square" if config.pad2square else "one tile: the whole image"
    return {
        "tile_size": config.tile_size,
        "dynamic": config.dynamic_image_size,
        "min_tiles": config.min_dynamic_patch,
        "max_tiles": config.max_dynamic_patch,
        "use_thumbnail": config.use_thumbnail,
        "pad2square": config.pad2square,
        "rule": rule,
        **common,
    }


def prompt(config: InternVLConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """A question about one image as ids: `before`, image_token_id for every visual token, `after`, the ids of the text
    `question` with the user's words in it, `end`.
    """
    template = get_template(config.template)
    pieces = render(template, [(place_images(_QUESTION, 1, has_history=False), None)], config.system_message)
    context_id = context_token_id(config, tokenizer)
    before, after, question, end = _sections(pieces, config)

    def ids(section: Sequence[str | Control], *, first: bool) -> list[int]:
        if isinstance(config, LlavaConfig):
            return encode_bare(tokenizer, section, [], context_id) if first else []
        return tokenizer.encode(section, add_bos=first)

    return {
        "template": asdict(template),
        "system_message": template.system if config.system_message is None else config.system_message,
        "before": ids(before, first=True),
        "image_token": config.context_token,
        "image_token_id": context_id,
        "tokens_per_tile": config.tokens_per_tile,
        "after": ids(after, first=False),
        "question": question.replace(_QUESTION, "{question}"),
        "end": ids(end, first=False),
        "stop_token_ids": sorted(_stop_ids(config, tokenizer)),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "special_token_ids": sorted(tokenizer.special_ids),
    }


def _sections(
    pieces: list[Piece], config: InternVLConfig
) -> tuple[list[str | Control], list[str | Control], str, list[str | Control]]:
    """Pieces before the image's tokens, between them and the text of the question, that text, and those behind it."""
    slot = pieces.index(ImageSlot(0))
    before: list[str | Control] = [piece for piece in pieces[:slot] if not isinstance(piece, ImageSlot)]
    rest: list[str | Control] = [piece for piece in pieces[slot + 1 :] if not isinstance(piece, ImageSlot)]
    if not isinstance(config, LlavaConfig):
        opening, closing = expand([ImageSlot(0)], [0])
        before, rest = [*before, opening], [closing, *rest]
    joined: list[str | Control] = []
    for is_text, group in groupby(rest, key=lambda piece: isinstance(piece, str)):
        run = list(group)
        joined += ["".join(map(str, run))] if is_text else run
    place = next(index for index, piece in enumerate(joined) if isinstance(piece, str) and _QUESTION in piece)
    return before, joined[:place], str(joined[place]), joined[place + 1 :]


def context_token_id(config: InternVLConfig, tokenizer: Tokenizer) -> int:
    """The id whose places visual tokens take. Raises `CheckpointError` for a tokenizer that has none."""
    found = tokenizer.token_to_id(config.context_token)
    if found is None:
        raise CheckpointError(f"the tokenizer has no {config.context_token} token")
    return found


def _stop_ids(config: InternVLConfig, tokenizer: Tokenizer) -> set[int]:
    """The template's stop tokens, and the language model's own end of text."""
    stops = [tokenizer.token_to_id(token) for token in (*stop_tokens(get_template(config.template)), "<|endoftext|>")]
    return {token_id for token_id in (*stops, tokenizer.eos_token_id) if token_id is not None}


def text_prompt(tokenizer: Tokenizer) -> dict[str, Any]:
    """How a contrastive model's texts become ids: `prefix` before the text, `<s>` first, `</s>` last and looked at."""
    return {
        "prefix": PREFIX,
        "max_tokens": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "last": "the index of the end token",
    }


def model_sizes(config: InternVLConfig | ContrastiveConfig) -> dict[str, Any]:
    """The kind of model, and what programs ask for first."""
    if isinstance(config, ContrastiveConfig):
        return {"kind": "contrastive", "embed_dim": config.embed_dim}
    return {
        "kind": "chat",
        "hidden_size": config.llm.hidden_size,
        "vocab_size": config.llm.vocab_size,
        "vision_layers": config.vision_depth,
        "llm_layers": config.llm.num_hidden_layers,
    }


def cache_shape(config: InternVLConfig, dtype: str) -> dict[str, Any]:
    """Keys and values that the decoder takes and gives, `past_key_values.LAYER.key` and so on."""
    llm = config.llm
    return {
        "layers": llm.num_hidden_layers,
        "kv_heads": llm.num_key_value_heads,
        "head_dim": llm.head_dim,
        "dtype": dtype,
        "layout": "(batch, kv_heads, tokens, head_dim)",
        "padding": "left: the logits are those of the last position",
        "max_length": exported_length(config),
    }


def versions() -> dict[str, str]:
    """Of vitrail and of the packages that wrote the graphs."""
    found = {}
    for package in ("vitrail", "torch", "onnx", "onnxscript", "onnx-ir"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that its tokenizer is made of."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
