"""A checkpoint folder in transformers' form through `Runtime`: it answers as the official one does."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from vitrail.runtime import Runtime
from vitrail.runtime.weights import checkpoint_tensors

from .tiny_model import picture, write_tiny_model


def test_both_forms_of_a_checkpoint_give_the_same_answer(qwen2_folder: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"template": "internvl2_5", "max_dynamic_patch": 4, "system_message": None}
    official = write_tiny_model(qwen2_folder(), "Qwen2ForCausalLM", **changes)
    native = tmp_path / "native"
    native.mkdir()
    for file in [*official.glob("vocab.json"), *official.glob("merges.txt"), *official.glob("tokenizer_config.json")]:
        shutil.copy(file, native)
    values = json.loads((official / "config.json").read_text())
    vision, text = values["vision_config"], values["llm_config"]
    vision |= {"use_qk_norm": vision.pop("qk_normalization"), "attention_bias": vision.pop("qkv_bias")}
    vision |= {"image_size": [84, 84], "patch_size": [14, 14]}
    config = {"model_type": "internvl", "vision_config": vision, "text_config": text | {"model_type": "qwen2"}}
    (native / "config.json").write_text(json.dumps(config))
    processor = {"size": {"height": 84, "width": 84}, "max_patches": 4}
    (native / "preprocessor_config.json").write_text(json.dumps(processor))

    with Runtime.from_pretrained(official, dtype="float32", device="cpu") as runtime:
        model = runtime.model
        expected = runtime.generate("What is the total?", picture(200, 100), max_new_tokens=6, ignore_eos=True)
        official_config, model.config = model.config, replace(model.config, layout="transformers")
        save_file(dict(checkpoint_tensors(model)), native / "model.safetensors")
        model.config = official_config
    with Runtime.from_pretrained(native, dtype="float32", device="cpu") as runtime:
        found = runtime.generate("What is the total?", picture(200, 100), max_new_tokens=6, ignore_eos=True)
    assert found.prompt_token_ids == expected.prompt_token_ids
    assert found.num_tiles == expected.num_tiles == [3]
    assert found.token_ids == expected.token_ids
