"""What a token knows about its cell, asked by linear heads that are dropped after training."""

from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.bench.nano.picture import IGNORED, LABELS

EMPTY_WEIGHT = 0.25  # of the cells that hold nothing of a kind, against those that do


class Heads(nn.Module):
    """One linear classifier per label, on normed visual tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, sum(LABELS.values()))

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        normed = F.rms_norm(tokens.float(), tokens.shape[-1:])
        return self.linear(normed).split(list(LABELS.values()), dim=-1)


def label_loss(scores: tuple[Tensor, ...], labels: Tensor, without: Collection[str] = ()) -> Tensor:
    """Sum over labels of the mean cross-entropy, cells that hold something weighing most.

    scores: from `Heads`; labels: (..., labels) int64; without: names of labels that are not asked for.
    """
    total = scores[0].new_zeros(())
    for place, (name, score) in enumerate(zip(LABELS, scores, strict=True)):
        if name in without:
            continue
        wanted = labels[..., place].flatten()
        each = F.cross_entropy(score.flatten(0, -2).float(), wanted, ignore_index=IGNORED, reduction="none")
        filled = wanted > 0
        if name == "index":  # 0 is a place too
            filled = labels[..., 0].flatten() > 0
            each = each * filled
        total = total + (each * filled).sum() / filled.sum().clamp(min=1)
        total = total + EMPTY_WEIGHT * (each * ~filled).sum() / (~filled).sum().clamp(min=1)
    return total
