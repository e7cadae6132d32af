"""Every dense checkpoint of InternVL2, 2.5, 3 and 3.5 by what its `config.json` says, and those of V1.1 and V1.2."""

from typing import Any

from .official_configs import (
    INTERNLM2_2B,
    INTERNLM2_20B,
    INTERNVIT_6B,
    INTERNVIT_300M,
    PHI3_MINI_128K,
    QWEN2_0_5B,
    QWEN3_8B,
    YI_34B,
    chat,
)

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _sized(base: dict[str, Any], *sizes: int, **changes: Any) -> dict[str, Any]:
    return base | dict(zip(_SIZES, sizes, strict=True)) | changes


INTERNLM2_7B = _sized(INTERNLM2_20B, 4096, 14336, 32, 32, 8)
LLAMA2_13B = _sized(YI_34B, 5120, 13824, 40, 40, 40, rope_theta=10000.0, vocab_size=41969)
LLAMA3_70B = _sized(YI_34B, 8192, 28672, 80, 64, 8, rope_theta=500000.0, vocab_size=128265)
QWEN2_5 = QWEN2_0_5B | {"vocab_size": 151674}
QWEN2_5_1_5B = _sized(QWEN2_5, 1536, 8960, 28, 12, 2)
QWEN2_5_3B = _sized(QWEN2_5, 2048, 11008, 36, 16, 2)
QWEN2_5_7B = _sized(QWEN2_5, 3584, 18944, 28, 28, 4)
QWEN2_5_14B = _sized(QWEN2_5, 5120, 13824, 48, 40, 8)
QWEN2_5_32B = _sized(QWEN2_5, 5120, 27648, 64, 40, 8)
QWEN2_5_72B = _sized(QWEN2_5, 8192, 29568, 80, 64, 8)
QWEN3_0_6B = _sized(QWEN3_8B, 1024, 3072, 28, 16, 8)
QWEN3_1_7B = _sized(QWEN3_8B, 2048, 6144, 28, 16, 8)
QWEN3_4B = _sized(QWEN3_8B, 2560, 9728, 36, 32, 8)
QWEN3_14B = _sized(QWEN3_8B, 5120, 17408, 40, 40, 8)
QWEN3_32B = _sized(QWEN3_8B, 5120, 25600, 64, 64, 8)

# LLM -> parameters in billions, as published or counted from the published sizes.
BILLIONS: dict[str, tuple[dict[str, Any], float]] = {
    "InternLM2-1.8B": (INTERNLM2_2B, 1.889),
    "InternLM2-7B": (INTERNLM2_7B, 7.738),
    "InternLM2-20B": (INTERNLM2_20B, 19.861),
    "Hermes-2-Yi-34B": (YI_34B, 34.389),
    "Hermes-2-Theta-Llama-3-70B": (LLAMA3_70B, 70.554),
    "LLaMA2-13B": (LLAMA2_13B, 13.118),
    "Qwen2.5-0.5B": (QWEN2_5, 0.630),
    "Qwen2.5-1.5B": (QWEN2_5_1_5B, 1.776),
    "Qwen2.5-3B": (QWEN2_5_3B, 3.396),
    "Qwen2.5-7B": (QWEN2_5_7B, 7.613),
    "Qwen2.5-14B": (QWEN2_5_14B, 14.766),
    "Qwen2.5-32B": (QWEN2_5_32B, 32.760),
    "Qwen2.5-72B": (QWEN2_5_72B, 72.700),
    "Qwen3-0.6B": (QWEN3_0_6B, 0.752),
    "Qwen3-1.7B": (QWEN3_1_7B, 2.032),
    "Qwen3-4B": (QWEN3_4B, 4.411),
    "Qwen3-8B": (QWEN3_8B, 8.191),
    "Qwen3-14B": (QWEN3_14B, 14.768),
    "Qwen3-32B": (QWEN3_32B, 32.762),
}

_SINGLE_TILE = {"dynamic_image_size": False, "use_thumbnail": False, "ps_version": "v1"}
_ZH = {"template": "internvl_zh", "select_layer": -4, **_SINGLE_TILE}
_HERMES, _INTERNLM2, _LATER = ({"template": name} for name in ("Hermes-2", "internlm2-chat", "internvl2_5"))

