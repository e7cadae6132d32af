"""Engines by TensorRT-RTX for compute capability 8.0, which needs no GPU to build, and what stops a build."""

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from vitrail.export import tensorrt, tensorrt_export, tensorrt_log, tensorrt_network
from vitrail.export.tensorrt import EngineOptions, build_engine, engine_targets, log_path
from vitrail.export.tensorrt_export import export_tensorrt
from vitrail.export.tensorrt_profiles import Sizes, profiles_of, shapes_of
from vitrail.runtime.backends import tensorrt_api
from vitrail.runtime.backends.engine_file import PORTABLE, Engine, metadata_path, read_engine
from vitrail.runtime.backends.manifest import MANIFEST, Parameters, Part, TensorSpec, file_sha256, read_manifest
from vitrail.runtime.backends.tensorrt_api import TensorRT, find_tensorrt, make_logger
from vitrail.runtime.errors import CheckpointError, ConfigError, InvalidRequestError, UnsupportedError, VitrailError

from .tiny_graph import SIDE, write_tiny

trt = pytest.importorskip("tensorrt_rtx_bindings")
QUIET = EngineOptions(progress=False)
WEIGHTS = 48 * 64 + 64 * 64  # of the tiny part's products


def build(folder: Path, options: EngineOptions = QUIET, **tiny: Any) -> Engine:
    return build_engine(write_tiny(folder, **tiny), "vision", folder / "vision.engine", options)


