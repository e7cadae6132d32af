"""What is exported: the runtime's modules, each behind the inputs and outputs of a file of its own.

They are built without memory. A graph holds numbers for the weights under the names that the model's parameters have.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.rope import apply_rope, rotary_table
from ..runtime.backends.manifest import TensorSpec
from ..runtime.config import ContrastiveConfig, InternVLConfig, ModelConfig
from ..runtime.errors import UnsupportedError
from ..runtime.layers.rotary import inverse_frequencies
from ..runtime.models.contrastive import ContrastiveModel, Mode
from ..runtime.models.decoder import Attention, Layer
from ..runtime.models.internvl import InternVLModel
from ..runtime.weights import Model, make_model

# The largest batch of the decoder and of contrastive parts that is promised to runtimes which plan for one.
MAX_BATCH = 64
MAX_TILES = 40  # the most tiles that the released models were trained and measured with
PREFIX = "model."  # of the names that parameters have in the modules below


class VisionPart(nn.Module):
    """uint8 tiles to visual tokens: normalisation, ViT, pixel shuffle and projector."""

    def __init__(self, model: InternVLModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tiles: Tensor) -> Tensor:
        return self.model.encode_tiles(tiles)


class ContrastivePart(nn.Module):
    """uint8 tiles to raw embeddings of one mode."""

    def __init__(self, model: ContrastiveModel, mode: Mode) -> None:
        super().__init__()
        self.model = model
        self.mode = mode

    def forward(self, tiles: Tensor) -> Tensor:
        return self.model.embed_images(tiles, self.mode)


class TextPart(nn.Module):
    """Token ids to raw embeddings of texts; `last` is the place of the token that stands for its text."""

    def __init__(self, model: ContrastiveModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor, last: Tensor) -> Tensor:
        # `embed_texts`, whose len() of a tensor would be a constant of the graph.
        qllama = self.model.qllama
        hidden = qllama(qllama.embed(input_ids), position_ids)
        index = last[:, None, None].expand(-1, 1, hidden.shape[2])
        return (hidden.gather(1, index)[:, 0] @ self.model.text_projection).float()


class ContiguousCache:
    """Keys and values (batch, kv_heads, context, d) of each layer that grow by the tokens of a call.

    mask: (batch, 1, tokens, context), added to scores.
    """

    def __init__(self, past: list[Tensor], mask: Tensor) -> None:
        self.past = past
        self.mask = mask
        self.present: list[Tensor] = []

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.present += [
            torch.cat((self.past[2 * layer], keys), dim=2),
            torch.cat((self.past[2 * layer + 1], values), dim=2),
        ]
        return self.present[-2], self.present[-1]


class ContiguousAttention(Attention):
    """The decoder's attention over a contiguous cache, as ONNX has it, instead of blocks of one."""

    def _paged(self, qkv: Tensor, cos: Tensor, sin: Tensor, kv: Any) -> Tensor:
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        keys, values = kv.append(self.layer, k.transpose(1, 2), v.transpose(1, 2))
        group = self.num_heads // self.num_kv_heads
        if group > 1:
            keys, values = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (keys, values))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=kv.mask)
        return out.transpose(1, 2).flatten(2)


