"""Pictures whose visual tokens are kept, so that the frozen vision half runs once for several uses of a picture."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tiles import cut_labels, cut_tiles
from torch import Tensor

from vitrail.bench.nano.picture import Question
from vitrail.bench.nano.tasks import draw_picture
from vitrail.bench.nano.vocabulary import Split
from vitrail.runtime.models.internvl import InternVLModel


@dataclass(frozen=True)
class Seen:
    """tokens: (visual tokens, hidden) bf16. labels: (visual tokens, labels) int8."""

    kind: str
    tokens: Tensor
    labels: Tensor
    questions: list[Question]


@torch.no_grad()
def look(model: InternVLModel, kind: str, split: Split, numbers: range, device: torch.device) -> list[Seen]:
    """Draws and encodes pictures."""
    pictures = [draw_picture(kind, split, number) for number in numbers]
    tiles = [torch.from_numpy(cut_tiles(picture)) for picture in pictures]
    with torch.autocast(device.type, torch.bfloat16):
        tokens = model.encode_tiles(torch.cat(tiles).to(device)).to(torch.bfloat16)
    parts = tokens.split([len(cut) for cut in tiles])
    return [
        Seen(kind, part.flatten(0, 1).clone(), torch.from_numpy(cut_labels(picture)).flatten(0, 1), picture.questions)
        for picture, part in zip(pictures, parts, strict=True)
    ]


class Pool:
    """The latest `size` pictures of each kind, apart by their number of visual tokens."""

    def __init__(self, model: InternVLModel, kinds: list[str], size: int, device: torch.device, first: int) -> None:
        self.model, self.size, self.device = model, size, device
        self.kept: dict[tuple[str, int], list[Seen]] = {}
        self._numbers: dict[str, Iterator[range]] = {kind: _ranges(first, 8) for kind in kinds}

    def add(self, kind: str) -> None:
        """Encodes eight new pictures of a kind; a full pool forgets its oldest."""
        for seen in look(self.model, kind, "train", next(self._numbers[kind]), self.device):
            kept = self.kept.setdefault((kind, len(seen.tokens)), [])
            kept.append(seen)
            if len(kept) > self.size:
                del kept[0]

    def draw(self, rng: random.Random, kind: str, visual_tokens: int, count: int) -> list[Seen]:
        return rng.choices(self.kept[kind, visual_tokens], k=count)


def _ranges(first: int, count: int) -> Iterator[range]:
    while True:
        yield range(first, first + count)
        first += count
