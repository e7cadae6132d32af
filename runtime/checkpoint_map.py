"""How official checkpoints name and pack their tensors, and where each of them goes.

`checkpoint_map` is the one statement of it: loading, `expected_tensors` and the export of a trained model all read it.
"""

import re
from dataclasses import dataclass, replace
from types import EllipsisType

import torch
from torch import Tensor

from .config import ContrastiveConfig, DecoderConfig, InternVLConfig, LlavaConfig, ModelConfig, VisionConfig

# Before the names of the vision half in LLaVA's form.
TOWER_PREFIX = "model.vision_tower.vision_tower."


@dataclass(frozen=True)
class Slot:
    """Where one checkpoint tensor goes: rows `start..` of a parameter, or nowhere.

    `parameter` None means that the tensor belongs to the checkpoint but not to the part of the model that runs.
    `kv_groups` > 0: the rows are InternLM2's `wqkv`, interleaved by that many KV heads, and become [q | k | v].
    `optional`: a checkpoint may lack it.
    """

    shape: tuple[int, ...]
    parameter: str | None
    start: int = 0
    kv_groups: int = 0
    optional: bool = False

    @property
    def rows(self) -> slice | EllipsisType:
        """The rows of the parameter; all of a scalar."""
        return slice(self.start, self.start + self.shape[0]) if self.shape else ...


