"""Scales that move the difficulty of quantising: channels of an input divided, columns of the weight multiplied.

x W^T = (x / s) (W s)^T, and what makes x (a norm, the rows of values, the rows of `up`) can make x / s for nothing. In
W8A8 this takes the magnitude out of channels that stick out of their row (SmoothQuant, arXiv:2211.10438); in W4A16 it
gives columns that large inputs meet a finer grid (AWQ, arXiv:2306.00978). How far to go, the exponent alpha, is
searched per layer: what gives the smallest error of the layer's own output on rows of its calibration inputs; not to
scale at all is among the candidates.

What follows GELU cannot be folded. It may instead be rounded with scales known beforehand, which the columns take up,
so that the kernel that computes GELU writes codes: see `search_static`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.quantize import LARGEST, quantize_columns_reference, quantize_rows_reference
from .calibration import InputStatistics
from .models.decoder import Layer
from .models.intern_vit import Block
from .quantization.weight import QuantizedWeight

Quantise = Callable[[Tensor], QuantizedWeight]

# Exponents that are tried. At 1 a scale follows the inputs alone, at 0 (W8A8) the weight alone.
ALPHAS = {
    "int8": (0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "int4": (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0),
}
CLIPS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # shares of a group's range that int4 may keep instead of all of it
ROWS_DTYPE = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # of the methods that round activations
# Of scales known beforehand: 0 is one for all channels, towards 1 each follows its own channel, and an image in which a
# channel holds more than in any of the calibration's would be cut off sooner.
STATIC_ALPHAS = (0.0, 0.25, 0.5, 0.75)
HEADROOM = {torch.int8: 1.0, torch.float8_e4m3fn: 2.0}  # above what was seen; floating point loses nothing by it
CHUNK = 4096  # outputs of a weight that are tried at a time


@dataclass(frozen=True)
class Fold:
    """A linear layer and what makes its inputs.

    producer: a norm, or the linear layer whose last rows make the inputs. heads: (groups, repeats, size): channels of
    the producer are (groups, size), and every group is an input of the consumer `repeats` times.
    """

    consumer: str
    producer: str
    heads: tuple[int, int, int]

    def reduce(self, values: Tensor) -> Tensor:
        """(inputs of the consumer,) to the channels of the producer: the largest of those that share one."""
        return values.view(self.heads).amax(1).flatten()

    def expand(self, values: Tensor) -> Tensor:
        """The inverse of `reduce`."""
        groups, _, size = self.heads
        return values.view(groups, 1, size).expand(self.heads).flatten()

    def apply(self, block: nn.Module, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Divide what is made by `scales` (channels of the producer) and multiply the columns that read it, in place.

        block: fp32. A norm's new weight is rounded to `dtype`, as it will be stored, and the columns are multiplied by
        the scales that it then really has: the block computes what it did. Returns these, of the consumer's inputs.
        """
        producer = block.get_submodule(self.producer)
        weight: Tensor = producer.get_parameter("weight").data
        bias: Tensor | None = None if getattr(producer, "bias", None) is None else producer.get_parameter("bias").data
        if weight.dim() == 1:
            rounded = (weight / scales).to(dtype).float()
            scales = torch.where(rounded == 0, 1, weight / rounded)
            weight.copy_(torch.where(rounded == 0, weight, rounded))
        else:
            weight[-len(scales) :] /= scales[:, None]
        if bias is not None:
            bias[-len(scales) :] /= scales
        columns = self.expand(scales)
        block.get_submodule(self.consumer).get_parameter("weight").data.mul_(columns)
        return columns