def diagnostics(engine: Path) -> int:
    """What TensorRT's own look at an engine finds; without a GPU it calls none valid, but says of each why not."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    return int(runtime.get_engine_validity(engine.read_bytes())[1])


MALFORMED = int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)


# What is built.


@pytest.mark.parametrize(
    ("dtype", "quantization", "precision", "kind"),
    [
        ("float16", None, "fp16", "HALF"),
        ("bfloat16", None, "bf16", "BF16"),
        ("float32", None, "fp32", "FLOAT"),
        ("bfloat16", "int8", "int8", "INT8"),
        ("float16", "int8", "int8", "INT8"),
        ("bfloat16", "int4", "int4", "INT4"),
        ("float16", "int4", "int4", "INT4"),
    ],
)
def test_an_engine_multiplies_in_the_types_of_its_onnx_file(
    tmp_path: Path, dtype: str, quantization: str | None, precision: str, kind: str
) -> None:
    engine = build(tmp_path, dtype=dtype, quantization=quantization)
    assert (engine.precision, engine.compute_capabilities) == (precision, ("8.0",))
    assert engine.products == {kind: WEIGHTS}, "of the network"
    assert engine.layers[kind] == WEIGHTS, "of the engine, by the build log"
    assert engine.fallbacks == ()
    assert not diagnostics(engine.path) & MALFORMED


def test_what_lies_beside_an_engine_says_where_it_can_run(tmp_path: Path) -> None:
    options = EngineOptions(compute_capabilities=("8.0", "8.9"), sizes=Sizes(max_tiles=7), progress=False)
    engine = build(tmp_path, options)
    assert read_engine(engine.path) == engine
    engine.check_file(contents=True)
    assert (engine.product, engine.version) == ("tensorrt-rtx", trt.__version__)
    assert (engine.bytes, engine.sha256) == (engine.path.stat().st_size, file_sha256(engine.path))
    assert engine.compute_capabilities == ("8.0", "8.9")
    assert engine.profiles == {"tiles": {"tiles": (1, 7, 7)}}
    assert engine.onnx == {name: file_sha256(tmp_path / name) for name in ("vision.onnx", "vision.data")}
    assert engine.part.inputs[0].shape == ("tiles", SIDE, SIDE, 3)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"vision.onnx", "vision.data", MANIFEST, *(f"vision.engine{end}" for end in ("", ".json", ".log"))}
    log = log_path(engine.path).read_text(encoding="utf-8")
    assert "VERBOSE: " in log
    assert "LayerType: " in log


def test_engines_are_built_for_several_gpus_and_for_all(tmp_path: Path) -> None:
    one = build(tmp_path / "one")
    portable = build(tmp_path / "all", EngineOptions(compute_capabilities=(PORTABLE,), progress=False))
    assert portable.compute_capabilities == (PORTABLE,)
    assert one.sha256 != portable.sha256


def test_the_inputs_of_a_network_keep_their_types_and_take_the_profile(tmp_path: Path) -> None:
    manifest = write_tiny(tmp_path, "bfloat16")
    found = TensorRT(trt, "tensorrt-rtx", trt.__version__)
    with tensorrt_log.BuildLog(tmp_path / "log") as log:
        logger = make_logger(trt, log.write)
        builder = trt.Builder(logger)
        network = tensorrt_network.parse(found, builder, logger, log, manifest.path("vision"))
        assert network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        assert (network.num_inputs, network.num_outputs) == (1, 1)
        assert (network.get_input(0).dtype, tuple(network.get_input(0).shape)) == (trt.uint8, (-1, SIDE, SIDE, 3))
        assert network.get_output(0).dtype == trt.bfloat16
        shapes = shapes_of(manifest.part("vision"), profiles_of(manifest.part("vision"), Sizes())["tiles"])
        profile = tensorrt._profile(builder, shapes)
        assert [tuple(shape) for shape in profile.get_shape("tiles")] == [(n, SIDE, SIDE, 3) for n in (1, 13, 40)]


def test_quantised_weights_that_are_wider_in_the_engine_are_reported(tmp_path: Path) -> None:
    # An integer product whose operand is not quantised is none: TensorRT multiplies in half precision.
    assert tensorrt_log.fallbacks({"INT8": 100, "BF16": 7}, {"INT8": 160, "BF16": 47}, profiles=2) == (
        "INT8: 100 weights of products in the network, 80 in the engine",
    )
    assert tensorrt_log.fallbacks({"INT8": 100}, {"INT8": 200}, profiles=2) == ()
    assert tensorrt_log.fallbacks({"INT8": 100}, {}, profiles=1) == (), "a log without layers says nothing"


def test_matrices_are_read_from_the_layers_of_a_log() -> None:
    operand = "{{ Name: {}, Dimensions: [{}], Strides: [1], StrideOrder: [0], Datatype: {}, Format: (Linear) any }}"
    line = (
        f"Name: gemm, LayerType: gemm, Inputs: [ {operand.format('x', '-1,64', 'Int8')}], Constants: [ "
        f"{operand.format('w', '64,32', 'Int8')}, {operand.format('b', '1,32', 'Half')}], Outputs: [ "
        f"{operand.format('y', '64,64', 'Half')}], TacticName: t"
    )
    assert tensorrt_log.matrices(line) == {"INT8": 64 * 32}


# What is refused.


def refused(kind: type[VitrailError], folder: Path, options: EngineOptions = QUIET, **tiny: Any) -> str:
    """The reason. Nothing is left behind that would load."""
    with pytest.raises(kind) as error:
        build(folder, options, **tiny)
    assert not list(folder.glob("*.engine"))
    assert not list(folder.glob("*.json.*")) and not list(folder.glob(".*"))
    assert not metadata_path(folder / "vision.engine").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("metadata", "module"),
    [
        ({"vitrail.module": "vision_model.encoder.layers.0.mlp"}, "vision_model.encoder.layers.0.mlp"),
        ({"pkg.torch.onnx.name_scopes": "['', 'model', 'model.projector', 'odd']"}, "projector"),
    ],
)
def test_an_operation_that_tensorrt_lacks_is_named_with_its_module(tmp_path: Path, metadata: Any, module: str) -> None:
    reason = refused(UnsupportedError, tmp_path, operator="Det", module=metadata)
    assert reason.startswith("vision.onnx: tensorrt-rtx 1.")
    assert reason.endswith(f"has no Det (node node_odd), which {module} computes with")


def test_an_operation_of_an_unknown_module_is_named_alone(tmp_path: Path) -> None:
    assert refused(UnsupportedError, tmp_path, operator="Det").endswith("has no Det (node node_odd)")


def test_four_bit_weights_with_zero_points_are_refused_as_such(tmp_path: Path) -> None:
    reason = refused(UnsupportedError, tmp_path, quantization="uint4")
    assert reason.startswith("vision.onnx: its 4-bit weights have zero points, which tensorrt-rtx does not take")


def test_a_node_that_tensorrt_refuses_is_named_with_its_reason(tmp_path: Path) -> None:
    reason = refused(UnsupportedError, tmp_path, operator="BitwiseNot", module={"vitrail.module": "projector"})
    assert "BitwiseNot (node node_odd), which projector computes with" in reason


@pytest.mark.parametrize(
    ("precision", "advice"), [("bf16", "--dtype bfloat16"), ("int8", "--quantization int8"), ("fp8", "")]
)
def test_a_precision_that_the_onnx_file_has_not_is_refused(tmp_path: Path, precision: str, advice: str) -> None:
    options = EngineOptions(compute_capabilities=("8.9",), precision=precision, progress=False)
    reason = refused(UnsupportedError, tmp_path, options)
    assert f"multiplies in fp16, not {precision}" in reason
    assert advice in reason


@pytest.mark.parametrize(
    ("options", "kind", "reason"),
    [
        (
            {"compute_capabilities": ("9.0",)},
            UnsupportedError,
            "builds for 12.0, 12.1, 7.5, 8.0, 8.6, 8.9 and 'portable'",
        ),
        ({"compute_capabilities": ("sm_80",)}, ConfigError, "is written as 8.0"),
        ({"precision": "fp8"}, UnsupportedError, "8.0 have none, only those from 8.9 on"),
        ({"precision": "bf16", "compute_capabilities": ("7.5",)}, UnsupportedError, "only those from 8.0 on"),
        ({"precision": "int3"}, ConfigError, "known are bf16, fp16, fp32, int8, int4, fp8"),
        ({"sizes": Sizes(max_tiles=41)}, ConfigError, "--max-tiles 41: the vision part takes from 1 to 40"),
        ({"sizes": Sizes(max_tiles=0)}, ConfigError, "takes from 1 to 40"),
        ({"product": "tensorrt-cloud"}, UnsupportedError, "known are tensorrt and tensorrt-rtx"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(
    tmp_path: Path, options: dict[str, Any], kind: type[VitrailError], reason: str
) -> None:
    assert reason in refused(kind, tmp_path, EngineOptions(**options, progress=False))


def test_files_that_changed_since_the_export_are_refused(tmp_path: Path) -> None:
    manifest = write_tiny(tmp_path)
    with (tmp_path / "vision.data").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        build_engine(manifest, "vision", tmp_path / "vision.engine", QUIET)
    with pytest.raises(CheckpointError, match="holds no decoder part"):
        build_engine(manifest, "decoder", tmp_path / "decoder.engine", QUIET)


def test_a_target_that_cannot_be_written_is_refused_before_the_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    manifest = write_tiny(tmp_path / "tiny")
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        build_engine(manifest, "vision", tmp_path / "file" / "vision.engine", QUIET)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    with pytest.raises(InvalidRequestError, match=r"needs about 0\.0 GB, and 0\.0 GB are free"):
        build_engine(manifest, "vision", tmp_path / "tiny" / "vision.engine", QUIET)


def test_a_disk_that_fills_up_during_the_build_leaves_the_old_engine_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = build(tmp_path)
    opened = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = opened(path, mode, *args, **options)
        return Full(file) if path.suffix == ".partial" and mode == "wb" else file

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(InvalidRequestError, match="No space left on device"):
        build_engine(read_manifest(tmp_path), "vision", old.path, QUIET)
    assert not list(tmp_path.glob(".*"))
    read_engine(old.path).check_file(contents=True)


def test_a_build_that_is_interrupted_leaves_nothing_that_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorrt, "_publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path)
    assert not list(tmp_path.glob("*.engine")) and not list(tmp_path.glob(".*"))


def test_without_tensorrt_the_packages_to_install_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(tensorrt_api, "import_module", missing)
    reason = refused(UnsupportedError, tmp_path)
    for package in ("pip install tensorrt", "tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings"):
        assert package in reason


def test_bindings_without_their_libraries_count_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        if name == "tensorrt":
            raise OSError("libnvinfer.so.11: cannot open shared object file")
        return trt

    monkeypatch.setattr(tensorrt_api, "import_module", broken)
    assert find_tensorrt() == TensorRT(trt, "tensorrt-rtx", trt.__version__)


# Classic TensorRT, which builds on the GPU that it builds for.


class Classic:
    """The classic package, which has all names of TensorRT-RTX's that a build asks for."""

    __version__ = "11.1.0"

    def __getattr__(self, name: str) -> Any:
        return getattr(trt, name)


