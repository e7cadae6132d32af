"""What `vitrail serve` can be told: by flags, `VITRAIL_...` variables and a TOML file, in this order of weight.

Every field of `Settings` is a flag, a variable and a key of the file. Needs nothing but the standard library.
"""

import json
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError

PREFIX = "VITRAIL_"
HIDDEN = "***"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LOG_LEVELS = ("debug", "info", "warning", "error")

Reader = Callable[[str, Any], Any]


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a non-empty string, not {value!r}")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """A list of strings; in a variable they are separated by commas."""
    values = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    if not isinstance(values, list | tuple):
        raise ConfigError(f"{name} must be a list of strings, not {value!r}")
    return tuple(_text(name, one) for one in values)


def _flag(name: str, value: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    found = words.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise ConfigError(f"{name} must be true or false, not {value!r}")
    return found


def _integer(low: int, high: int | None = None) -> Reader:
    def read(name: str, value: Any) -> int:
        number = _number_of(value, int)
        if number is None or number < low or (high is not None and number > high):
            allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise ConfigError(f"{name} must be an integer {allowed}, not {value!r}")
        return int(number)

    return read


def _number(low: float, *, above: bool = False) -> Reader:
    def read(name: str, value: Any) -> float:
        number = _number_of(value, float)
        if number is None or not math.isfinite(number) or number < low or (above and number == low):
            raise ConfigError(f"{name} must be a number {'above' if above else 'of at least'} {low:g}, not {value!r}")
        return float(number)

    return read


def _number_of(value: Any, kind: type[int] | type[float]) -> float | None:
    """`value` as a number: itself, or the string of a variable; None for anything else."""
    if isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and not isinstance(value, int)):
        return None
    return value


def _counts(name: str, value: Any) -> Mapping[str, int]:
    """A table of counts; in a flag or a variable a JSON object, or the number of images alone."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"image": value}
    if not isinstance(value, Mapping) or not all(_number_of(count, int) is not None for count in value.values()):
        raise ConfigError(f'{name} must be like {{"image": 64}}')
    return dict(value)


def _one_of(*known: str) -> Reader:
    def read(name: str, value: Any) -> str:
        if value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        return str(value)

    return read


def _folder(name: str, value: Any) -> Path:
    path = Path(value) if isinstance(value, str | Path) else Path()
    if not isinstance(value, str | Path) or not path.is_dir():
        raise ConfigError(f"{name} must be a folder, not {str(value)!r}")
    return path


# ruff: noqa: RUF009 - the functions below make dataclass fields


def _setting(default: Any, read: Reader, text: str, *, flags: tuple[str, ...] = (), model: bool = False) -> Any:
    """A field; flags: further names on the command line; model: whether `Runtime.from_pretrained` takes it."""
    return field(default=default, metadata={"read": read, "help": text, "flags": flags, "model": model})


def _of_model(default: Any, read: Reader, text: str, *, flags: tuple[str, ...] = ()) -> Any:
    return _setting(default, read, text, flags=flags, model=True)


