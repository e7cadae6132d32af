"""An exported vision half that serves inside the engine."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail.export import onnx as exporter
from vitrail.runtime import Runtime
from vitrail.runtime.backends.onnx_session import OnnxSession
from vitrail.runtime.errors import CheckpointError, ConfigError, InvalidRequestError, UnsupportedError, VitrailError
from vitrail.runtime.weights import NANO

from ..random_checkpoints import chat_config, random_tiles
from .exported import EXAMPLES, write_tiny

QUESTION = ("What is the total?", EXAMPLES / "receipt.png")


@pytest.fixture(scope="module")
def plain() -> Any:
    with Runtime.from_pretrained("nano", dtype="float32", device="cpu") as runtime:
        yield runtime


def with_onnx(engine: Path | None, **options: Any) -> Runtime:
    chosen = {"dtype": "float32", "device": "cpu", "progress": False, **options}
    return Runtime.from_pretrained("nano", vision_backend="onnxruntime", vision_engine=engine, **chosen)


def test_the_session_gives_the_visual_tokens_of_the_models_own_vision_half(nano_onnx: Path, plain: Any) -> None:
    with OnnxSession(nano_onnx) as session:
        session.max_tiles = 2  # so that five take three calls
        tiles = random_tiles(5, 224)
        got = session.encode(tiles)
        torch.testing.assert_close(got, plain.model.encode_tiles(tiles), rtol=1e-4, atol=2e-5)
        again = session.encode(tiles[:1])
        assert torch.equal(got[:1], again)
        assert got.data_ptr() != again.data_ptr()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_answers_with_an_exported_vision_half(nano_onnx: Path, plain: Any, dtype: str) -> None:
    with with_onnx(nano_onnx, dtype=dtype) as runtime:
        outputs = runtime.generate([QUESTION[0]] * 2, [QUESTION[1], EXAMPLES / "sign.png"], max_new_tokens=16)
        assert outputs[0].text == plain.generate(*QUESTION).text == "$25.90"
        tokens = runtime.encode_image(QUESTION[1]).tokens
        assert tokens.dtype == getattr(torch, dtype)
        assert runtime.stats()
    with pytest.raises(InvalidRequestError, match="closed"):
        runtime.generate(*QUESTION)


def test_the_models_own_vision_half_is_not_kept_in_memory(nano_onnx: Path, plain: Any) -> None:
    with with_onnx(nano_onnx) as runtime:
        names = {name.split(".")[0] for name, _ in runtime.model.named_parameters()}
        assert names == {"language_model"}


def test_hidden_states_are_refused_with_the_way_to_have_them(nano_onnx: Path) -> None:
    with (
        with_onnx(nano_onnx) as runtime,
        pytest.raises(UnsupportedError, match="has no hidden states; load with vision_backend='torch'"),
    ):
        runtime.features(QUESTION[1])


def test_without_a_file_the_vision_half_is_exported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with with_onnx(None) as runtime:
        assert runtime.generate(*QUESTION).text == "$25.90"
    (folder,) = (tmp_path / "vitrail" / "onnx").iterdir()
    assert (folder / "vision.onnx").is_file()
    assert not (folder / "decoder.onnx").exists()
    monkeypatch.setattr(exporter, "build_part", None)
    with_onnx(None).close()


@pytest.mark.parametrize(
    ("options", "kind", "complaint"),
    [
        ({"vision_backend": "onnx"}, ConfigError, "'onnx' is not known; known: torch, onnxruntime, tensorrt"),
        ({"vision_engine": "x"}, ConfigError, "vision_engine goes with vision_backend"),
        ({"vision_backend": "tensorrt"}, ConfigError, "needs vision_engine, a file that `vitrail export tensorrt`"),
        (
            {"vision_backend": "onnxruntime", "vision_quantization": "int8"},
            ConfigError,
            "an exported vision half has what it was given",
        ),
        ({"vision_backend": "onnxruntime", "vision_engine": "nowhere"}, CheckpointError, "is no exported folder"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: dict[str, Any], kind: type[VitrailError], complaint: str
) -> None:
    with pytest.raises(kind, match=complaint):
        Runtime.from_pretrained("nano", device="cpu", **options)


def test_the_vision_half_of_another_model_is_refused(nano_onnx: Path, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", chat_config(llm={"vocab_size": 640}, max_dynamic_patch=1))
    with pytest.raises(ConfigError, match=r"vision_engine has tiles of 224, .* 84: it was exported from another model"):
        Runtime.from_pretrained(source, device="cpu", vision_backend="onnxruntime", vision_engine=nano_onnx)


@pytest.mark.parametrize(
    "tiles",
    [torch.zeros(1, 224, 224, 3), torch.zeros(1, 448, 448, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8)],
)
def test_what_is_no_batch_of_tiles_is_refused_with_its_shape(nano_onnx: Path, tiles: torch.Tensor) -> None:
    with OnnxSession(nano_onnx) as session, pytest.raises(InvalidRequestError, match=r"takes uint8 tiles \(n, 224"):
        session.encode(tiles)


def test_a_closed_session_says_so(nano_onnx: Path) -> None:
    session = OnnxSession(nano_onnx)
    session.close()
    with pytest.raises(InvalidRequestError, match="closed"):
        session.encode(random_tiles(1, 224))


def test_a_folder_without_a_vision_half_is_refused(nano_onnx: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano_onnx, tmp_path / "copy"))
    text = (folder / "manifest.json").read_text().replace('"vision": {', '"other": {')
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="holds no vision part, only other, decoder"):
        OnnxSession(folder)


def test_without_onnxruntime_the_extra_is_named(nano_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnsupportedError, match=r"needs the package onnxruntime: pip install vitrail\[export\]"):
        OnnxSession(nano_onnx)


def test_a_device_that_this_onnxruntime_was_not_built_for_is_refused(nano_onnx: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(UnsupportedError, match="has no CUDAExecutionProvider"):
        OnnxSession(nano_onnx, "cuda")


def test_the_bundled_models_folder_is_no_export() -> None:
    with pytest.raises(CheckpointError, match="is no exported folder"):
        OnnxSession(NANO)