def test_classic_tensorrt_builds_for_the_gpu_at_hand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    classic = Classic()
    monkeypatch.setattr(tensorrt_api, "import_module", lambda name: classic)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="builds for the GPU at hand, and this machine has none"):
        tensorrt.check_options(QUIET)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(UnsupportedError, match=r"this machine has 9\.0"):
        tensorrt.check_options(QUIET)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert tensorrt.check_options(QUIET) == TensorRT(classic, "tensorrt", "11.1.0")


def test_classic_tensorrt_keeps_its_timings_between_builds(tmp_path: Path) -> None:
    class Cache:
        def __init__(self, contents: bytes) -> None:
            self.contents = contents

        def serialize(self) -> bytearray:
            return bytearray(self.contents + b"timed.")

    class Config:
        def create_timing_cache(self, contents: bytes) -> Cache:
            return Cache(contents)

        def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
            self.cache = cache
            return not ignore_mismatch

        def get_timing_cache(self) -> Cache:
            return self.cache

    for expected in (b"timed.", b"timed.timed."):
        with tensorrt._timing_cache(TensorRT(Classic(), "tensorrt", "11.1.0"), Config(), tmp_path):
            pass
        assert (tmp_path / tensorrt.TIMING_CACHE).read_bytes() == expected


# Profiles.


