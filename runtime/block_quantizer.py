"""The weights of one block quantised: folded, clipped, rounded, and how much each layer loses by it."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .calibration import InputStatistics
from .layers.linear import LinearLayer, replace_weight
from .models.decoder import Layer
from .models.intern_vit import Block
from .quantization.config import QuantizationConfig
from .quantization.methods import quantize_weight
from .quantization.model import linear_layers
from .quantization.weight import QuantizedWeight
from .smoothing import ALPHAS, ROWS_DTYPE, clipped, folds_of, output_error, search, search_static

# Of a ViT's block: the layer with GELU, which can hand over codes of scales known beforehand, and the one behind it.
FC1, FC2 = "mlp.fc1", "mlp.fc2"

# How many times the error of rows rounded one by one may scales known beforehand cost, which save a pass over memory.
STATIC_MAY_COST = 2.0


def quantise_block(
    block: Block | Layer,
    methods: Mapping[str, str],
    statistics: Mapping[str, InputStatistics],
    config: QuantizationConfig,
    dtype: torch.dtype,
    path: str,
) -> list[dict[str, Any]]:
    """Fold and round the weights of a block in place, in canonical form.

    methods: layer of the block -> method; statistics: of the inputs of each. dtype: of what is not quantised; path: of
    the block, for errors. Returns a row a layer: its name, method, the exponent of its scales (None: none), whether
    its inputs have scales known beforehand, and the error of its output on the sample of its inputs (RMS over RMS),
    rounded to nearest as it stood and as it is now.
    """
    folded = copy.deepcopy(block).float()
    rows: dict[str, dict[str, Any]] = {}
    scales: dict[str, Tensor] = {}  # of the columns of each weight
    divisors: dict[str, Tensor] = {}  # of its last rows

    def rounder(name: str) -> Callable[[Tensor], QuantizedWeight]:
        return lambda weight: rounded_weight(weight, methods[name], config, f"{path}.{name}.weight")

    for name, method in methods.items():
        sample = statistics[name].sample.float()
        plain = output_error(sample, _weight(block, name), rounder(name), method)
        rows[name] = {"layer": name, "method": method, "alpha": None, "static": False, "plain_error": plain}
        scales[name] = torch.ones_like(sample[0])
    for fold in folds_of(block):
        name = fold.consumer
        if methods.get(name) in ALPHAS:
            found = search(fold, _weight(block, name), statistics[name], methods[name], rounder(name))
            if found.alpha is not None:
                scales[name] = fold.apply(folded, found.scales, dtype)
                rows[name]["alpha"] = found.alpha
                divisors[fold.producer] = found.scales
    static = {}
    if isinstance(block, Block) and methods.get(FC2) in ROWS_DTYPE and methods.get(FC1) == methods[FC2]:
        known = search_static(_weight(block, FC2), statistics[FC2], methods[FC2], rounder(FC2))
        if known.error <= STATIC_MAY_COST * rows[FC2]["plain_error"]:
            static[FC2] = known
    for name, method in methods.items():
        weight, x = _weight(block, name) * scales[name], statistics[name].sample.float() / scales[name]
        kept = clipped(weight, x, config.group_size, rounder(name)) if method == "int4" else weight
        if name in static:
            rows[name] |= {"alpha": static[name].alpha, "static": True, "error": static[name].error}
        else:
            rows[name]["error"] = output_error(x, kept, rounder(name), method, reference=weight)
        if name in divisors:
            kept[-len(divisors[name]) :] /= divisors[name][:, None]
        scales_of_inputs = static[name].scales if name in static else None
        rounded = rounded_weight(kept, method, config, f"{path}.{name}.weight", scales_of_inputs)
        replace_weight(cast(LinearLayer, folded.get_submodule(name)), rounded)
    layers = linear_layers(block)
    for name, layer in linear_layers(folded).items():
        if isinstance(layer.weight, QuantizedWeight):
            replace_weight(layers[name], layer.weight)
    parameters = dict(block.named_parameters())
    for name, parameter in folded.named_parameters():
        parameters[name].data.copy_(parameter)
    return list(rows.values())


def rounded_weight(
    weight: Tensor, method: str, config: QuantizationConfig, name: str, input_scales: Tensor | None = None
) -> QuantizedWeight:
    """A weight (out, in) rounded to nearest as a config asks for; input_scales: see `quantize_weight`."""
    return quantize_weight(
        weight,
        method,
        group_size=config.group_size,
        symmetric=config.symmetric,
        input_scales=input_scales,
        name=name,
    )


def _weight(block: nn.Module, name: str) -> Tensor:
    """(out, in) fp32."""
    return block.get_submodule(name).get_parameter("weight").data.float()
