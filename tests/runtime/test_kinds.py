"""A model of the wrong kind is refused by its config: no weight of it is read, nor need be there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vitrail import runtime
from vitrail.runtime.config import parse_any_config
from vitrail.runtime.errors import UnsupportedError
from vitrail.runtime.loaded import require_chat, require_contrastive
from vitrail.runtime.zero_shot import Classification

from ..official_configs import INTERNVIT_6B_224PX, INTERNVL2_1B, INTERNVL_14B_224PX
from .command_line import vitrail

CHAT, CONTRASTIVE, TOWER = INTERNVL2_1B, INTERNVL_14B_224PX, INTERNVIT_6B_224PX


@pytest.fixture
def only_config(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """A checkpoint folder in which the config stands alone."""

    def write(config: dict[str, Any]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


def test_generate_refuses_what_does_not_chat(only_config: Callable[[dict[str, Any]], str]) -> None:
    with pytest.raises(UnsupportedError, match=r"is a contrastive model \(InternVL-C/G\), which has embed"):
        runtime.generate("What is it?", model=only_config(CONTRASTIVE))


@pytest.mark.parametrize("command", [["generate", "What is it?"], ["chat"]], ids=["generate", "chat"])
def test_commands_refuse_what_does_not_chat(command: list[str], only_config: Callable[[dict[str, Any]], str]) -> None:
    ran = vitrail(*command, "--model", only_config(TOWER))
    assert ran.status == 2
    assert "is a vision encoder on its own, which has features; this needs a chat model" in ran.err


def test_commands_refuse_what_does_not_embed(only_config: Callable[[dict[str, Any]], str]) -> None:
    folder = only_config(CHAT)
    (Path(folder) / "image.png").write_bytes(b"unread")
    ran = vitrail("embed", folder, "--out", f"{folder}/out.npz", "--model", folder)
    assert ran.status == 2
    assert f"embed: {folder} is a chat model; only contrastive models (InternVL-C/G) have this" in ran.err


def test_each_kind_has_its_calls() -> None:
    require_chat(parse_any_config(CHAT), "m")
    require_contrastive(parse_any_config(CONTRASTIVE), "m", "embed")
    for config in (CONTRASTIVE, TOWER):
        with pytest.raises(UnsupportedError):
            require_chat(parse_any_config(config), "m")
    for config in (CHAT, TOWER):
        with pytest.raises(UnsupportedError):
            require_contrastive(parse_any_config(config), "m", "embed")


def test_classification_is_a_public_name() -> None:
    assert runtime.Classification is Classification