class DecoderPart(nn.Module):
    """One pass of the language half over a batch of sequences: prompts whole or in chunks, or a token of each."""

    inv_freq: Tensor

    def __init__(self, model: InternVLModel, context_id: int) -> None:
        super().__init__()
        self.model = model
        self.context_id = context_id
        self.register_buffer("inv_freq", inverse_frequencies(model.config.llm))

    def forward(
        self,
        input_ids: Tensor,
        visual_tokens: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        decoder = self.model.language_model
        attended, tokens = attention_mask != 0, input_ids.shape[1]
        # Padding may have any id, that of the image's places too, which is LLaMA's <unk> in the first models.
        places = (input_ids == self.context_id) & attended[:, attended.shape[1] - tokens :]
        x = self._splice(decoder.embed(input_ids), places, visual_tokens)
        kv = ContiguousCache(past, self._mask(attended, tokens, x.dtype))
        cos, sin = rotary_table(position_ids, self.inv_freq, decoder.rope_amplitude, x.dtype)
        branch: Any = None
        for layer in decoder.layers:
            x, branch = layer(x, branch, cos, sin, kv)
        last = decoder.norm.after_residual(x[:, -1], branch[:, -1])[1]
        return (decoder.logits(last), *kv.present)

    @staticmethod
    def _splice(embeddings: Tensor, places: Tensor, visual_tokens: Tensor) -> Tensor:
        """Visual tokens, in order, in their places. The row behind them is for all other places, and not looked at."""
        rows = torch.cat((visual_tokens, visual_tokens.new_zeros(1, visual_tokens.shape[1])))
        order = places.flatten().long().cumsum(0).view(places.shape) - 1
        index = torch.where(places, order, visual_tokens.shape[0])
        return torch.where(places[..., None], F.embedding(index, rows), embeddings)

    @staticmethod
    def _mask(attended: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
        """What is added to scores. Finite: a row of padding sees nothing, and its softmax must still be numbers."""
        context = attended.shape[1]
        keys = torch.arange(context, device=attended.device)
        causal = keys[None, :] <= keys[context - tokens :, None]
        visible = causal[None, None] & attended[:, None, None]
        return torch.where(visible, 0.0, torch.finfo(dtype).min / 2).to(dtype)


@dataclass(frozen=True)
class Export:
    """A part as it is traced: the module, what goes in and comes out, and where its named axes end.

    inputs: in the order of the module's arguments, those of a list one after the other; `nested` is how many of the
    last are in a list.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    limits: Mapping[str, int]
    nested: int = 0
    derived: tuple[str, ...] = field(default=())  # axes whose sizes follow from those of others


def parts_of(config: ModelConfig) -> tuple[str, ...]:
    """The parts that a model of this config has."""
    if isinstance(config, InternVLConfig):
        return ("vision", "decoder")
    if isinstance(config, ContrastiveConfig):
        return ("contrastive", "contrastive_g", "text") if config.num_query_tokens else ("contrastive", "text")
    return ()


def chosen_parts(config: ModelConfig, asked: str | None, name: str) -> tuple[str, ...]:
    """The parts to export for `--part`. Raises `UnsupportedError` for one that the model has not."""
    known = parts_of(config)
    if not known:
        raise UnsupportedError(f"{name} is a vision encoder on its own; only chat and contrastive models are exported")
    chosen = tuple(part for part in known if asked is None or part == asked or part == f"{asked}_g")
    if not chosen:
        kind = "chat" if isinstance(config, InternVLConfig) else "contrastive"
        raise UnsupportedError(f"{name} is a {kind} model and has no {asked} part; it has {', '.join(known)}")
    return chosen


# Beginnings of the paths of the parameters that a part holds, and what is excepted.
_OWNED: Mapping[str, tuple[str, ...]] = {
    "vision": ("vision_model.", "projector.", "query_tokens", "qllama."),
    "decoder": ("language_model.",),
    "contrastive": ("vision_model.", "clip_projector."),
    "contrastive_g": (
        "vision_model.",
        "clip_projector.",
        "clip_projector2.",
        "query_tokens",
        "qllama.layers.",
        "qllama.norm.",
    ),
    "text": ("qllama.embedding", "qllama.layers.", "qllama.norm.", "text_projection"),
}


def owns(part: str, path: str) -> bool:
    """Whether a part holds the parameter, or parameters of the module, at a path of the model."""
    return path.startswith(_OWNED[part]) and not (part == "text" and ".cross_attn." in path)


def traced_config(config: ModelConfig) -> ModelConfig:
    """The config with positions of the size of its tiles, to which they are interpolated once, when exported."""
    if isinstance(config, InternVLConfig):
        return replace(config, vision=replace(config.vision, image_size=config.tile_size))
    return config


def build_part(
    name: str, config: ModelConfig, dtype: torch.dtype, context_id: int | None, memory: AbstractContextManager[Any]
) -> Export:
    """The part, for one dtype of weights and activations.

    context_id: of a chat model's image places. memory: where its parameters are, e.g. a `FakeTensorMode`: nowhere.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with memory:
            model = _traceable(make_model(traced_config(config)).requires_grad_(False).eval())
    finally:
        torch.set_default_dtype(before)
    kind = str(dtype).removeprefix("torch.")
    if isinstance(model, InternVLModel):
        if name == "vision":
            return _vision(model, kind)
        assert context_id is not None
        return _decoder(model, kind, context_id)
    assert isinstance(model, ContrastiveModel)
    return _text(model) if name == "text" else _contrastive(model, name)


def _traceable(model: Model) -> Model:
    """The model with attention over a contiguous cache.

    A head that is tied to the embedding stays a weight of its own: a product reads it transposed.
    """
    if isinstance(model, InternVLModel):
        for index, layer in enumerate(model.language_model.layers):
            cast(Layer, layer).attention = ContiguousAttention(model.config.llm, index)
    return model


def _tiles(side: int) -> TensorSpec:
    return TensorSpec("tiles", "uint8", ("tiles", side, side, 3))


def _vision(model: InternVLModel, kind: str) -> Export:
    config = model.config
    tokens = TensorSpec("visual_tokens", kind, ("tiles", config.tokens_per_tile, config.llm.hidden_size))
    return Export("vision", VisionPart(model), (_tiles(config.tile_size),), (tokens,), {"tiles": MAX_TILES})


def _decoder(model: InternVLModel, kind: str, context_id: int) -> Export:
    llm = model.config.llm
    names = [f"{layer}.{part}" for layer in range(llm.num_hidden_layers) for part in ("key", "value")]

    def cache(prefix: str, extent: str) -> tuple[TensorSpec, ...]:
        shape = ("batch", llm.num_key_value_heads, extent, llm.head_dim)
        return tuple(TensorSpec(f"{prefix}.{name}", kind, shape) for name in names)

    return Export(
        "decoder",
        DecoderPart(model, context_id),
        inputs=(
            TensorSpec("input_ids", "int64", ("batch", "tokens")),
            TensorSpec("visual_tokens", kind, ("visual", llm.hidden_size)),
            TensorSpec("position_ids", "int64", ("batch", "tokens")),
            TensorSpec("attention_mask", "int64", ("batch", "context")),
            *cache("past_key_values", "past"),
        ),
        outputs=(TensorSpec("logits", "float32", ("batch", llm.vocab_size)), *cache("present", "context")),
        limits={"batch": MAX_BATCH, "context": exported_length(model.config)},
        nested=len(names),
        derived=("context",),
    )


def exported_length(config: InternVLConfig) -> int:
    """The longest context that an exported decoder is right for: up to it rotary frequencies do not change."""
    scaling = config.llm.rope_scaling
    if scaling is not None and scaling.rope_type == "longrope":
        return scaling.original_max_position_embeddings
    return config.llm.max_position_embeddings


def _contrastive(model: ContrastiveModel, name: str) -> Export:
    config = model.config
    mode: Mode = "g" if name == "contrastive_g" else "c"
    embeddings = TensorSpec("embeddings", "float32", ("tiles", config.embed_dim))
    tiles = _tiles(config.vision.image_size)
    return Export(name, ContrastivePart(model, mode), (tiles,), (embeddings,), {"tiles": MAX_BATCH})


def _text(model: ContrastiveModel) -> Export:
    config = model.config
    return Export(
        "text",
        TextPart(model),
        inputs=(
            TensorSpec("input_ids", "int64", ("batch", "tokens")),
            TensorSpec("position_ids", "int64", ("batch", "tokens")),
            TensorSpec("last", "int64", ("batch",)),
        ),
        outputs=(TensorSpec("embeddings", "float32", ("batch", config.embed_dim)),),
        limits={"batch": MAX_BATCH, "tokens": config.llm.max_position_embeddings},
    )
