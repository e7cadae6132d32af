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
from .onnx import Options, export_onnx
from .tensorrt import EngineOptions, build_engine, check_options, engine_targets
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
    Raises a `VitrailError` for what cannot be built or written.
    """
    target = target.expanduser()
    check_options(options)
    file = Path(source).expanduser()
    if file.suffix == ".onnx" or (file / MANIFEST).is_file():
        manifest = read_manifest(file)
        parts = _parts(manifest, file, part)
        return _build(manifest, parts, target, options)
    if target.suffix == SUFFIX and part is None:
        raise ConfigError(f"{target}: is one engine; say with --part of what, or name a folder")
    with _onnx_folder(target) as folder:
        manifest = export_onnx(source, folder, _onnx_options(part, options), prompts)
        # Written as asked for a moment ago; of int4 the vision half is not.
        return _build(manifest, _parts(manifest, folder, part), target, replace(options, precision=None))


def _build(manifest: Manifest, parts: tuple[str, ...], target: Path, options: EngineOptions) -> list[Engine]:
    targets = engine_targets(target, parts)
    for part in parts:  # every mistake is found before the first build, which takes minutes
        profiles_of(manifest.part(part), options.sizes)
    return [build_engine(manifest, part, targets[part], options) for part in parts]


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
def _onnx_folder(target: Path) -> Iterator[Path]:
    """Where a checkpoint's ONNX files go: the folder of the engines; for a single engine one that does not stay."""
    if target.suffix != SUFFIX:
        yield target
        return
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise InvalidRequestError(f"{target}: cannot be written ({error.strerror})") from None
    with folder:
        yield Path(folder.name) / "onnx"
