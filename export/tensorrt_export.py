"""`vitrail export tensorrt`: the engines of an exported folder, which a checkpoint becomes first."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..runtime.backends.engine_file import SUFFIX, Engine
from ..runtime.backends.manifest import MANIFEST, Manifest, read_manifest
from ..runtime.errors import CheckpointError, ConfigError, InvalidRequestError, UnsupportedError
from .calibration import Prompt
from .folder import new_folder
from .onnx import Options, write_onnx
from .tensorrt import EngineOptions, build_engine, check_options, engine_targets, log_path
from .tensorrt_profiles import profiles_of

# --precision -> what a checkpoint is exported with. Quantised layers stand between activations in bf16.
_EXPORTED = {
    "bf16": ("bfloat16", None),
    "fp16": ("float16", None),
    "fp32": ("float32", None),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}


def export_tensorrt(
    source: str,
    target: Path,
    part: str | None,
    options: EngineOptions,
    prompts: Callable[[], Sequence[Prompt]],
) -> list[Engine]:
    """Build the engines of `source`: an exported folder, an ONNX file of it, or a checkpoint.

    target: a folder, or one engine's file. A checkpoint's ONNX files come into the folder too, which must be new.
    part: as `--part`; None for all. prompts: to calibrate a checkpoint's int8 activations with.
    Raises a `VitrailError` for what cannot be built or written. Of a checkpoint nothing is left behind then but the
    log of the build that failed, beside the target.
    """
    target = target.expanduser()
    check_options(options)
    file = Path(source).expanduser()
    if file.suffix == ".onnx" or (file / MANIFEST).is_file():
        manifest = read_manifest(file)
        parts = _parts(manifest, file, part)
        return _build(manifest, parts, target, options)
    onnx_options = _onnx_options(part, options)
    options = replace(options, precision=None)  # ONNX files are written in it; of int4 the vision half is not
    if target.suffix == SUFFIX:
        if part is None:
            raise ConfigError(f"{target}: is one engine; say with --part of what, or name a folder")
        with _scratch(target) as folder:
            manifest = write_onnx(source, folder, onnx_options, prompts)
            return _build(manifest, _parts(manifest, folder, part), target, options)
    with new_folder(target) as folder:
        manifest = write_onnx(source, folder, onnx_options, prompts)
        engines = _build(manifest, _parts(manifest, folder, part), folder, options, logs=target)
    return [replace(engine, path=target / engine.path.name) for engine in engines]


def _build(
    manifest: Manifest, parts: tuple[str, ...], target: Path, options: EngineOptions, logs: Path | None = None
) -> list[Engine]:
    """logs: the path that logs stand beside while engines are built, for a target that an error removes."""
    targets = engine_targets(target, parts)
    for part in parts:  # every mistake is found before the first build, which takes minutes
        profiles_of(manifest.part(part), options.sizes)
    log_files = {part: logs and logs.with_name(f"{logs.name}.{log_path(targets[part]).name}") for part in parts}
    return [build_engine(manifest, part, targets[part], options, log_files[part]) for part in parts]


def _parts(manifest: Manifest, path: Path, asked: str | None) -> tuple[str, ...]:
    """The parts to build: of a file, its own."""
    if path.suffix == ".onnx":
        own = tuple(name for name, part in manifest.parts.items() if part.file == path.name)
        if not own or (asked is not None and asked not in own):
            raise CheckpointError(f"{path}: is not a file of part {asked or 'any'} in {MANIFEST}")
        return own
    found = tuple(name for name in manifest.parts if asked is None or name == asked or name == f"{asked}_g")
    if not found:
        raise CheckpointError(f"{path}: holds no {asked} part, only {', '.join(manifest.parts)}")
    return found


def _onnx_options(part: str | None, options: EngineOptions) -> Options:
    precision = options.precision or "bf16"
    if precision not in _EXPORTED:
        raise UnsupportedError(
            f"--precision {precision}: ONNX files are written in {', '.join(_EXPORTED)}; "
            f"build {precision} engines from an ONNX file that has its Q/DQ"
        )
    dtype, quantization = _EXPORTED[precision]
    return Options(part=part, dtype=dtype, quantization=quantization, progress=options.progress)


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """Where a checkpoint's ONNX files stand while a single engine is built."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise InvalidRequestError(f"{target}: cannot be written ({error.strerror})") from None
    with folder:
        yield Path(folder.name)
