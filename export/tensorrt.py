"""TensorRT engines of exported parts: strongly typed, for named compute capabilities, with what they are beside them.

An engine is built from the ONNX file of a part, whose types are kept as they are. It comes to its place in one move,
and what says where it can run comes last; until then nothing there can be loaded.
"""

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from ..runtime.backends.engine_file import PORTABLE, SUFFIX, Engine, metadata_path
from ..runtime.backends.manifest import Manifest, file_sha256
from ..runtime.backends.tensorrt_api import TensorRT, find_tensorrt, make_logger
from ..runtime.errors import ConfigError, InvalidRequestError, UnsupportedError
from .tensorrt_log import BuildLog, fallbacks
from .tensorrt_network import PRODUCTS, check_precision, parse, product_weights
from .tensorrt_profiles import Sizes, profiles_of, shapes_of

TIMING_CACHE = "tensorrt.timing-cache"
_LEAST = {"fp8": (8, 9), "bf16": (8, 0)}  # tensor cores that multiply in it begin there


@dataclass(frozen=True)
class EngineOptions:
    """How engines are built.

    compute_capabilities: e.g. ("8.0",), or (`PORTABLE`,). precision: a key of `PRODUCTS`; None: whatever the ONNX file
    has. product: which TensorRT, None: the first there is. progress: None means a bar on a terminal only.
    """

    compute_capabilities: tuple[str, ...] = ("8.0",)
    precision: str | None = None
    sizes: Sizes = field(default_factory=Sizes)
    product: str | None = None
    progress: bool | None = None


def check_options(options: EngineOptions) -> TensorRT:
    """The TensorRT that can build so. Raises before anything is exported: `UnsupportedError`, `ConfigError`."""
    if options.precision is not None and options.precision not in PRODUCTS:
        raise ConfigError(f"--precision {options.precision}: unknown; known are {', '.join(PRODUCTS)}")
    tensorrt = find_tensorrt(options.product)
    least = _LEAST.get(options.precision or "", (0, 0))
    for capability in options.compute_capabilities:
        if capability != PORTABLE and _numbers(capability) < least:
            raise UnsupportedError(
                f"--precision {options.precision}: GPUs of compute capability {capability} have none, "
                f"only those from {least[0]}.{least[1]} on"
            )
    _targets(tensorrt, options.compute_capabilities)
    return tensorrt


def build_engine(
    manifest: Manifest, part: str, target: Path, options: EngineOptions, log_file: Path | None = None
) -> Engine:
    """Build the engine of a part. target: its file, `<name>.engine`; JSON and log come beside it.

    log_file: where the log is until the engine is whole, and stays if it never is; None for its place beside it.
    Raises `UnsupportedError` for what TensorRT refuses, naming the node and the module that made it, `ConfigError` for
    sizes beyond the part's limits and for a target that cannot be written.
    """
    tensorrt = check_options(options)
    spec = manifest.part(part)
    profiles = profiles_of(spec, options.sizes)
    onnx = manifest.path(part)
    files = tuple(name for name in (spec.file, spec.data) if name in manifest.files)
    _make_room(target, sum((manifest.folder / name).stat().st_size for name in files if _exists(manifest, name)))
    manifest.check_files(*files)
    started = time.perf_counter()
    with _writing(target) as partial, BuildLog(log_file or log_path(target)) as log:
        builder_logger = make_logger(tensorrt.api, log.write)
        builder = tensorrt.api.Builder(builder_logger)
        network = parse(tensorrt, builder, builder_logger, log, onnx)
        products = product_weights(network)
        precision = check_precision(onnx, products, options.precision)
        config = builder.create_builder_config()
        _configure(tensorrt, builder, config, options.compute_capabilities)
        for profile in profiles.values():
            config.add_optimization_profile(_profile(builder, shapes_of(spec, profile)))
        with _timing_cache(tensorrt, config, target.parent), _progress(tensorrt, config, part, options.progress):
            _serialise(tensorrt, builder, network, config, partial, log)
        engine = Engine(
            path=target,
            part=spec,
            product=tensorrt.product,
            version=tensorrt.version,
            compute_capabilities=options.compute_capabilities,
            precision=precision,
            profiles=profiles,
            bytes=partial.stat().st_size,
            sha256=file_sha256(partial),
            onnx={name: manifest.files[name] for name in files},
            products=dict(products),
            layers=dict(log.weights),
            fallbacks=fallbacks(products, log.weights, len(profiles)),
            versions=_versions(manifest.versions),
            seconds=round(time.perf_counter() - started, 1),
        )
        _publish(engine, partial)
    os.replace(log.path, log_path(target))
    return engine


def log_path(engine: Path) -> Path:
    """The log of a build, beside the engine."""
    return engine.with_name(engine.name + ".log")


def engine_targets(target: Path, parts: Sequence[str]) -> dict[str, Path]:
    """Where the engines of parts go: a folder, or the one file where there is one part. Raises `ConfigError`."""
    if target.suffix != SUFFIX:
        return {part: target / f"{part}{SUFFIX}" for part in parts}
    if len(parts) != 1:
        raise ConfigError(f"{target}: is one engine, and there are parts {', '.join(parts)}; name one, or a folder")
    return {parts[0]: target}