def folds_of(block: Block | Layer) -> list[Fold]:
    """What can be folded in a block of either half."""
    if isinstance(block, Block):
        size, wide = block.mlp.fc1.weight.shape[1], block.attn.proj.weight.shape[1]
        return [
            Fold("attn.qkv", "norm1", (1, 1, size)),
            Fold("attn.proj", "attn.qkv", (1, 1, wide)),
            Fold("mlp.fc1", "norm2", (1, 1, size)),
        ]
    attention, size = block.attention, block.attention.qkv.weight.shape[1]
    heads = (attention.num_kv_heads, attention.num_heads // attention.num_kv_heads, attention.head_dim)
    return [
        Fold("attention.qkv", "attention_norm", (1, 1, size)),
        Fold("attention.o", "attention.qkv", heads),
        Fold("mlp.gate_up", "mlp_norm", (1, 1, size)),
        Fold("mlp.down", "mlp.gate_up", (1, 1, block.mlp.down.weight.shape[1])),
    ]


@dataclass(frozen=True)
class Found:
    """The best scales, channels of the producer; alpha is None, and they are 1, where none help."""

    scales: Tensor
    alpha: float | None


def search(fold: Fold, weight: Tensor, statistics: InputStatistics, method: str, quantise: Quantise) -> Found:
    """Try all exponents. weight: (out, in) fp32, of the consumer."""
    candidates: dict[float | None, Tensor] = {None: torch.ones_like(fold.reduce(statistics.largest))}
    columns = fold.reduce(weight.abs().amax(0))
    for alpha in ALPHAS.get(method, ()):
        if method == "int8":
            scales = fold.reduce(statistics.largest) ** alpha / columns ** (1 - alpha)
        else:
            scales = fold.reduce(statistics.mean) ** alpha
        candidates[alpha] = _tamed(scales)
    x = statistics.sample.float()
    errors = _output_errors(x, weight, quantise, method, [fold.expand(scales) for scales in candidates.values()])
    best = min(zip(errors, candidates, strict=True), key=lambda pair: pair[0])[1]
    return Found(candidates[best], best)


@dataclass(frozen=True)
class FoundStatic:
    """The best scales known beforehand, of the inputs of a layer; error: of its output, as `output_error` has it."""

    scales: Tensor
    alpha: float
    error: float


def search_static(weight: Tensor, statistics: InputStatistics, method: str, quantise: Quantise) -> FoundStatic:
    """Try all exponents of scales that let no input of the calibration be cut off. weight: (out, in) fp32.

    quantise: rounds a weight whose columns were multiplied by the scales.
    """
    dtype = ROWS_DTYPE[method]
    peak = statistics.largest.max()
    shares = (statistics.largest / peak).clamp(min=1e-3)  # a channel that was silent may speak up
    candidates = [shares**alpha * (peak * HEADROOM[dtype] / LARGEST[dtype]) for alpha in STATIC_ALPHAS]
    x = statistics.sample.float()
    errors = _output_errors(x, weight, quantise, method, candidates, static=True)
    error, alpha, scales = min(zip(errors, STATIC_ALPHAS, candidates, strict=True), key=lambda found: found[0])
    return FoundStatic(scales, alpha, error)


def _tamed(scales: Tensor) -> Tensor:
    """Around 1, and 1 for channels that are silent or have no weight."""
    usable = scales.isfinite() & (scales > 0)
    if not usable.any():
        return torch.ones_like(scales)
    middle = (scales[usable].max() * scales[usable].min()).sqrt()
    return torch.where(usable, scales / middle, 1).clamp(1e-4, 1e4)


def output_error(
    x: Tensor,
    weight: Tensor,
    quantise: Quantise,
    method: str,
    scales: Tensor | None = None,
    reference: Tensor | None = None,
) -> float:
    """RMS of the error of x W^T over its RMS, with quantised weights, and activations where the method rounds them.

    x: (rows, in) fp32; weight: (out, in) fp32. scales: (in,), folded first. reference: the true weight, if `weight` is
    not that.
    """
    return _output_errors(x, weight, quantise, method, [scales], reference)[0]


def _output_errors(
    x: Tensor,
    weight: Tensor,
    quantise: Quantise,
    method: str,
    candidates: Sequence[Tensor | None],
    reference: Tensor | None = None,
    static: bool = False,
) -> list[float]:
    """`output_error` for each of several scales; the true output is computed once.

    static: the scales are those of the codes, and rows have none of their own.
    """
    inputs = []
    for scales in candidates:
        if static and scales is not None:
            inputs.append(quantize_columns_reference(x, scales, ROWS_DTYPE[method]).dequantize())
            continue
        scaled = x if scales is None else x / scales
        inputs.append(
            quantize_rows_reference(scaled, ROWS_DTYPE[method]).dequantize() if method in ROWS_DTYPE else scaled
        )
    errors, norm = [0.0] * len(inputs), 0.0
    for first in range(0, len(weight), CHUNK):
        part = weight[first : first + CHUNK]
        true = x @ (part if reference is None else reference[first : first + CHUNK]).T
        norm += float(true.square().sum())
        for index, (rounded, scales) in enumerate(zip(inputs, candidates, strict=True)):
            quantised = quantise(part if scales is None else part * scales).dequantize()
            errors[index] += float((rounded @ quantised.T - true).square().sum())
    return [(error / norm) ** 0.5 if norm else 0.0 for error in errors]


def clipped(weight: Tensor, x: Tensor, group_size: int, quantise: Quantise) -> Tensor:
    """The weight with the range of each row and group cut to what loses least on its inputs.

    weight: (out, in) fp32; x: (rows, in) fp32, as the weight will meet them. A narrower range has a finer grid; few
    large weights pay for it. The error of a group's part of the output is d^T (x^T x) d for the error d of the weights.
    """
    groups = x.unflatten(1, (-1, group_size)).transpose(0, 1)  # [groups, rows, size]
    gram = groups.transpose(1, 2) @ groups
    return torch.cat([_clip_rows(part, gram, quantise) for part in weight.split(CHUNK)])


def _clip_rows(weight: Tensor, gram: Tensor, quantise: Quantise) -> Tensor:
    grouped = weight.unflatten(1, (len(gram), -1))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    best, least = grouped, _group_errors(grouped, grouped, gram, quantise)
    for share in CLIPS:
        tried = grouped.clamp(low * share, high * share)
        errors = _group_errors(tried, grouped, gram, quantise)
        better = errors < least
        best, least = torch.where(better[..., None], tried, best), torch.where(better, errors, least)
    return best.flatten(1)


def _group_errors(tried: Tensor, true: Tensor, gram: Tensor, quantise: Quantise) -> Tensor:
    """(out, groups)."""
    d = quantise(tried.flatten(1)).dequantize().view_as(true) - true
    by_group = d.transpose(0, 1)  # [groups, out, size]
    return ((by_group @ gram) * by_group).sum(-1).T