def checkpoint_map(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor of an official checkpoint and its place in the model that this config builds."""
    if isinstance(config, ContrastiveConfig):
        return _contrastive_map(config) if config.num_query_tokens else _original_c_map(config)
    if isinstance(config, VisionConfig):
        return _vision_map(config, config.num_hidden_layers)
    if isinstance(config, LlavaConfig):
        return _llava_map(config)
    return _transformers_map(config) if config.layout == "transformers" else _chat_map(config)


def canonical_name(name: str, config: ModelConfig) -> str:
    """The name that `checkpoint_map` has for a tensor.

    The transformers-native form has been written in several spellings; that of its published checkpoints counts.
    """
    if not isinstance(config, InternVLConfig) or config.layout != "transformers":
        return name
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^model\.(?=vision_tower\.|multi_modal_projector\.)", "", name)
    return re.sub(r"(?<=\d)\.attn\.(?=[qk]_norm\.)", ".attention.", name)


def _chat_map(config: InternVLConfig) -> dict[str, Slot]:
    slots = _prefixed("vision_model.", _vision_map(config.vision, config.vision_depth))
    slots |= _prefixed("mlp1.", _projector_map(config, ("0", "1", "3")))
    return slots | _prefixed("language_model.", _decoder_map(config.llm))


def _transformers_map(config: InternVLConfig) -> dict[str, Slot]:
    slots: dict[str, Slot] = {}
    for name, slot in _vision_map(config.vision, config.vision_depth).items():
        layer, _, key = name.removeprefix("encoder.layers.").partition(".")
        if name in _TRANSFORMERS_EMBEDDINGS:
            slots[f"vision_tower.embeddings.{_TRANSFORMERS_EMBEDDINGS[name]}"] = slot
        elif key.startswith("attn.qkv."):
            kind = key.removeprefix("attn.qkv.")
            rows = config.vision.hidden_size
            for index, part in enumerate("qkv"):
                third = replace(slot, shape=(rows, *slot.shape[1:]), start=index * rows)
                slots[f"vision_tower.encoder.layer.{layer}.attention.{part}_proj.{kind}"] = third
        else:
            for official, native in _TRANSFORMERS_BLOCK.items():
                key = re.sub(rf"^{official}\b", native, key)
            slots[f"vision_tower.encoder.layer.{layer}.{key}"] = slot
    slots |= _prefixed("multi_modal_projector.", _projector_map(config, ("layer_norm", "linear_1", "linear_2")))
    return slots | _prefixed("language_model.", _decoder_map(config.llm))


_TRANSFORMERS_EMBEDDINGS = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "position_embeddings",
    "embeddings.patch_embedding.weight": "patch_embeddings.projection.weight",
    "embeddings.patch_embedding.bias": "patch_embeddings.projection.bias",
}
_TRANSFORMERS_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
}


def _projector_map(config: InternVLConfig, names: tuple[str, str, str]) -> dict[str, Slot]:
    """Tensors of the projector, its norm and two linear layers under the names that a form gives them."""
    shuffled, hidden = config.shuffle_factor**2 * config.vision.hidden_size, config.llm.hidden_size
    norm, first, second = names
    return {
        f"{norm}.weight": Slot((shuffled,), "projector.norm.weight"),
        f"{norm}.bias": Slot((shuffled,), "projector.norm.bias"),
        f"{first}.weight": Slot((hidden, shuffled), "projector.linear_1.weight"),
        f"{first}.bias": Slot((hidden,), "projector.linear_1.bias"),
        f"{second}.weight": Slot((hidden, hidden), "projector.linear_2.weight"),
        f"{second}.bias": Slot((hidden,), "projector.linear_2.bias"),
    }


def _llava_map(config: LlavaConfig) -> dict[str, Slot]:
    hidden, vision_hidden = config.llm.hidden_size, config.vision.hidden_size
    vision = _vision_map(config.vision, config.vision_depth)
    if config.contrastive is None:
        slots = _prefixed(TOWER_PREFIX, vision)
        slots |= _mlp_map("model.mm_projector", "projector.mlp", vision_hidden, hidden, config)
    else:
        slots = _prefixed(f"{TOWER_PREFIX}vision_model.", vision)
        for name, slot in _contrastive_map(config.contrastive).items():
            if name.startswith(("qllama.model.layers.", "qllama.model.norm.", "query_tokens")):
                slots[TOWER_PREFIX + name] = slot
            elif not name.startswith("vision_model."):  # what reads and compares texts
                slots[TOWER_PREFIX + name] = replace(slot, parameter=None, optional=True)
        query_hidden = config.contrastive.llm.hidden_size
        slots |= _mlp_map("model.mm_projector.mlp1", "projector.mlp", vision_hidden, hidden, config)
        slots |= _mlp_map("model.mm_projector.mlp2", "projector.query_mlp", query_hidden, hidden, config)
    return slots | _decoder_map(config.llm)


def _mlp_map(source: str, target: str, in_features: int, out_features: int, config: LlavaConfig) -> dict[str, Slot]:
    """Tensors of LLaVA's projector: layers are numbered together with the activations between them."""
    if config.projector_depth == 1 and not config.projector_norm:
        return _linear_map(source, f"{target}.layers.0", in_features, out_features)
    slots: dict[str, Slot] = {}
    if config.projector_norm:
        slots = {f"{source}.0.{kind}": Slot((in_features,), f"{target}.norm.{kind}") for kind in ("weight", "bias")}
    for layer in range(config.projector_depth):
        number = 2 * layer + config.projector_norm
        slots |= _linear_map(f"{source}.{number}", f"{target}.layers.{layer}", in_features, out_features)
        in_features = out_features
    return slots


def _linear_map(source: str, target: str, in_features: int, out_features: int) -> dict[str, Slot]:
    return {
        f"{source}.weight": Slot((out_features, in_features), f"{target}.weight"),
        f"{source}.bias": Slot((out_features,), f"{target}.bias"),
    }


def _prefixed(prefix: str, slots: dict[str, Slot]) -> dict[str, Slot]:
    return {prefix + name: slot for name, slot in slots.items()}


def _contrastive_map(config: ContrastiveConfig) -> dict[str, Slot]:
    hidden, vision_hidden = config.llm.hidden_size, config.vision.hidden_size
    slots = _prefixed("vision_model.", _vision_map(config.vision, config.vision.num_hidden_layers))
    slots |= _prefixed("qllama.", _decoder_map(config.llm, "qllama"))
    for layer in filter(config.has_cross_attention, range(config.llm.num_hidden_layers)):
        source, target = f"qllama.model.layers.{layer}.cross_attn", f"qllama.layers.{layer}.cross_attn"
        slots |= {
            f"{source}.norm1.weight": Slot((hidden,), f"{target}.norm1.weight"),
            f"{source}.norm2.weight": Slot((vision_hidden,), f"{target}.norm2.weight"),
            f"{source}.q_proj.weight": Slot((hidden, hidden), f"{target}.q.weight"),
            f"{source}.k_proj.weight": Slot((hidden, vision_hidden), f"{target}.kv.weight"),
            f"{source}.v_proj.weight": Slot((hidden, vision_hidden), f"{target}.kv.weight", start=hidden),
            f"{source}.o_proj.weight": Slot((hidden, hidden), f"{target}.o.weight"),
        }
    slots |= _pool_map("clip_projector", vision_hidden, config.embed_dim)
    slots |= _pool_map("clip_projector2", hidden, config.embed_dim)
    slots["query_tokens"] = Slot((1, config.num_query_tokens, hidden), "query_tokens")
    return slots | {
        **_score_map(config),
        "itm_head.weight": Slot((2, hidden), "itm_head.weight"),
        "itm_head.bias": Slot((2,), "itm_head.bias"),
    }


def _original_c_map(config: ContrastiveConfig) -> dict[str, Slot]:
    """The tensors of InternVL-C's original file: a timm-like ViT and a bare LLaMA."""
    slots: dict[str, Slot] = {}
    for name, slot in _vision_map(config.vision, config.vision.num_hidden_layers).items():
        name = re.sub(r"^encoder\.layers\.", "blocks.", re.sub(r"\.ls([12])$", r".ls\1.gamma", name))
        slots[_TIMM_EMBEDDINGS.get(name, name)] = slot
    for name, slot in _decoder_map(config.llm, "qllama").items():
        if not name.startswith("lm_head."):
            slots[f"transformer.{name.removeprefix('model.')}"] = slot
    return slots | _pool_map("clip_projector", config.vision.hidden_size, config.embed_dim) | _score_map(config)


_TIMM_EMBEDDINGS = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
}