def part(name: str, limits: dict[str, int], *shapes: tuple[int | str, ...]) -> Part:
    inputs = tuple(TensorSpec(f"input{index}", "int64", shape) for index, shape in enumerate(shapes))
    return Part(name, f"{name}.onnx", f"{name}.data", "float16", None, 21, inputs, (), limits, Parameters(0, ""))


DECODER = part(
    "decoder",
    {"batch": 64, "context": 2048},
    *(("batch", "tokens"), ("visual", 256), ("batch", "context"), ("batch", 4, "past", 32)),
)


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(max_batch=64, max_length=2048), Sizes(max_batch=1, max_length=2)])
def test_the_profiles_of_a_decoder_fit_themselves_and_cover_prompts_and_single_tokens(sizes: Sizes) -> None:
    profiles = profiles_of(DECODER, sizes)
    assert list(profiles) == ["prefill", "decode"]
    length = sizes.max_length or 2048
    for profile in profiles.values():
        assert all(0 <= least <= best <= most for least, best, most in profile.values())
        for which in range(3):
            assert profile["past"][which] + profile["tokens"][which] == profile["context"][which]
        assert profile["context"][2] == length
        assert profile["batch"][2] == (sizes.max_batch or 8)
    assert profiles["decode"]["tokens"] == (1, 1, 1)
    assert profiles["prefill"]["past"][0] == 0
    assert shapes_of(DECODER, profiles["decode"])["input3"][0] == (1, 4, 1, 32)


def test_the_profile_of_texts_is_their_part_whole() -> None:
    text = part("text", {"batch": 64, "tokens": 80}, ("batch", "tokens"), ("batch",))
    assert profiles_of(text, Sizes()) == {"texts": {"batch": (1, 64, 64), "tokens": (1, 80, 80)}}
    with pytest.raises(ConfigError, match="--max-length 81: the text part takes from 2 to 80"):
        profiles_of(text, Sizes(max_length=81))


def test_sizes_beyond_a_decoders_limits_and_unknown_axes_are_refused() -> None:
    with pytest.raises(ConfigError, match="--max-length 2049: the decoder part takes from 2 to 2048"):
        profiles_of(DECODER, Sizes(max_length=2049))
    with pytest.raises(ConfigError, match="--max-batch 65: the decoder part takes from 1 to 64"):
        profiles_of(DECODER, Sizes(max_batch=65))
    with pytest.raises(UnsupportedError, match="odd: no profile is known for axes height"):
        profiles_of(part("odd", {}, ("height", 3)), Sizes())


# Sources and targets.


def test_engines_go_into_a_folder_or_one_into_a_file(tmp_path: Path) -> None:
    assert engine_targets(tmp_path, ["vision", "decoder"]) == {
        "vision": tmp_path / "vision.engine",
        "decoder": tmp_path / "decoder.engine",
    }
    assert engine_targets(tmp_path / "a.engine", ["vision"]) == {"vision": tmp_path / "a.engine"}
    with pytest.raises(ConfigError, match="is one engine, and there are parts vision, decoder"):
        engine_targets(tmp_path / "a.engine", ["vision", "decoder"])


def no_prompts() -> Any:
    raise AssertionError("nothing is calibrated here")


def test_a_folder_and_an_onnx_file_of_it_are_sources(tmp_path: Path) -> None:
    write_tiny(tmp_path / "onnx")
    (engine,) = export_tensorrt(str(tmp_path / "onnx"), tmp_path / "engines", None, QUIET, no_prompts)
    assert engine.path == tmp_path / "engines" / "vision.engine"
    file = str(tmp_path / "onnx" / "vision.onnx")
    (engine,) = export_tensorrt(file, tmp_path / "one.engine", None, QUIET, no_prompts)
    assert engine.path == tmp_path / "one.engine"
    assert read_engine(engine.path).part.name == "vision"


