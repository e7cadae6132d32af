"""Which part of a model a process holds, and how the ranks of a language half that is split over several meet."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.linear import linear
from ...kernels.quantize import QuantizedRows
from ..quantization.weight import QuantizedWeight
from .linear import Linear

# More than its annotations tell; not every build of torch has it, and only ranks look it up.
_c10d: Any = torch.distributed
# Shares of a vocabulary are multiples of this, but for the last: what matrix products read and write stays aligned.
_ALIGNMENT = 8


@dataclass(frozen=True)
class Part:
    """What of a model a process holds: the vision half, and of the language half the share of `rank` of `size` ranks.

    The vision half is everything up to the visual tokens, the projector with it.
    """

    vision: bool = True
    language: bool = True
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not self.vision and not self.language:
            raise ValueError("a part of a model must hold one of its halves")
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not one of {self.size}")

    def holds(self, parameter: str) -> bool:
        """Whether a parameter, or a share of it, is here."""
        return self.language if parameter.startswith("language_model.") else self.vision

    @property
    def splits_language(self) -> bool:
        return self.language and self.size > 1


WHOLE = Part()


@dataclass(frozen=True)
class Share:
    """What a rank holds of a parameter that is split: some stretches of its rows, in their order, or some columns."""

    rows: tuple[range, ...] = ()
    columns: range | None = None

    def rows_within(self, start: int, count: int) -> tuple[Tensor, int]:
        """Which of `count` rows from `start` on it holds, counted from `start`, and the first one's place in it."""
        kept = [
            torch.arange(max(held.start, start), min(held.stop, start + count)) for held in self._around(start, count)
        ]
        place = sum(max(0, min(held.stop, start) - held.start) for held in self.rows)
        return torch.cat([torch.arange(0), *kept]) - start, place

    def _around(self, start: int, count: int) -> Sequence[range]:
        return [held for held in self.rows if held.start < start + count and held.stop > start]


def even_share(count: int, part: Part, start: int = 0) -> range:
    """The stretch of `count` things from `start` on that falls to a rank; the size divides the count."""
    each = count // part.size
    return range(start + part.rank * each, start + (part.rank + 1) * each)


def vocabulary_share(vocab_size: int, rank: int, size: int) -> range:
    """The tokens whose rows a rank holds: as many for each rank, but fewer or none for the last."""
    each = -(-vocab_size // (size * _ALIGNMENT)) * _ALIGNMENT
    return range(min(rank * each, vocab_size), min((rank + 1) * each, vocab_size))


class TensorParallel:
    """One rank among those that share a language half, over a process group of their own.

    All ranks make the same calls in the same order, with tensors of one shape. ordered: sums are taken in the order of
    ranks, so that a row's sum is the same to the bit wherever it stands in a batch.
    """

    def __init__(self, group: Any, *, ordered: bool = False) -> None:
        self.rank: int = group.rank()
        self.size: int = group.size()
        self._group = group
        self._ordered = ordered and self.size > 2  # of two numbers there is only one sum

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over all ranks; `x` may be overwritten."""
        x = x.contiguous()
        if self._ordered:
            parts = x.new_empty((self.size, *x.shape))
            self._wait(self._group.allgather([list(parts.unbind())], [x]))
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            return total
        self._wait(self._group.allreduce([x], _on_stream(_c10d.AllreduceOptions())))
        return x

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """At rank 0 `x` of every rank, all of one shape; None elsewhere."""
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        self._wait(self._group.gather([] if parts is None else [parts], [x], _on_stream(_c10d.GatherOptions())))
        return parts

    def gather_logits(self, x: Tensor, vocab_size: int) -> Tensor:
        """x: (..., this rank's share of the vocabulary). Returns (..., vocab_size) at rank 0, and elsewhere its own."""
        widest = len(vocabulary_share(vocab_size, 0, self.size))
        parts = self.gather(F.pad(x, (0, widest - x.shape[-1])).contiguous())
        return x if parts is None else torch.cat(parts, -1)[..., :vocab_size].contiguous()

    @staticmethod
    def _wait(work: Any) -> None:
        if work is not None:
            work.wait()  # on a GPU the stream does


def _on_stream(options: Any) -> Any:
    """Options of a collective that runs on the current stream, as a captured graph needs it; rank 0 is its root."""
    options.asyncOp = False
    return options


class RowParallelLinear(Linear):
    """A linear layer whose inputs the ranks share: what they make of theirs is added up, the bias once."""

    def __init__(self, in_features: int, out_features: int, bias: bool, parallel: TensorParallel) -> None:
        super().__init__(in_features, out_features, bias)
        self.parallel = parallel

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        bias = self.bias if self.parallel.rank == 0 else None
        if isinstance(self.weight, QuantizedWeight):
            return self.parallel.all_reduce(self.weight.linear(x, bias))
        return self.parallel.all_reduce(linear(cast(Tensor, x), self.weight, bias))


def summed_linear(in_features: int, out_features: int, bias: bool, parallel: TensorParallel | None) -> Linear:
    """A layer that ends a branch: its inputs are this rank's, its outputs everybody's."""
    if parallel is None:
        return Linear(in_features, out_features, bias)
    return RowParallelLinear(in_features, out_features, bias, parallel)
