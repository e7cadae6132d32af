"""Beam search over one sequence: the hypotheses that go on and those that have ended. No model, no cache.

As in transformers' with `length_penalty=1` and no early stopping: a hypothesis is worth the mean log probability of its
tokens, its end token counted, and the search ends when nothing that goes on is worth more than all that have ended.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class BeamSearch:
    """`sequences` are the beams that go on, `num_beams` of them, in the rows of the model.

    ended: (worth, token ids with their end token), the best first, at most `num_beams`.
    """

    num_beams: int
    end_ids: Collection[int]
    min_new_tokens: int
    max_new_tokens: int
    sequences: list[list[int]] = field(default_factory=list)
    ended: list[tuple[float, list[int]]] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        self.sequences = [[] for _ in range(self.num_beams)]
        # All beams begin alike: only the first may be continued.
        self._totals = torch.tensor([0.0] + [-torch.inf] * (self.num_beams - 1))

    def advance(self, logits: Tensor) -> list[int]:
        """Take the next token. logits: (num_beams, vocab) of the beams. Returns the row that each beam continues."""
        length = len(self.sequences[0]) + 1
        log_probs = logits.float().cpu().log_softmax(-1)
        if length <= self.min_new_tokens:
            log_probs[:, list(self.end_ids)] = -torch.inf
        # An end for every beam leaves as many candidates that go on.
        found = (self._totals[:, None] + log_probs).flatten().topk(2 * self.num_beams)
        going: list[tuple[float, int, int]] = []
        for rank, (total, place) in enumerate(zip(found.values.tolist(), found.indices.tolist(), strict=True)):
            row, token = divmod(place, log_probs.shape[1])
            if token not in self.end_ids and length < self.max_new_tokens:
                going.append((total, row, token))
            elif rank < self.num_beams:
                self.ended.append((total / length, [*self.sequences[row], token]))
        self.ended = sorted(self.ended, key=lambda entry: -entry[0])[: self.num_beams]
        going = going[: self.num_beams]
        full = len(self.ended) == self.num_beams
        if length == self.max_new_tokens or (full and going[0][0] / length <= self.ended[-1][0]):
            self.done = True
            return list(range(self.num_beams))
        self._totals = torch.tensor([total for total, _, _ in going])
        self.sequences = [[*self.sequences[row], token] for _, row, token in going]
        return [row for _, row, _ in going]
