"""Every architecture that vitrail runs, as a tiny checkpoint with random weights, answering about a picture.

python examples/every_architecture.py

A released checkpoint of any of these is loaded and asked in the same way, by its folder or hub id. The answers here
are noise: what is shown is that the halves, templates and layouts of the models table fit together.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vitrail import runtime

HERE = Path(__file__).parent
NANO = Path(runtime.__file__).parent / "assets" / "nano"

INTERNVIT = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "image_size": 56,
    "patch_size": 14,
}
INTERNVIT_6B = INTERNVIT | {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}
INTERNVIT_300M = INTERNVIT | {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True}
LLM = {
    "vocab_size": 704,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
}
PHI3 = LLM | {
    "original_max_position_embeddings": 512,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
}
CONTROLS = ("<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")


def chat(vision: dict[str, Any], architecture: str, llm: dict[str, Any], template: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "internvl_chat",
        "template": template,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "max_dynamic_patch": 2,
        "vision_config": vision,
        "llm_config": {"architectures": [architecture], "bias": False, **llm},
        **more,
    }


ONE_TILE = {"dynamic_image_size": False, "use_thumbnail": False, "ps_version": "v1"}
LLAVA = {
    **LLM,
    "num_key_value_heads": 4,
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "mm_vision_tower": "towers/intern-vit-56px",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "mlp2x_gelu",
    "image_aspect_ratio": "pad",
    "vision_tower_config": INTERNVIT_6B | {"model_type": "intern_vit_6b"},
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "InternVL-Chat 1.0, Vicuna": LLAVA,
    "InternVL-Chat 1.0, InternLM-7B": LLAVA | {"bias": True},
    "InternVL-Chat-V1-1": chat(INTERNVIT_6B, "LlamaForCausalLM", LLM, "internvl_zh", select_layer=-2, **ONE_TILE),
    "InternVL-Chat-V1-2": chat(INTERNVIT_6B, "LlamaForCausalLM", LLM, "Hermes-2", **ONE_TILE),
    "InternVL-Chat-V1-5": chat(INTERNVIT_6B, "InternLM2ForCausalLM", LLM, "internlm2-chat"),
    "Mini-InternVL-Chat-4B, InternVL2-4B": chat(INTERNVIT_300M, "Phi3ForCausalLM", PHI3, "phi3-chat"),
    "InternVL2-1B": chat(INTERNVIT_300M, "Qwen2ForCausalLM", LLM, "Hermes-2"),
    "InternVL2.5 and 3": chat(INTERNVIT_300M, "Qwen2ForCausalLM", LLM, "internvl2_5"),
    "InternVL3.5": chat(INTERNVIT_300M, "Qwen3ForCausalLM", LLM | {"head_dim": 24}, "internvl2_5"),
}


def write_random_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Configuration, weights, and the bundled model's tokenizer with the control tokens of all templates."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if shape else 1)
        for name, shape in runtime.expected_tensors(config).items()
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(NANO / name, folder)
    added = json.loads((NANO / "added_tokens.json").read_text())
    added |= {token: 640 + index for index, token in enumerate(CONTROLS) if token not in added}
    (folder / "added_tokens.json").write_text(json.dumps(added))


def main() -> None:
    for name, config in CHECKPOINTS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_random_checkpoint(Path(folder), config)
            with runtime.Runtime.from_pretrained(folder, dtype="float32") as rt:
                answer = rt.generate("What is this?", HERE / "sign.png", max_new_tokens=8, ignore_eos=True)
        usage = answer.usage
        print(f"{name}: {usage.image_tokens} visual tokens of {usage.image_tiles} tiles, {len(answer.token_ids)} new")


if __name__ == "__main__":
    main()