def _score_map(config: ContrastiveConfig) -> dict[str, Slot]:
    return {
        "text_projection": Slot((config.llm.hidden_size, config.embed_dim), "text_projection"),
        "logit_scale": Slot((), "logit_scale"),
    }


def _pool_map(prefix: str, size: int, embed_dim: int) -> dict[str, Slot]:
    """Tensors of an attention pool. The bias of its keys falls out of its softmax, so that it has no place."""
    slots = {
        f"{prefix}.norm1_{part}.{kind}": Slot((size,), f"{prefix}.norm_{part}.{kind}")
        for part in ("q", "k", "v")
        for kind in ("weight", "bias")
    }
    attention = f"{prefix}.cross_attn"
    return slots | {
        f"{attention}.q.weight": Slot((size, size), f"{prefix}.q.weight"),
        f"{attention}.k.weight": Slot((size, size), f"{prefix}.k"),
        f"{attention}.v.weight": Slot((size, size), f"{prefix}.v"),
        f"{attention}.q_bias": Slot((size,), f"{prefix}.q.bias"),
        f"{attention}.k_bias": Slot((size,), None),
        f"{attention}.v_bias": Slot((size,), f"{prefix}.v_bias"),
        f"{attention}.proj.weight": Slot((embed_dim, size), f"{prefix}.proj.weight"),
        f"{attention}.proj.bias": Slot((embed_dim,), f"{prefix}.proj.bias"),
    }


def _vision_map(config: VisionConfig, depth: int) -> dict[str, Slot]:
    """Tensors of the ViT; blocks beyond `depth` are known but have no place in the model."""
    hidden, wide = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, hidden),
        "embeddings.patch_embedding.weight": (hidden, 3, config.patch_size, config.patch_size),
        "embeddings.patch_embedding.bias": (hidden,),
        "embeddings.position_embedding": (1, 1 + config.grid_size**2, hidden),
    }
    block: dict[str, tuple[int, ...]] = {"norm1.weight": (hidden,), "norm2.weight": (hidden,)}
    if config.norm_type == "layer_norm":
        block |= {"norm1.bias": (hidden,), "norm2.bias": (hidden,)}
    block["attn.qkv.weight"] = (3 * hidden, hidden)
    if config.qkv_bias:
        block["attn.qkv.bias"] = (3 * hidden,)
    if config.qk_normalization:
        block |= {"attn.q_norm.weight": (hidden,), "attn.k_norm.weight": (hidden,)}
    block |= {
        "attn.proj.weight": (hidden, hidden),
        "attn.proj.bias": (hidden,),
        "mlp.fc1.weight": (wide, hidden),
        "mlp.fc1.bias": (wide,),
        "mlp.fc2.weight": (hidden, wide),
        "mlp.fc2.bias": (hidden,),
        "ls1": (hidden,),
        "ls2": (hidden,),
    }
    slots = {name: Slot(shape, f"vision_model.{name}") for name, shape in shapes.items()}
    for layer in range(config.num_hidden_layers):
        for key, shape in block.items():
            name = f"encoder.layers.{layer}.{key}"
            slots[name] = Slot(shape, f"vision_model.{name}" if layer < depth else None)
    return slots