@dataclass(frozen=True)
class Settings:
    """Every setting of the server, checked. Raises `ConfigError` for a value that cannot be meant."""

    model: str = _setting("nano", _text, "A local folder, a hub id or `nano`.")

    host: str = _setting("127.0.0.1", _text, "The address to listen at; 0.0.0.0 is every one of the machine.")
    port: int = _setting(8000, _integer(0, 65535), "The port to listen at; 0 takes a free one.")
    api_key: tuple[str, ...] = _setting(
        (), _texts, "A key that callers must send as `Authorization: Bearer KEY`; may be repeated."
    )
    allowed_hosts: tuple[str, ...] = _setting(
        (), _texts, "Names that the Host header may have. By default this machine's, where only it can connect."
    )
    served_model_name: str | None = _setting(None, _text, "What callers call the model, if not as it was given.")

    revision: str | None = _of_model(None, _text, "Branch, tag or commit of a hub id.")
    dtype: str = _of_model("bfloat16", _text, "bfloat16, float16 or float32.")
    device: str | None = _of_model(None, _text, "cpu, cuda, cuda:1; the best present if not given.")
    quantization: str | None = _of_model(None, _text, "Round the language half while loading: int8, int4 ...")
    vision_quantization: str | None = _of_model(None, _text, "Round the vision half while loading: int8 ...")
    tensor_parallel_size: int = _of_model(1, _integer(1), "GPUs that share the language half.", flags=("--tp",))
    placement: str = _of_model(
        "auto", _one_of("auto", "colocated", "split", "replicas"), "auto, colocated, split or replicas."
    )
    llm_devices: tuple[str, ...] = _of_model((), _texts, "A device of the language half, as cuda:0; may be repeated.")
    vision_devices: tuple[str, ...] = _of_model(
        (), _texts, "A device that the vision half has to itself; may be repeated."
    )
    replicas: int = _setting(1, _integer(1), "Whole models, each with its GPU or share of the CPU; by Ray Serve.")
    vision_replicas: int = _setting(0, _integer(0), "Vision halves apart, which the replicas share; by Ray Serve.")
    max_model_len: int | None = _of_model(None, _integer(1), "Tokens of a prompt and its answer.")
    max_num_seqs: int = _of_model(64, _integer(1), "Answers that are written at the same time.")
    max_num_batched_tokens: int = _of_model(8192, _integer(1), "Tokens of prompts and tiles in one step.")
    gpu_memory_utilization: float = _of_model(0.9, _number(0, above=True), "Share of the GPU's memory to use.")
    kv_cache_dtype: str = _of_model("auto", _text, "Of keys and values: auto or int8.")
    enable_prefix_caching: bool = _of_model(True, _flag, "Share keys and values of prompts that begin alike.")
    vision_cache_gb: float = _of_model(1.0, _number(0), "Host memory for visual tokens of images seen before.")
    enforce_eager: bool = _of_model(False, _flag, "No CUDA graphs.")
    deterministic: bool = _of_model(False, _flag, "The same answer to the bit whatever runs beside it; slower.")

    limit_mm_per_prompt: Mapping[str, int] | None = _of_model(
        None, _counts, "Images in one prompt: '{\"image\": 64}', which is the default, or a number."
    )
    max_image_pixels: int = _of_model(178_956_970, _integer(1), "Pixels of one image.")
    max_aspect_ratio: float = _of_model(200.0, _number(1), "The longer side of an image over the shorter one.")
    exif_orientation: bool = _of_model(True, _flag, "Turn images as their EXIF data says.")
    allowed_media_domains: tuple[str, ...] = _of_model(
        (),
        _texts,
        "A host to fetch media from: example.org, *.example.org; may be repeated. None by default.",
    )
    allowed_local_media_path: Path | None = _of_model(
        None, _folder, "A folder below which requests may name files. None by default."
    )
    max_media_bytes: int = _setting(48 * 2**20, _integer(1), "Bytes of all media of a request, fetched or inline.")
    mm_per_request_timeout: float = _of_model(
        10.0, _number(0, above=True), "Seconds that the media of a request may take to fetch, and to decode."
    )

    max_request_bytes: int = _setting(128 * 2**20, _integer(1), "Bytes of a request's body; beyond, 413.")
    max_num_queued_reqs: int = _setting(
        256, _integer(0), "Answers that may wait beside those being written; beyond, 429."
    )
    request_timeout: float = _setting(600.0, _number(0, above=True), "Seconds that a request may take in all.")
    shutdown_timeout: float = _setting(30.0, _number(0), "Seconds that requests have to end after SIGTERM.")
    stall_timeout: float = _setting(
        90.0, _number(0, above=True), "Seconds without a step, with work to do, after which the engine is given up."
    )

    log_level: str = _setting("info", _one_of(*_LOG_LEVELS), "debug, info, warning or error.")
    log_content: bool = _setting(False, _flag, "Write prompts and answers into the log.")
    otlp_endpoint: str | None = _setting(None, _text, "Where traces go, by OTLP over HTTP; none if not given.")

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None or one.default is not None:
                object.__setattr__(self, one.name, one.metadata["read"](one.name, value))

    @property
    def name(self) -> str:
        """What callers call the model."""
        if self.served_model_name is not None:
            return self.served_model_name
        # The path of a folder is nobody's business but its last part.
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model

    @property
    def hosts(self) -> tuple[str, ...]:
        """Host headers that are answered; empty: all.

        A page that a browser on this machine shows could reach a server on loopback under a name of its own
        (DNS rebinding), so that there only loopback's names are taken.
        """
        if self.allowed_hosts or self.host not in _LOOPBACK:
            return self.allowed_hosts
        return _LOOPBACK

    def runtime_options(self) -> dict[str, Any]:
        """The keywords of `Runtime.from_pretrained`."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.metadata["model"]}

    def to_toml(self) -> str:
        """The settings as a file for `--config`, keys hidden; what is not set stands in a comment."""
        lines = []
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name == "api_key":
                value = tuple(HIDDEN for _ in value)
            lines.append(f"# {one.name} is not set" if value is None else f"{one.name} = {_toml(value)}")
        return "\n".join(lines) + "\n"


def load_settings(
    flags: Mapping[str, Any], *, config: str | Path | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Settings of what was given: flags (None: not given) over variables over the file `config` over defaults.

    Raises `ConfigError` for an unknown key of the file or a value out of range, with where it stands.
    """
    environ = os.environ if environ is None else environ
    given = {} if config is None else _read_file(Path(config))
    for one in fields(Settings):
        variable = f"{PREFIX}{one.name.upper()}"
        if environ.get(variable):
            given[one.name] = one.metadata["read"](variable, environ[variable])
    given |= {name: value for name, value in flags.items() if value is not None}
    return Settings(**given)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--config {path}: not TOML: {error}") from None
    known = {one.name: one for one in fields(Settings)}
    given = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(f"--config {path}: {key} is not a setting; known: {', '.join(known)}")
        given[name] = known[name].metadata["read"](f"--config {path}: {key}", value)
    return given


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
