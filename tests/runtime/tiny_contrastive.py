"""A whole tiny InternVL-C/G in a folder."""

from pathlib import Path
from typing import Any

from vitrail.runtime.tokenizer import load_tokenizer

from ..random_checkpoints import contrastive_config, random_weights, write_checkpoint


def write_tiny_contrastive(folder: Path, **changes: Any) -> Path:
    """Put `config.json` and random weights beside the tokenizer that `folder` holds; `changes` are for the config."""
    llm = {"vocab_size": load_tokenizer(folder).vocab_size, **changes.pop("llm", {})}
    config = contrastive_config(llm=llm, **changes)
    write_checkpoint(folder, config, random_weights(config))
    return folder
