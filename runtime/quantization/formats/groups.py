"""4-bit weights in groups of inputs: what the formats that store them as nibbles of 32-bit words share."""

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError, UnsupportedError
from ..int4 import Int4Weight, pack_nibbles
from .base import Entries, Part

WORD = 8  # nibbles of a word
IN_ORDER = tuple(range(WORD))
HALVES = (torch.float16, torch.bfloat16, torch.float32)  # what scales may be


def nibbles(words: Tensor, positions: tuple[int, ...] = IN_ORDER) -> Tensor:
    """(rows, words) int32 to (rows, 8 * words) uint8: value j of a word is its nibble positions[j], 0 the lowest."""
    shifts = torch.tensor([4 * position for position in positions], dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 15).to(torch.uint8).flatten(1)


def group_size_of(entries: Entries, layer: str, columns: int) -> int:
    """`group_size` for a layer of so many inputs, of which -1 means all."""
    size = entries.integer("group_size", 128)
    if size == -1:
        return columns
    if size < 1 or columns % size or size % 8:
        raise ConfigError(
            f"{entries.where}: `group_size` {size} does not divide the {columns} inputs of {layer} by eights"
        )
    return size


def check_bits(entries: Entries, key: str = "bits") -> None:
    """Raises for anything but 4 bits."""
    if (bits := entries.integer(key, 4)) != 4:
        raise UnsupportedError(f"{entries.where}: weights of {bits} bits are not supported; 4 are")


def zeros_bias(shape: tuple[int, int]) -> Part:
    """A bias, which some writers add where the model has none: as long as it is zero."""
    return Part(((shape[0],),), HALVES, optional=True)


def check_bias(layer: str, bias: Tensor | None) -> None:
    if bias is not None and bias.any():
        raise CheckpointError(f"{layer}.bias: is not zero, and the model has no such bias")


def grouped(layer: str, q: Tensor, scales: Tensor, zeros: Tensor | None, groups: Tensor | None) -> Int4Weight | Tensor:
    """The weight scales * (q - zeros), the group of each input given.

    q: (out, in) uint8; scales: (out, groups) fp32; zeros: (out, groups) uint8, None for 8; groups: (in,), None where
    inputs are in the order of their groups. Where they are not, as with GPTQ's act-order, they are brought into it;
    where groups are not of one size, the weight is dequantised.
    """
    size = q.shape[1] // scales.shape[1]
    if zeros is not None and bool((zeros == 8).all()):
        zeros = None
    in_order = torch.arange(q.shape[1], device=q.device) // size
    order = None
    if groups is not None and not torch.equal(groups.long(), in_order):
        groups = groups.long()
        if groups.min() < 0 or groups.max() >= scales.shape[1]:
            raise CheckpointError(
                f"{layer}: groups of its inputs lie outside the {scales.shape[1]} that it has scales of"
            )
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order], in_order):
            centred = q.float() - (8.0 if zeros is None else zeros.float()[:, groups])
            return centred * scales[:, groups]
        q = q[:, order]
    return Int4Weight(pack_nibbles(q), scales, zeros, order=order)
