"""Quantise the linear layers of a model in place, and let the layers before them hand over 8-bit rows."""

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import UnsupportedError
from ..layers.linear import Linear, LinearGelu, LinearLayer, LinearSwiglu, replace_weight
from ..layers.norm import LayerNorm, RMSNorm
from .config import LANGUAGE, VISION, QuantizationConfig
from .methods import check_device, check_inputs, quantize_weight
from .weight import QuantizedWeight

# Of a block: a norm, and the only layer that reads it.
_NORMS = (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"), ("attention_norm", "attention.qkv"), ("mlp_norm", "mlp.gate_up"))


def quantize_model(
    model: nn.Module,
    llm: str | None = None,
    vision: str | None = None,
    overrides: Mapping[str, str | None] | None = None,
    *,
    group_size: int = 128,
    symmetric: bool = True,
    packed: bool = True,
) -> None:
    """Round the weights of a model's linear layers to nearest, in place, one after the other; see QuantizationConfig.

    packed: go over to the layout of the device; without it weights stay in canonical form, as checkpoints hold them.
    Raises before anything is changed where a method does not fit a layer or the device.
    """
    config = QuantizationConfig(llm, vision, group_size, symmetric, overrides or {})
    layers = linear_layers(model)
    for module, method in plan(model, config).items():
        weight = layers[module].weight
        if isinstance(weight, QuantizedWeight):
            continue
        quantized = quantize_weight(weight, method, group_size=group_size, symmetric=symmetric, name=f"{module}.weight")
        replace_weight(layers[module], quantized)
        if packed:
            pack(module, quantized)
    connect(model)


def linear_layers(model: nn.Module) -> dict[str, LinearLayer]:
    """The linear layers of a model by their paths."""
    kinds = (Linear, LinearGelu, LinearSwiglu)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def plan(model: nn.Module, config: QuantizationConfig, device: torch.device | None = None) -> dict[str, str]:
    """Module path -> method, of all linear layers that a config quantises. Works on a model without memory.

    device: where the model will be; by default where it is. Raises `ConfigError` for groups that do not divide a
    layer's inputs and for overrides that match nothing, `UnsupportedError` for what the device cannot run.
    """
    layers, device = linear_layers(model), device or next(model.parameters()).device
    config.check_overrides(layers)
    for half, method, beginnings in (("language", config.llm, LANGUAGE), ("vision", config.vision, VISION)):
        if method is not None and not any(name.startswith(beginnings) for name in layers):
            raise UnsupportedError(f"{method} for the {half} half: the model has none")
    methods = {name: method for name in layers if (method := config.method_of(name)) is not None}
    for method in sorted(set(methods.values())):
        check_device(method, device)
    check_layers(model, methods, config, device)
    return methods


def check_layers(
    model: nn.Module, methods: Mapping[str, str], config: QuantizationConfig, device: torch.device
) -> None:
    """Raises as `plan` does where a method does not fit the inputs of a layer."""
    layers = linear_layers(model)
    for name, method in methods.items():
        check_inputs(method, layers[name].weight.shape[1], config.group_size, name, device)


def pack(name: str, weight: QuantizedWeight) -> None:
    """Go over to the layout of the device. Raises `UnsupportedError` where the device's kernels do not take it."""
    try:
        weight.pack()
    except ValueError as error:  # a stored group size, for example
        raise UnsupportedError(f"{name} ({weight.method}): {error}") from None


def capturable(model: nn.Module) -> bool:
    """Whether the model may run as CUDA graphs."""
    return all(module.capturable for module in model.modules() if isinstance(module, QuantizedWeight))


def connect(model: nn.Module) -> None:
    """Tell every norm, and fc1 of the ViT, in which codes the only layer that reads it takes its input, if in any."""
    for module in model.modules():
        for name, path in _NORMS:
            norm, weight = _child(module, name), _weight(module, path)
            if isinstance(norm, RMSNorm | LayerNorm):
                norm.rows_dtype = None if weight is None or weight.input_scales is not None else weight.rows_dtype
        fc1, first, second = _child(module, "fc1"), _weight(module, "fc1"), _weight(module, "fc2")
        if isinstance(fc1, LinearGelu):
            # The codes that fc1 can round to are those that it is made of.
            alike = first is not None and second is not None and first.rows_dtype == second.rows_dtype is not None
            fc1.next_scales = second.input_scales if second is not None and alike else None


def _child(module: nn.Module, path: str) -> object:
    """The descendant of a module, None if it has none of that name."""
    found: object = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _weight(module: nn.Module, path: str) -> QuantizedWeight | None:
    weight = getattr(_child(module, path), "weight", None)
    return weight if isinstance(weight, QuantizedWeight) else None