def _decoder_map(config: DecoderConfig, target: str = "language_model") -> dict[str, Slot]:
    """Tensors of a language model, without their prefix; their places are below the module `target`."""
    hidden, wide = config.hidden_size, config.intermediate_size
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    qkv_rows = q_rows + 2 * kv_rows

    def projection(
        key: str, rows: int, columns: int, part: str, bias: bool, start: int = 0, kv_groups: int = 0
    ) -> dict[str, Slot]:
        slots = {f"{key}.weight": Slot((rows, columns), f"{part}.weight", start, kv_groups)}
        if bias:
            slots[f"{key}.bias"] = Slot((rows,), f"{part}.bias", start, kv_groups)
        return slots

    def separate_qkv(prefix: str) -> dict[str, Slot]:
        slots: dict[str, Slot] = {}
        start = 0
        for key, rows in (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
            slots |= projection(f"{prefix}.{key}", rows, hidden, "attention.qkv", config.qkv_bias, start=start)
            start += rows
        return slots

    layer: dict[str, Slot] = {}
    if config.architecture == "InternLM2ForCausalLM":
        top = ("model.tok_embeddings.weight", "model.norm.weight", "output.weight")
        norms = ("attention_norm", "ffn_norm")
        groups = config.num_key_value_heads
        layer |= projection("attention.wqkv", qkv_rows, hidden, "attention.qkv", config.qkv_bias, kv_groups=groups)
        layer |= projection("attention.wo", hidden, q_rows, "attention.o", config.output_bias)
        gate, up, down = "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"
    else:
        top = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
        norms = ("input_layernorm", "post_attention_layernorm")
        if config.architecture == "Phi3ForCausalLM":
            layer |= projection("self_attn.qkv_proj", qkv_rows, hidden, "attention.qkv", config.qkv_bias)
        else:
            layer |= separate_qkv("self_attn")
        if config.qk_norm:
            for key in ("q_norm", "k_norm"):
                layer[f"self_attn.{key}.weight"] = Slot((config.head_dim,), f"attention.{key}.weight")
        layer |= projection("self_attn.o_proj", hidden, q_rows, "attention.o", config.output_bias)
        gate, up, down = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    if config.architecture == "Phi3ForCausalLM":
        layer |= projection("mlp.gate_up_proj", 2 * wide, hidden, "mlp.gate_up", False)
    else:
        layer |= projection(gate, wide, hidden, "mlp.gate_up", False)
        layer |= projection(up, wide, hidden, "mlp.gate_up", False, start=wide)
    layer |= projection(down, hidden, wide, "mlp.down", False)
    layer[f"{norms[0]}.weight"] = Slot((hidden,), "attention_norm.weight")
    layer[f"{norms[1]}.weight"] = Slot((hidden,), "mlp_norm.weight")

    vocabulary = (config.vocab_size, hidden)
    slots = {
        top[0]: Slot(vocabulary, f"{target}.embedding"),
        top[1]: Slot((hidden,), f"{target}.norm.weight"),
        top[2]: Slot(vocabulary, f"{target}.head.weight", optional=config.tie_word_embeddings),
    }
    for index in range(config.num_hidden_layers):
        for key, slot in layer.items():
            place = f"{target}.layers.{index}.{slot.parameter}"
            slots[f"model.layers.{index}.{key}"] = Slot(slot.shape, place, slot.start, slot.kv_groups)
    return slots


def pack_order(rows: int, kv_groups: int, config: DecoderConfig) -> Tensor:
    """(rows,) int64: which row of InternLM2's `wqkv` each row of [q | k | v] is.

    The file holds one group per KV head: its query heads, then its key head, then its value head.
    """
    group = config.queries_per_kv_head
    packed = torch.arange(rows).view(kv_groups, group + 2, config.head_dim)
    q, k, v = packed[:, :group], packed[:, group], packed[:, group + 1]
    return torch.cat((q.flatten(), k.flatten(), v.flatten()))
