"""What an export is calibrated and verified with: prompts as the engine runs them, and the engine's own answers."""

from pathlib import Path
from typing import Any

import torch

from ..export.calibration import Prompt
from ..export.verification import Cases, verify
from .api import Runtime
from .backends.manifest import read_manifest
from .calibration import prepare_examples, read_examples
from .config import ContrastiveConfig, InternVLConfig, load_any_config
from .engine.processor import Processor
from .image import ImageLimits, open_image, tile_static
from .texts import encode_texts
from .tokenizer import load_tokenizer
from .weights import resolve_checkpoint


def calibration_prompts(
    source: str | Path, examples: str | Path | None, num_samples: int, max_tiles: int, *, answers: bool = True
) -> list[Prompt]:
    """Prompts of a set of examples, None for the one that ships, with the examples' answers behind them."""
    folder = resolve_checkpoint(source)
    config = load_any_config(folder)
    if not isinstance(config, InternVLConfig):
        return []
    tokenizer = load_tokenizer(folder)
    longest = config.llm.max_model_len
    processor = Processor(config, tokenizer, limits=ImageLimits(), max_images=64, max_model_len=longest)
    found = read_examples(examples, num_samples)
    if not answers:
        found = [type(example)(example.images, example.prompt) for example in found]
    prepared = prepare_examples(processor, found, max_tiles).prompts
    return [Prompt(prompt.token_ids, torch.cat([torch.from_numpy(t) for t in prompt.tiles])) for prompt in prepared]


def check_export(
    folder: str | Path,
    checkpoint: str | None = None,
    *,
    num_samples: int = 4,
    max_tiles: int = 2,
    max_new_tokens: int = 24,
    min_cosine: float = 0.999,
) -> dict[str, Any]:
    """Verify an exported folder on examples that ship; see `export.verification`. Returns the report."""
    manifest = read_manifest(folder)
    source = resolve_checkpoint(manifest.checkpoint if checkpoint is None else checkpoint)
    config = load_any_config(source)
    if isinstance(config, ContrastiveConfig):
        cases = _contrastive_cases(source, config, num_samples)
    else:
        prompts = calibration_prompts(source, None, num_samples, max_tiles, answers=False)
        answers = _answers(source, num_samples, max_tiles, max_new_tokens) if len(manifest.parts) == 2 else []
        cases = Cases(prompts, answers, max_new_tokens=max_new_tokens)
    return dict(verify(folder, source, cases, min_cosine).__dict__)


def _answers(source: Path, num_samples: int, max_tiles: int, max_new_tokens: int) -> list[list[int]]:
    """The engine's greedy answers in fp32."""
    examples = read_examples(None, num_samples)
    with Runtime.from_pretrained(source, dtype="float32", device="cpu", progress=False) as runtime:
        outputs = runtime.generate(
            [example.prompt for example in examples],
            images=[list(example.images) for example in examples],
            max_new_tokens=max_new_tokens,
            max_tiles=max_tiles,
        )
    return [output.token_ids for output in outputs]


def _contrastive_cases(source: Path, config: ContrastiveConfig, num_samples: int) -> Cases:
    examples = read_examples(None, num_samples)
    pictures = [open_image(example.images[0]) for example in examples]
    tiles = [torch.from_numpy(tile_static(picture, config.vision.image_size)) for picture in pictures]
    texts = encode_texts(load_tokenizer(source), [example.prompt for example in examples], call="verify")
    return Cases(images=torch.cat(tiles), texts=texts)
