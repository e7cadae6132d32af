"""The language model's entries, whose names all forms share: they are those of its own `config.json`."""

from math import log, sqrt

from ..errors import ConfigError
from ..model_config import DecoderConfig, RopeScaling
from .section import Section


def parse_decoder(section: Section, architecture: str) -> DecoderConfig:
    """The language model that a section describes, of an architecture that the form tells."""
    name = section.name
    section.choice("hidden_act", ("silu",), "silu")
    if section.flag("mlp_bias", False):
        raise ConfigError(f"{name}: `mlp_bias` true is not supported")
    if section.number("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{name}: `partial_rotary_factor` other than 1 is not supported")

    heads = section.size("num_attention_heads")
    hidden_size = section.size("hidden_size")
    if section.values.get("head_dim") is None and hidden_size % heads:
        raise ConfigError(f"{name}: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
    head_dim = section.size("head_dim", hidden_size // heads)
    max_positions = section.size("max_position_embeddings")
    sliding_window = section.values.get("sliding_window")
    # Within its window a sliding-window model is an ordinary one, so the window only caps the context.
    windowed = section.flag("use_sliding_window", architecture == "Phi3ForCausalLM") and sliding_window
    scaling = _rope_scaling(section, max_positions, head_dim)
    rope = Section(section.values.get("rope_parameters") or {}, f"{name}.rope_parameters")
    if architecture == "InternLM2ForCausalLM" or architecture == "InternLMForCausalLM":
        qkv_bias = output_bias = section.flag("bias", True)
    elif architecture == "Qwen2ForCausalLM":
        qkv_bias, output_bias = True, False
    else:
        qkv_bias = output_bias = section.flag("attention_bias", False)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=section.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=section.size("intermediate_size"),
        num_hidden_layers=section.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=section.size("num_key_value_heads", heads),
        head_dim=head_dim,
        rms_norm_eps=section.number("rms_norm_eps"),
        rope_theta=section.number("rope_theta", rope.number("rope_theta", 10000.0)),
        rope_scaling=scaling,
        max_position_embeddings=min(max_positions, section.size("sliding_window")) if windowed else max_positions,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=architecture == "Qwen3ForCausalLM",
        tie_word_embeddings=section.flag("tie_word_embeddings", False),
    )


def _rope_scaling(section: Section, max_position_embeddings: int, head_dim: int) -> RopeScaling | None:
    raw = section.values.get("rope_scaling")
    if raw is None:
        raw = section.values.get("rope_parameters")  # transformers' name for it, with the base inside
    if raw is None:
        return None
    scaling = Section(raw, f"{section.name}.rope_scaling")
    kind = scaling.text("rope_type" if "rope_type" in scaling.values else "type")
    if kind == "default":
        return None
    if kind in ("linear", "dynamic"):
        return RopeScaling(rope_type="linear" if kind == "linear" else "dynamic", factor=scaling.number("factor"))
    if kind in ("longrope", "su"):
        original = section.size("original_max_position_embeddings")
        if original == 1:
            raise ConfigError(f"{section.name}: `original_max_position_embeddings` must be above 1")
        return RopeScaling(
            rope_type="longrope",
            factor=max_position_embeddings / original,
            short_factor=scaling.numbers("short_factor", head_dim // 2),
            long_factor=scaling.numbers("long_factor", head_dim // 2),
            original_max_position_embeddings=original,
            attention_factor=_longrope_attention_factor(max_position_embeddings / original, original),
        )
    raise ConfigError(f"{scaling.name}: unknown type {kind!r}; known: linear, dynamic, longrope, su")


def _longrope_attention_factor(scale: float, original_length: int) -> float:
    """sqrt(1 + ln(scale) / ln(original length)), Phi-3's scaling of cos and sin; 1 where nothing is stretched."""
    return sqrt(1 + log(scale) / log(original_length)) if scale > 1 else 1.0