def _numbers(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise ConfigError(f"--compute-capability {capability}: is written as 8.0")
    return int(major), int(minor)


def _targets(tensorrt: TensorRT, capabilities: Sequence[str]) -> list[Any]:
    """The API's names of compute capabilities, none for a portable engine and for the GPU at hand."""
    if not tensorrt.portable:
        _check_this_gpu(tensorrt, capabilities)
        return []
    if tuple(capabilities) == (PORTABLE,):
        return []
    known = tensorrt.api.ComputeCapability
    found = []
    for capability in capabilities:
        name = "SM{}{}".format(*_numbers(capability))
        if not hasattr(known, name):
            names = [entry for entry in dir(known) if entry.startswith("SM")]
            others = ", ".join(f"{entry[2:-1]}.{entry[-1]}" for entry in names)
            raise UnsupportedError(
                f"--compute-capability {capability}: {tensorrt.product} {tensorrt.version} builds for {others} "
                f"and {PORTABLE!r}; classic TensorRT builds for any, on such a GPU"
            )
        found.append(getattr(known, name))
    return found


def _check_this_gpu(tensorrt: TensorRT, capabilities: Sequence[str]) -> None:
    """Classic TensorRT times kernels where it builds: the GPU must be of the kind that the engine is for."""
    import torch

    here = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
    if tuple(capabilities) != (here,):
        has = f"has {here}" if here else "has none"
        raise UnsupportedError(
            f"--compute-capability {', '.join(capabilities)}: {tensorrt.product} {tensorrt.version} builds for the GPU "
            f"at hand, and this machine {has}; build there, or install TensorRT-RTX (--product tensorrt-rtx)"
        )


def _configure(tensorrt: TensorRT, builder: Any, config: Any, capabilities: Sequence[str]) -> None:
    targets = _targets(tensorrt, capabilities)
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(target, index)
    # Types of layers in the log and, for the inspector, in the engine.
    config.profiling_verbosity = tensorrt.api.ProfilingVerbosity.DETAILED
    builder.max_threads = os.cpu_count() or 1


def _profile(builder: Any, shapes: Mapping[str, tuple[tuple[int, ...], ...]]) -> Any:
    profile = builder.create_optimization_profile()
    for name, (least, best, most) in shapes.items():
        profile.set_shape(name, least, best, most)
    return profile


def _serialise(tensorrt: TensorRT, builder: Any, network: Any, config: Any, file: Path, log: BuildLog) -> None:
    """Build the engine into a file, piece by piece where the API can: it is never in memory as a whole then."""
    with file.open("wb") as stream:
        if hasattr(builder, "build_serialized_network_to_stream"):
            writer = _stream_writer(tensorrt.api, stream)
            built = builder.build_serialized_network_to_stream(network, config, writer)
            if writer.error is not None:
                raise writer.error
        else:
            plan = builder.build_serialized_network(network, config)
            built = plan is not None
            if built:
                stream.write(plan)
    if not built:
        reason = log.errors[-1] if log.errors else "it gives no reason"
        raise UnsupportedError(f"{tensorrt.product} {tensorrt.version} built no engine: {reason} (log: {log.path})")


def _stream_writer(api: Any, stream: BinaryIO) -> Any:
    """Takes an engine as it is built. After an error it takes the rest too: TensorRT would ask again for ever."""

    class Writer(api.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            api.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: Any) -> int:
            if self.error is None:
                try:
                    stream.write(data)
                except OSError as error:
                    self.error = error
            return len(data)

    return Writer()


@contextmanager
def _timing_cache(tensorrt: TensorRT, config: Any, folder: Path) -> Iterator[None]:
    """What classic TensorRT timed is kept for the next build. TensorRT-RTX times nothing: a cache needs a GPU there."""
    if tensorrt.portable:
        yield
        return
    file = folder / TIMING_CACHE
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    yield
    file.write_bytes(bytes(config.get_timing_cache().serialize()))


@contextmanager
def _progress(tensorrt: TensorRT, config: Any, part: str, shown: bool | None) -> Iterator[None]:
    """A bar of the build's steps, on a terminal."""
    with tqdm(desc=f"building {part}", unit="step", disable=None if shown is None else not shown) as bar:
        if not bar.disable:
            config.progress_monitor = _monitor(tensorrt.api, bar)
        yield


def _monitor(api: Any, bar: Any) -> Any:
    class Monitor(api.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            bar.total = (bar.total or 0) + steps
            bar.set_postfix_str(phase)

        def phase_finish(self, phase: str) -> None:
            bar.refresh()

        def step_complete(self, phase: str, step: int) -> bool:
            bar.update()
            return True

    return Monitor()


def _exists(manifest: Manifest, name: str) -> bool:
    return (manifest.folder / name).is_file()


def _make_room(target: Path, needed: int) -> None:
    """Refuse before the minutes that a build takes: no such folder, no right to write, too little space."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = target.with_name(f".{target.name}.writable")
        probe.touch()
        probe.unlink()
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise InvalidRequestError(f"{target}: cannot be written ({error.strerror})") from None
    if free < needed:
        raise InvalidRequestError(f"{target}: needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


@contextmanager
def _writing(target: Path) -> Iterator[Path]:
    """A file to write the engine to, in the folder of its place. Gone at the end, whatever happens."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
    except OSError as error:
        raise InvalidRequestError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        partial.unlink(missing_ok=True)


def _publish(engine: Engine, partial: Path) -> None:
    """Bring engine and JSON to their places. Without its JSON an engine is not loaded: an old one goes first."""
    import json

    beside = metadata_path(engine.path)
    written = beside.with_name(f".{beside.name}.{os.getpid()}.partial")
    try:
        written.write_text(json.dumps(engine.to_json(), indent=1), encoding="utf-8")
        beside.unlink(missing_ok=True)
        os.replace(partial, engine.path)
        os.replace(written, beside)
    finally:
        written.unlink(missing_ok=True)


def _versions(onnx: Mapping[str, str]) -> dict[str, str]:
    """What wrote the ONNX file, and what built the engine from it."""
    try:
        own = version("vitrail")
    except PackageNotFoundError:  # run from a checkout that is not installed
        own = "unknown"
    return {**{f"onnx:{name}": text for name, text in onnx.items()}, "vitrail": own}
