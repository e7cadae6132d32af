"""How large the inputs of linear layers become on calibration prompts: the scales of int8 activations.

One block of the model is in memory at a time, in fp32, whatever the model's size.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..kernels.residual import scaled_residual
from ..kernels.rope import rotary_table
from ..runtime.config import InternVLConfig, LlavaConfig
from ..runtime.errors import CheckpointError, UnsupportedError
from ..runtime.layers.linear import Linear, LinearGelu, LinearLayer, LinearSwiglu
from ..runtime.layers.rotary import inverse_frequencies
from ..runtime.models.decoder import Layer
from ..runtime.models.intern_vit import Block, Embeddings
from ..runtime.models.internvl import Projector
from ..runtime.quantization.weight import QuantizedWeight
from .checkpoint import Checkpoint

TILES_PER_PASS = 4
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Prompt:
    """A question as the model reads it, its answer behind it: ids, and the tiles (n, tile, tile, 3) of its images."""

    token_ids: Sequence[int]
    tiles: Tensor


@torch.inference_mode()
def input_ranges(
    checkpoint: Checkpoint, prompts: Sequence[Prompt], context_id: int, parts: Collection[str], progress: bool | None
) -> dict[str, float]:
    """Path of a linear layer -> the largest magnitude of its inputs, of the blocks of the parts.

    Inputs are meant as the quantised weight takes them, divided by its own scales where it has such.
    """
    config = checkpoint.config
    if not isinstance(config, InternVLConfig) or isinstance(config, LlavaConfig):
        raise UnsupportedError("int8 is exported of InternVL-Chat models with pixel shuffle only")
    if not prompts:
        raise UnsupportedError("int8 needs calibration prompts, to know how large activations are")
    return _Calibration(checkpoint, config, prompts, context_id, progress).run(parts)


class _Calibration:
    def __init__(
        self,
        checkpoint: Checkpoint,
        config: InternVLConfig,
        prompts: Sequence[Prompt],
        context_id: int,
        progress: bool | None,
    ) -> None:
        self.checkpoint, self.config, self.prompts, self.context_id = checkpoint, config, prompts, context_id
        self.ranges: dict[str, float] = {}
        self.hidden = None if progress is None else not progress

    def run(self, parts: Collection[str]) -> dict[str, float]:
        depth = self.config.vision_depth
        layers = self.config.llm.num_hidden_layers if "decoder" in parts else 0
        with tqdm(total=depth + layers, desc="calibrating", unit="block", disable=self.hidden) as bar:
            visual = self._vision(bar)
            if layers:
                self._decoder(visual, bar)
        for name, largest in self.ranges.items():
            if not 0 < largest < float("inf"):
                raise CheckpointError(f"{name}: its inputs on the calibration prompts reach {largest}")
        return self.ranges

    def _vision(self, bar: "tqdm[None]") -> list[Tensor]:
        """Visual tokens (n * tokens_per_tile, hidden) of each prompt."""
        embeddings = self._filled(lambda: Embeddings(self.config.vision), "vision_model.embeddings")
        stream = [_over_tiles(embeddings, prompt.tiles) for prompt in self.prompts]
        for index in range(self.config.vision_depth):
            block = self._filled(lambda: Block(self.config.vision), path := f"vision_model.encoder.layers.{index}")
            with self._watched(block, path):
                stream = [_over_tiles(lambda x, block=block: _block(block, x), x) for x in stream]  # type: ignore[misc]
            bar.update()
        projector = self._filled(lambda: Projector(self.config), "projector")
        return [_over_tiles(lambda x: projector(x[:, 1:]), x).flatten(0, 1) for x in stream]

    def _decoder(self, visual: list[Tensor], bar: "tqdm[None]") -> None:
        llm = self.config.llm
        embedding = self.checkpoint.dense("language_model.embedding")
        stream = []
        for prompt, tokens in zip(self.prompts, visual, strict=True):
            ids = torch.tensor(prompt.token_ids)
            x = embedding[ids].float()
            x[ids == self.context_id] = tokens
            stream.append(x[None])
        del embedding
        inv_freq = inverse_frequencies(llm)
        amplitude = llm.rope_scaling.attention_factor if llm.rope_scaling is not None else 1.0
        for index in range(llm.num_hidden_layers):
            layer = self._filled(lambda index=index: Layer(llm, index), path := f"language_model.layers.{index}")  # type: ignore[misc]
            with self._watched(layer, path):
                for number, x in enumerate(stream):
                    table = rotary_table(torch.arange(x.shape[1])[None], inv_freq, amplitude, x.dtype)
                    x, branch = layer(x, None, *table, None)
                    stream[number] = x + branch
            bar.update()

    def _filled(self, make: Callable[[], Module], path: str) -> Module:
        with torch.device("meta"):
            module = make().requires_grad_(False).eval()
        self.checkpoint.fill(module, path, torch.float32)
        return module

    @contextmanager
    def _watched(self, block: nn.Module, path: str) -> Iterator[None]:
        handles = []
        for name, module in block.named_modules():
            if isinstance(module, Linear | LinearGelu | LinearSwiglu):
                handles.append(module.register_forward_pre_hook(partial(self._note, f"{path}.{name}")))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, path: str, layer: LinearLayer, inputs: tuple[Tensor, ...]) -> None:
        scales = layer.weight.input_scales if isinstance(layer.weight, QuantizedWeight) else None
        x = inputs[0] if scales is None else inputs[0] / scales
        self.ranges[path] = max(self.ranges.get(path, 0.0), float(x.abs().amax()))


def _block(block: Block, x: Tensor) -> Tensor:
    x, branch = block(x, block.norm1(x))
    return scaled_residual(x, branch, block.ls2)


def _over_tiles(step: Callable[[Tensor], Tensor], tiles: Tensor) -> Tensor:
    """A step of many tiles, a few at a time."""
    return torch.cat([step(part) for part in tiles.split(TILES_PER_PASS)])
