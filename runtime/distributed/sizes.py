"""What a model weighs and computes, by the tensors that its config asks for."""

from dataclasses import dataclass
from math import prod

from ..checkpoint_map import checkpoint_map
from ..config import InternVLConfig
from ..errors import UnsupportedError
from ..inventory import is_linear
from ..quantization.config import LANGUAGE, VISION, QuantizationConfig

# Bits that a weight takes, scales included: groups of 128 share one of 32 bits.
BITS = {None: 16.0, "int8": 8.0, "int8-weight": 8.0, "fp8": 8.0, "int4": 4.25}
# The vision half has graphs of up to so many tiles, which hold its activations.
LARGEST_GRAPH = 32


@dataclass(frozen=True)
class ModelSizes:
    """Parameters of the parts of a model, counted by where a method of quantisation reaches.

    vision, language: projections of the blocks, which it does; projector, head, rest_of_vision and rest_of_language (of
    it the token embedding), which stay in 16 bits. head: also where its weights are those of the embedding.
    """

    config: InternVLConfig
    vision: int
    language: int
    projector: int
    head: int
    rest_of_vision: int
    rest_of_language: int

    @classmethod
    def of(cls, config: InternVLConfig) -> "ModelSizes":
        """The sizes of a model, by its config alone."""
        counts = {"vision": 0, "language": 0, "projector": 0, "rest_of_vision": 0, "rest_of_language": 0}
        for name, slot in checkpoint_map(config).items():
            place = slot.parameter
            if place is None:
                continue
            linear = is_linear(name, slot)
            if place.startswith("projector."):
                part = "projector"
            elif place.startswith("language_model."):
                part = "language" if linear and place.startswith(LANGUAGE) else "rest_of_language"
            else:
                part = "vision" if linear and place.startswith((*VISION, *LANGUAGE)) else "rest_of_vision"
            counts[part] += prod(slot.shape)
        return cls(config, head=config.llm.vocab_size * config.llm.hidden_size, **counts)

    def vision_gb(self, quantization: QuantizationConfig) -> float:
        """Weights of the vision half and of the projector, which runs where it does."""
        return (self.vision * BITS[quantization.vision] / 8 + 2 * (self.rest_of_vision + self.projector)) / 1e9

    def language_gb(self, quantization: QuantizationConfig) -> float:
        """Weights of the language half."""
        return (self.language * BITS[quantization.llm] / 8 + 2 * self.rest_of_language) / 1e9

    @property
    def tile_positions(self) -> int:
        """Of a tile in the vision half: its patches and the class token."""
        return (self.config.tile_size // self.config.vision.patch_size) ** 2 + 1

    @property
    def vision_peak_gb(self) -> float:
        """Activations of the largest graph: the widest product's output, and three rows of the residual stream."""
        vision = self.config.vision
        widest = max(3 * vision.hidden_size, vision.intermediate_size)
        return 2 * LARGEST_GRAPH * self.tile_positions * (widest + 3 * vision.hidden_size) / 1e9


def check_methods(quantization: QuantizationConfig) -> None:
    """Raises `UnsupportedError` for a method whose costs are not known."""
    for method in (quantization.llm, quantization.vision):
        if method not in BITS:
            known = ", ".join(name for name in BITS if name)
            raise UnsupportedError(f"nothing is known of what {method} costs on a GPU; plan one of {known}")
