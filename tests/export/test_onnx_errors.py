"""What cannot be exported is refused by name, and leaves nothing behind that would load."""

import dataclasses
import errno
import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vitrail.export import folder as folder_module
from vitrail.export import onnx as exporter
from vitrail.export.onnx import Options, export_onnx
from vitrail.export.parts import Export
from vitrail.export.trace import trace
from vitrail.runtime.backends.manifest import TensorSpec
from vitrail.runtime.errors import CheckpointError, ConfigError, InvalidRequestError, UnsupportedError, VitrailError
from vitrail.runtime.weights import NANO

from ..random_checkpoints import chat_config, contrastive_config
from ..runtime.command_line import vitrail
from .exported import QUIET, TINY, write_int4, write_quantised, write_tiny


@pytest.mark.parametrize(
    ("options", "kind", "complaint"),
    [
        ({"part": "text"}, UnsupportedError, "nano is a chat model and has no text part; it has vision, decoder"),
        ({"part": "everything"}, UnsupportedError, "has no everything part"),
        ({"dtype": "int8"}, ConfigError, "dtype 'int8' is not known; known: float32, float16, bfloat16"),
        ({"quantization": "fp8"}, ConfigError, "quantization 'fp8' is not exported; known: int8, int4"),
        ({"quantization": "int4", "part": "vision"}, UnsupportedError, "vision: int4 is for the language half"),
        ({"quantization": "int4", "group_size": 96}, ConfigError, "groups of 96 do not divide its 256 inputs"),
        ({"quantization": "int8", "part": "vision"}, UnsupportedError, "int8 needs calibration prompts"),
    ],
)
def test_what_a_model_does_not_have_is_refused(
    tmp_path: Path, options: dict[str, Any], kind: type[VitrailError], complaint: str
) -> None:
    with pytest.raises(kind, match=complaint):
        export_onnx("nano", tmp_path / "out", Options(**options, progress=False))
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_a_contrastive_model_is_refused_for_a_chat_model_and_the_other_way_round(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", contrastive_config(llm={"vocab_size": 640}))
    with pytest.raises(UnsupportedError, match="is a contrastive model and has no decoder part"):
        export_onnx(source, tmp_path / "out", Options(part="decoder"))


def test_a_vision_encoder_on_its_own_is_refused(tmp_path: Path) -> None:
    vision = chat_config()["vision_config"] | {"model_type": "intern_vit_6b"}
    (tmp_path / "config.json").write_text(json.dumps(vision))
    with pytest.raises(UnsupportedError, match="is a vision encoder on its own"):
        export_onnx(tmp_path, tmp_path / "out", QUIET)


@pytest.mark.parametrize("target", [".", ""])
def test_a_folder_that_exists_is_not_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, target):
        with pytest.raises(InvalidRequestError, match="exists already"):
            export_onnx("nano", folder, QUIET)


def test_what_a_killed_export_left_is_not_mixed_with_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(InvalidRequestError, match=r"out.partial: is left of an export that was killed"):
        export_onnx("nano", tmp_path / "out", QUIET)


def test_a_target_that_cannot_be_written_is_said_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ran = vitrail("export", "onnx", "nano", tmp_path / "file" / "out", "--no-progress")
    assert ran.status == 2
    assert ran.err.startswith("vitrail: ")
    assert ran.err.count("\n") == 1


def test_a_disk_with_too_little_room_is_noticed_before_anything_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    monkeypatch.setattr(exporter, "build_part", None)
    with pytest.raises(InvalidRequestError, match=r"0.0 GiB of weights are to be written, 0.0 GiB are free"):
        export_onnx("nano", tmp_path / "out", QUIET)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitrail.export import writer

    written, source = 0, tmp_path / "source"

    def fill_up(file: Any, data: Any) -> None:
        nonlocal written
        written += len(data) if isinstance(data, bytes) else data.nbytes
        if written > 10**5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.WeightFile, "_write", fill_up)
    with pytest.raises(InvalidRequestError, match=r"cannot be written \(No space left on device\)"):
        export_onnx(write_tiny(source, TINY), tmp_path / "out", dataclasses.replace(QUIET, part="vision"))
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnsupportedError, match=rf"needs the package {package}: pip install vitrail\[export\]"):
        export_onnx("nano", tmp_path / "out", QUIET)


class Eigenvalues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvalsh(x)


def test_an_operation_without_an_onnx_form_is_named_with_the_module_that_made_it() -> None:
    spec = TensorSpec("x", "float32", (4, 4))
    module = nn.Sequential(nn.Identity(), nn.Sequential(Eigenvalues()))
    part = Export("vision", module, (spec,), (TensorSpec("y", "float32", (4,)),), {})
    with pytest.raises(UnsupportedError, match=r"vision: aten\._linalg_eigh, which 1\.0 computes with, has no form"):
        trace(lambda _: part)


def test_a_graph_that_reads_nothing_of_a_parameter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that drops weights silently is worse than one that fails."""
    from vitrail.runtime.models.internvl import Projector

    source = tmp_path / "source"
    few = lambda self, patches: self.linear_2(patches[:, :9, :1].expand(-1, -1, 64))  # noqa: E731
    monkeypatch.setattr(Projector, "forward", few)
    with pytest.raises(CheckpointError, match=r"vision: the graph reads nothing of \d+ parameters, first projector"):
        export_onnx(write_tiny(source, TINY), tmp_path / "out", dataclasses.replace(QUIET, part="vision"))
    assert list(tmp_path.iterdir()) == [source]


def test_a_checkpoint_that_lacks_a_tensor_is_refused_before_anything_is_traced(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(NANO, tmp_path / "source"))
    weights = load_file(source / "model.safetensors")
    del weights["mlp1.1.bias"]
    save_file(weights, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors missing: mlp1\.1\.bias"):
        export_onnx(source, tmp_path / "out", QUIET)


def test_a_quantised_checkpoint_is_not_quantised_once_more(tmp_path: Path) -> None:
    write_int4(tmp_path / "source")
    with pytest.raises(ConfigError, match="is quantised already; export it as it is"):
        export_onnx(tmp_path / "source", tmp_path / "out", Options(quantization="int4", progress=False))


@pytest.mark.parametrize(("name", "method"), [("fp8", "fp8"), ("bitsandbytes nf4", "nf4")])
def test_weights_in_codes_that_onnx_has_not_are_refused_before_anything_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    monkeypatch.setattr(exporter, "build_part", None)
    write_quantised(tmp_path / "source", name)
    with pytest.raises(UnsupportedError, match=rf"language_model.* is {method}, which is not exported; int8"):
        export_onnx(tmp_path / "source", tmp_path / "out", QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