# Checkpoint -> its config.json, and the ids that end its answers where the ids of its tokenizer are published.
QWEN_STOPS, INTERNLM2_STOPS = frozenset({151645, 151643}), frozenset({92542, 2})
RELEASED: dict[str, tuple[dict[str, Any], frozenset[int] | None]] = {
    "InternVL-Chat-V1-1": (chat(INTERNVIT_6B | {"num_hidden_layers": 48}, LLAMA2_13B, **_ZH), frozenset({2})),
    "InternVL-Chat-V1-2": (chat(INTERNVIT_6B, YI_34B, **_HERMES, **_SINGLE_TILE), None),
    "InternVL-Chat-V1-2-Plus": (chat(INTERNVIT_6B, YI_34B, **_HERMES, **_SINGLE_TILE), None),
    "Mini-InternVL-Chat-2B-V1-5": (chat(INTERNVIT_300M, INTERNLM2_2B), INTERNLM2_STOPS),
    "Mini-InternVL-Chat-4B-V1-5": (chat(INTERNVIT_300M, PHI3_MINI_128K, template="phi3-chat"), None),
    "InternVL-Chat-V1-5": (chat(INTERNVIT_6B, INTERNLM2_20B), INTERNLM2_STOPS),
    "InternVL2-1B": (chat(INTERNVIT_300M, QWEN2_0_5B, **_HERMES), QWEN_STOPS),
    "InternVL2-2B": (chat(INTERNVIT_300M, INTERNLM2_2B, **_INTERNLM2), INTERNLM2_STOPS),
    "InternVL2-4B": (chat(INTERNVIT_300M, PHI3_MINI_128K, template="phi3-chat"), None),
    "InternVL2-8B": (chat(INTERNVIT_300M, INTERNLM2_7B, **_INTERNLM2), INTERNLM2_STOPS),
    "InternVL2-26B": (chat(INTERNVIT_6B, INTERNLM2_20B, **_INTERNLM2), INTERNLM2_STOPS),
    "InternVL2-40B": (chat(INTERNVIT_6B, YI_34B, **_HERMES), None),
    "InternVL2-Llama3-76B": (chat(INTERNVIT_6B, LLAMA3_70B, **_INTERNLM2), None),
    "InternVL2_5-1B": (chat(INTERNVIT_300M, QWEN2_5, **_LATER), QWEN_STOPS),
    "InternVL2_5-2B": (chat(INTERNVIT_300M, INTERNLM2_2B, **_LATER), INTERNLM2_STOPS),
    "InternVL2_5-4B": (chat(INTERNVIT_300M, QWEN2_5_3B, **_LATER), QWEN_STOPS),
    "InternVL2_5-8B": (chat(INTERNVIT_300M, INTERNLM2_7B, **_LATER), INTERNLM2_STOPS),
    "InternVL2_5-26B": (chat(INTERNVIT_6B, INTERNLM2_20B, **_LATER), INTERNLM2_STOPS),
    "InternVL2_5-38B": (chat(INTERNVIT_6B, QWEN2_5_32B, **_LATER), QWEN_STOPS),
    "InternVL2_5-78B": (chat(INTERNVIT_6B, QWEN2_5_72B, **_LATER), QWEN_STOPS),
    "InternVL3-1B": (chat(INTERNVIT_300M, QWEN2_5, **_LATER), QWEN_STOPS),
    "InternVL3-2B": (chat(INTERNVIT_300M, QWEN2_5_1_5B, **_LATER), QWEN_STOPS),
    "InternVL3-8B": (chat(INTERNVIT_300M, QWEN2_5_7B, **_LATER), QWEN_STOPS),
    "InternVL3-14B": (chat(INTERNVIT_300M, QWEN2_5_14B, **_LATER), QWEN_STOPS),
    "InternVL3-38B": (chat(INTERNVIT_6B, QWEN2_5_32B, **_LATER), QWEN_STOPS),
    "InternVL3-78B": (chat(INTERNVIT_6B, QWEN2_5_72B, **_LATER), QWEN_STOPS),
    "InternVL3_5-1B": (chat(INTERNVIT_300M, QWEN3_0_6B, **_LATER), QWEN_STOPS),
    "InternVL3_5-2B": (chat(INTERNVIT_300M, QWEN3_1_7B, **_LATER), QWEN_STOPS),
    "InternVL3_5-4B": (chat(INTERNVIT_300M, QWEN3_4B, **_LATER), QWEN_STOPS),
    "InternVL3_5-8B": (chat(INTERNVIT_300M, QWEN3_8B, **_LATER), QWEN_STOPS),
    "InternVL3_5-14B": (chat(INTERNVIT_300M, QWEN3_14B, **_LATER), QWEN_STOPS),
    "InternVL3_5-38B": (chat(INTERNVIT_6B, QWEN3_32B, **_LATER), QWEN_STOPS),
}

# Not dense, or of a language model that vitrail does not have: the architecture that refuses them by its name.
NOT_RUN: dict[str, str] = {
    "InternVL3-9B": "InternLM3ForCausalLM",
    "InternVL3_5-30B-A3B": "Qwen3MoeForCausalLM",
    "InternVL3_5-241B-A28B": "Qwen3MoeForCausalLM",
    "InternVL3_5-GPT-OSS-20B-A4B": "GptOssForCausalLM",
}
