"""What a model is calibrated with: prompts with images, and what its linear layers see of them.

A calibration set is a folder of images (a stock question is asked about each), or a `.jsonl` file with an object a
line: `image`, a path from the file's own folder or a list of them; `prompt`, and optionally `answer`. A small one
ships with the package: drawn pictures, with questions and answers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .datasets import IMAGE_SUFFIXES, media_files
from .engine.processor import Conversation, Picture, Prepared, Processor
from .errors import CheckpointError, InvalidRequestError, VitrailError
from .layers.linear import Linear, LinearGelu, LinearSwiglu
from .prompt import place_images

SHIPPED = Path(__file__).parent / "assets" / "calibration" / "prompts.jsonl"
QUESTIONS = (
    "Describe the picture in detail.",
    "What text can be read in the picture?",
    "What is the main subject, and what surrounds it?",
    "How many things of each kind are there?",
)
SAMPLE_ROWS = 512  # of a layer's inputs, kept to judge scales by


@dataclass(frozen=True)
class Example:
    """A question about images, and what is to be read behind it, if anything."""

    images: tuple[Path, ...]
    prompt: str
    answer: str = ""


def read_examples(source: str | Path | None, limit: int) -> list[Example]:
    """At most `limit` examples, spread evenly over the set; None is the one that ships.

    Raises `InvalidRequestError` naming the file and line of what cannot be followed.
    """
    path = SHIPPED if source is None else Path(source)
    if path.is_dir():
        images = media_files(path, IMAGE_SUFFIXES)
        examples = [Example((image,), QUESTIONS[index % len(QUESTIONS)]) for index, image in enumerate(images)]
    elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
        examples = [Example((path,), QUESTIONS[0])]
    elif path.suffix.lower() == ".jsonl":
        examples = list(_of_lines(path))
    else:
        raise InvalidRequestError(f"{path}: a folder of images, an image or a .jsonl file is expected")
    if not examples:
        raise InvalidRequestError(f"{path}: holds no images to calibrate with")
    if len(examples) <= limit:
        return examples
    return [examples[index * len(examples) // limit] for index in range(limit)]


def _of_lines(path: Path) -> Iterator[Example]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        raise InvalidRequestError(f"{path}: not readable as text") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise InvalidRequestError(f"{path}: line {number} is not JSON") from None
        yield _example(path, number, entry)


def _example(path: Path, number: int, entry: Any) -> Example:
    images = entry.get("image") if isinstance(entry, Mapping) else None
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InvalidRequestError(f"{path}: line {number} has no `image`, a path or a list of them")
    texts = {key: entry.get(key, default) for key, default in (("prompt", QUESTIONS[0]), ("answer", ""))}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise InvalidRequestError(f"{path}: line {number}: `{key}` must be a string, found {text!r}")
    return Example(tuple(path.parent / name for name in names), texts["prompt"], texts["answer"])


@dataclass(frozen=True)
class CalibrationSet:
    """Prompts as the engine would run them, their answers behind them, and why other examples could not be used.

    examples: those of the prompts, in the same order.
    """

    prompts: list[Prepared]
    examples: list[Example]
    skipped: dict[str, str]


def prepare_examples(processor: Processor, examples: Sequence[Example], max_tiles: int | None = None) -> CalibrationSet:
    """Tile, render and tokenise. An unusable example is skipped; `InvalidRequestError` where none is left."""
    prompts, used, skipped = [], [], {}
    for example in examples:
        question = place_images(example.prompt, len(example.images), has_history=False)
        conversation = Conversation([(question, None)], [Picture(image) for image in example.images])
        try:
            prepared = processor.prepare(conversation, max_tiles=max_tiles)
            answer = processor.tokenizer.encode(example.answer, add_bos=False) if example.answer else []
        except VitrailError as error:
            skipped[", ".join(image.name for image in example.images)] = str(error)
            continue
        prompts.append(replace(prepared, token_ids=[*prepared.token_ids, *answer]))
        used.append(example)
    if not prompts:
        name, reason = next(iter(skipped.items()))
        raise InvalidRequestError(f"no usable image among {len(examples)} examples; {name}: {reason}")
    return CalibrationSet(prompts, used, skipped)


class InputStatistics:
    """What the input channels of a linear layer hold over all calibration tokens.

    largest, mean: (in,) fp32, of the magnitudes; sample: (about SAMPLE_ROWS, in), rows drawn evenly from all tokens.
    """

    def __init__(self, num_tokens: int) -> None:
        self.largest = torch.zeros(())
        self._sum = torch.zeros(())
        self._count = 0
        self._share = min(1.0, SAMPLE_ROWS / num_tokens)
        self._rows: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    def update(self, x: Tensor) -> None:
        """x: (..., in)."""
        rows = x.detach().flatten(0, -2)
        magnitudes = rows.abs().float()
        self.largest = torch.maximum(self.largest.to(rows.device), magnitudes.amax(0))  # a NaN stays
        self._sum = self._sum.to(rows.device) + magnitudes.sum(0)
        self._count += len(rows)
        kept = torch.randperm(len(rows), generator=self._generator)[: max(1, round(self._share * len(rows)))]
        self._rows.append(rows[kept.to(rows.device)])

    @property
    def mean(self) -> Tensor:
        return self._sum / self._count

    @property
    def sample(self) -> Tensor:
        return torch.cat(self._rows)

    def check(self, name: str) -> None:
        """Raises `CheckpointError` for inputs that nothing can be learned from."""
        if not self._count or not self.largest.isfinite().all():
            raise CheckpointError(f"{name}: its inputs are not finite on the calibration prompts")
        if not self.largest.any():
            raise CheckpointError(f"{name}: its inputs are zero on all calibration prompts")


@contextmanager
def watch(block: nn.Module, num_tokens: int) -> Iterator[dict[str, InputStatistics]]:
    """Statistics of the inputs of every linear layer of the block, by its name there, while the context is open.

    num_tokens: how many rows each of them is going to see.
    """
    seen: dict[str, InputStatistics] = {}
    handles = []
    for name, module in block.named_modules():
        if isinstance(module, Linear | LinearGelu | LinearSwiglu):
            seen[name] = statistics = InputStatistics(num_tokens)
            handles.append(module.register_forward_pre_hook(lambda _, inputs, into=statistics: into.update(inputs[0])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