@pytest.mark.parametrize(
    ("source", "part", "reason"),
    [
        ("onnx", "decoder", "holds no decoder part, only vision"),
        ("onnx/other.onnx", None, "is no exported folder"),
        ("onnx/vision.onnx", "decoder", "is not a file of part decoder"),
    ],
)
def test_a_source_without_the_part_is_refused(tmp_path: Path, source: str, part: str | None, reason: str) -> None:
    write_tiny(tmp_path / "onnx")
    with pytest.raises(CheckpointError) as error:
        export_tensorrt(str(tmp_path / source), tmp_path / "engines", part, QUIET, no_prompts)
    assert reason in str(error.value)
    assert not (tmp_path / "engines").exists()


def test_a_checkpoint_is_not_exported_for_what_could_not_be_built(tmp_path: Path) -> None:
    for options, target, kind in (
        (EngineOptions(compute_capabilities=("9.0",)), tmp_path / "out", UnsupportedError),
        (EngineOptions(compute_capabilities=("8.9",), precision="fp8"), tmp_path / "out", UnsupportedError),
        (QUIET, tmp_path / "both.engine", ConfigError),
    ):
        with pytest.raises(kind):
            export_tensorrt("nano", target, None, options, no_prompts)
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        export_tensorrt("nano", tmp_path / "missing" / "v.engine", "vision", QUIET, no_prompts)
    assert list(tmp_path.iterdir()) == []


def test_json_beside_an_engine_is_plain(tmp_path: Path) -> None:
    engine = build(tmp_path)
    values = json.loads(metadata_path(engine.path).read_text(encoding="utf-8"))
    assert values["file"] == "vision.engine"
    assert str(tmp_path) not in json.dumps(values)
    assert {"vitrail", "onnx:onnx"} <= set(values["versions"])


def test_a_checkpoint_in_int4_keeps_a_vision_half_that_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def exported(source: str, folder: Path, options: Any, prompts: Any) -> Any:
        asked.append((source, options.part, options.dtype, options.quantization))
        return write_tiny(folder, "bfloat16")

    monkeypatch.setattr(tensorrt_export, "write_onnx", exported)
    options = EngineOptions(precision="int4", progress=False)
    (engine,) = export_tensorrt("nano", tmp_path / "out", None, options, no_prompts)
    assert asked == [("nano", None, "bfloat16", "int4")]
    assert engine.precision == "bf16"
    assert read_engine(tmp_path / "out" / "vision.engine") == engine
    assert {file.name for file in tmp_path.iterdir()} == {"out"}
    names = {f"vision.engine{end}" for end in ("", ".json", ".log")}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"vision.onnx", "vision.data", MANIFEST, *names}
    read_manifest(tmp_path / "out").check_files()


@pytest.mark.parametrize(("target", "log"), [("out", "out.vision.engine.log"), ("a.engine", "a.engine.log")])
def test_a_checkpoint_whose_engine_cannot_be_built_leaves_nothing_but_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str, log: str
) -> None:
    def refused(tensorrt: Any, builder: Any, network: Any, config: Any, file: Path, log: tensorrt_log.BuildLog) -> None:
        log.write("ERROR", "no tactic")
        raise UnsupportedError(f"built no engine (log: {log.path})")

    monkeypatch.setattr(tensorrt_export, "write_onnx", lambda source, folder, *_: write_tiny(folder, "bfloat16"))
    with monkeypatch.context() as patch:
        patch.setattr(tensorrt, "_serialise", refused)
        with pytest.raises(UnsupportedError) as error:
            export_tensorrt("nano", tmp_path / target, "vision", QUIET, no_prompts)
    assert str(tmp_path / log) in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == [log]
    assert "ERROR: no tactic" in (tmp_path / log).read_text(encoding="utf-8")
    (engine,) = export_tensorrt("nano", tmp_path / target, "vision", QUIET, no_prompts)  # nothing is in the way
    assert log_path(engine.path).is_file()
    assert not (tmp_path / "out.vision.engine.log").exists()


def test_a_checkpoint_is_not_exported_into_a_folder_that_exists(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidRequestError, match="exists already"):
        export_tensorrt("nano", tmp_path / "out", None, QUIET, no_prompts)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_onnx_files_of_a_checkpoint_do_not_stay_beside_a_single_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tensorrt_export, "write_onnx", lambda source, folder, *_: write_tiny(folder, "bfloat16"))
    (engine,) = export_tensorrt("nano", tmp_path / "a.engine", "vision", QUIET, no_prompts)
    assert engine.precision == "bf16"
    assert {file.name for file in tmp_path.iterdir()} == {f"a.engine{end}" for end in ("", ".json", ".log")}
