"""Which device does what: from the options of `Runtime.from_pretrained` and the GPUs that there are.

`place` asks no driver: what it decides for eight GPUs is tested on a machine without one.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..config import InternVLConfig
from ..errors import ConfigError, UnsupportedError
from ..quantization.config import QuantizationConfig
from .gpus import nearest_gpu
from .plan import make_planner
from .planner import Planner, Prediction
from .workload import Kind, workload_of

PLACEMENTS = ("auto", "colocated", "split", "replicas")
# What the planner chooses for, where nobody says: that of `vitrail plan`, with less of a model that sees less.
USUAL = Kind(7, 64, 256)
# What a placement must promise more than replicas to be chosen: costs that nobody measured are not better than that.
WORTH = 1.05
# What methods without measured costs are taken for.
_LIKE = {"nf4": "int4", "bnb-int8": "int8-weight"}

_log = logging.getLogger("vitrail")


@dataclass(frozen=True)
class GpuInfo:
    """A GPU as its driver describes it."""

    name: str
    memory_gb: float
    capability: tuple[int, int]

    @property
    def slug(self) -> str:
        """Its name in `bench/results`."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower().removeprefix("nvidia ")).strip("-")


def visible_gpus() -> list[GpuInfo]:
    """What CUDA sees, in its order."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        found.append(GpuInfo(facts.name, facts.total_memory / 1e9, (facts.major, facts.minor)))
    return found


@dataclass(frozen=True)
class Placement:
    """llm_devices: `tensor_parallel_size` of them for each of the `replicas` of the language half, one after the other.

    vision_devices: they encode for all of these; if there are none, each replica encodes on its own devices.
    """

    replicas: int
    tensor_parallel_size: int
    llm_devices: tuple[str, ...]
    vision_devices: tuple[str, ...] = ()

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The devices of each language half."""
        size = self.tensor_parallel_size
        return [self.llm_devices[first : first + size] for first in range(0, len(self.llm_devices), size)]


def place(
    config: object,
    *,
    device: str | torch.device | None = None,
    placement: str = "auto",
    vision_devices: Sequence[str] | None = None,
    llm_devices: Sequence[str] | None = None,
    tensor_parallel_size: int = 1,
    quantization: str | QuantizationConfig | None = None,
    vision_quantization: str | None = None,
    dtype: str | torch.dtype = "bfloat16",
    visible: Sequence[GpuInfo] = (),
) -> Placement:
    """The devices of a model. visible: the GPUs, if any; config: only chat models go on more than one device.

    One device, unless more is asked for or several GPUs are visible and nothing is asked for: then the planner chooses.
    Raises `ConfigError` for options that contradict each other, `UnsupportedError` where devices are missing.
    """
    asked = _Asked(
        device=None if device is None else _device("device", device, visible),
        placement=_one_of("placement", placement, PLACEMENTS),
        vision=_device_list("vision_devices", vision_devices, visible),
        llm=_device_list("llm_devices", llm_devices, visible),
        size=_positive("tensor_parallel_size", tensor_parallel_size),
    )
    asked.check()
    if not isinstance(config, InternVLConfig):
        if asked.spreads:
            raise UnsupportedError(f"{asked.spreads}: only chat models go on more than one device")
        return _alone(asked.device or ("cuda:0" if visible else "cpu"))

    def choose(gpus: Sequence[int], wanted: Callable[[Prediction], bool]) -> Placement | None:
        method = (
            quantization
            if isinstance(quantization, QuantizationConfig)
            else QuantizationConfig(quantization, vision_quantization)
        )
        return _planned(config, method, str(dtype).endswith("float32"), [visible[gpu] for gpu in gpus], gpus, wanted)

    if asked.vision or asked.llm:
        return _listed(asked, visible)
    if asked.device == "cpu" or not visible:
        vision = ("cpu",) if asked.placement == "split" else ()
        return Placement(1, asked.size, ("cpu",) * asked.size, vision)
    return _on_gpus(asked, visible, choose)


@dataclass(frozen=True)
class _Asked:
    """The options, each by itself checked. device: as given."""

    device: str | None
    placement: str
    vision: tuple[str, ...]
    llm: tuple[str, ...]
    size: int

    @property
    def spreads(self) -> str:
        """The option that asks for more than one device, as it was given; empty if none does."""
        options = {
            "vision_devices": list(self.vision) or None,
            "llm_devices": list(self.llm) if len(self.llm) > 1 else None,
            "tensor_parallel_size": self.size if self.size > 1 else None,
            "placement": self.placement if self.placement in ("split", "replicas") else None,
        }
        return next((f"{name}={value!r}" for name, value in options.items() if value), "")

    def check(self) -> None:
        """Raises `ConfigError` for options that do not go together."""
        lists = {"vision_devices": self.vision, "llm_devices": self.llm}
        for name, devices in lists.items():
            if devices and self.device is not None:
                raise ConfigError(f"device={self.device!r} and {name}={list(devices)}: give one of the two")
        if self.vision and self.placement in ("colocated", "replicas"):
            raise ConfigError(
                f"placement={self.placement!r} and vision_devices={list(self.vision)}: the vision half has devices of "
                f"its own only in placement 'split'"
            )
        one_gpu = self.device is not None and self.device.startswith("cuda:")
        if one_gpu and self.spreads:
            raise ConfigError(f"device={self.device!r} and {self.spreads}: one device cannot hold what takes several")
        if self.llm and len(self.llm) % self.size:
            raise ConfigError(
                f"llm_devices={list(self.llm)} and tensor_parallel_size={self.size}: {len(self.llm)} devices make no "
                f"whole number of groups of {self.size}"
            )
        if self.placement == "colocated" and len(self.llm) > self.size:
            raise ConfigError(
                f"placement='colocated' and llm_devices={list(self.llm)}: that would be {len(self.llm) // self.size} "
                f"replicas of tensor_parallel_size={self.size}"
            )
        twice = {name for name in set(self.vision) & set(self.llm) if name != "cpu"}
        if twice:
            raise ConfigError(
                f"vision_devices and llm_devices both have {', '.join(sorted(twice))}: halves that share a device are "
                f"placement 'colocated'"
            )


def _listed(asked: _Asked, visible: Sequence[GpuInfo]) -> Placement:
    """Devices by name; of the half that has no list, those that are left."""
    vision, llm, size = asked.vision, asked.llm, asked.size
    if not llm:
        left = [name for name in _all(visible) if name not in vision] if visible else ["cpu"] * size
        if len(left) < size:
            raise UnsupportedError(
                f"vision_devices={list(vision)} leaves {len(left)} of {len(visible)} visible GPUs to the language "
                f"half, which takes tensor_parallel_size={size}"
            )
        llm = tuple(left[: len(left) // size * size])
    elif asked.placement == "split" and not vision:
        vision = ("cpu",) if llm[0] == "cpu" else tuple(name for name in _all(visible) if name not in llm)
        if not vision:
            raise UnsupportedError(
                f"placement='split' with llm_devices={list(llm)} leaves none of {len(visible)} visible GPUs to the "
                f"vision half"
            )
    return Placement(len(llm) // size, size, llm, vision)


def _on_gpus(
    asked: _Asked,
    visible: Sequence[GpuInfo],
    choose: Callable[[Sequence[int], Callable[[Prediction], bool]], Placement | None],
) -> Placement:
    """GPUs without a list of them."""
    size, names = asked.size, _all(visible)
    needed = size + (asked.placement == "split")
    if needed > len(names):
        raise UnsupportedError(f"{asked.spreads} takes at least {needed} GPUs; {len(names)} are visible")
    if asked.placement == "split":
        found = choose(
            _alike(visible),
            lambda one: one.placement.kind == "split" and size in (1, one.placement.tensor_parallel),
        )
        if found is None:  # costs and memory as unknown as that: a GPU for vision, the others in groups
            groups = (len(names) - 1) // size
            found = Placement(groups, size, tuple(names[1 : 1 + groups * size]), (names[0],))
        return found
    if asked.placement == "replicas":
        count = len(names) // size
        return Placement(count, size, tuple(names[: count * size]))
    if size > 1 or asked.placement == "colocated" or asked.device is not None or len(names) == 1:
        return _alone(asked.device or names[0]) if size == 1 else Placement(1, size, tuple(names[:size]))
    found = choose(_alike(visible), lambda _: True)
    return _alone(names[0]) if found is None else found


def _alone(device: str) -> Placement:
    return Placement(1, 1, ("cuda:0" if device == "cuda" else device,))


def _planned(
    config: InternVLConfig,
    quantization: QuantizationConfig,
    is_wide: bool,
    infos: Sequence[GpuInfo],
    indices: Sequence[int],
    wanted: Callable[[Prediction], bool],
) -> Placement | None:
    """The planner's best of the wanted placements, None where it cannot tell. is_wide: numbers of 32 bits.

    Raises `CapacityError` where the model fits in no way.
    """
    smallest = min(infos, key=lambda info: info.memory_gb)
    gpu, known = nearest_gpu(smallest.slug, smallest.memory_gb, smallest.capability)
    if not known:
        _log.warning("placement: %s is not known; its costs are taken to be those of a %s", smallest.name, gpu.name)
    if is_wide:  # weights, activations, keys and values take twice the room
        gpu = replace(gpu, memory_gb=gpu.memory_gb / 2)
    llm, vision = (_LIKE.get(one or "", one) for one in (quantization.llm, quantization.vision))
    method = QuantizationConfig(llm, vision)
    try:
        planner, _ = make_planner("", config, gpu, method, workload_of(config, [_usual(config)]))
    except UnsupportedError as error:  # of a method that this GPU has no kernels for: loading will say so
        _log.warning("placement: %s; nothing was planned", error)
        return None
    planner.check_fits(len(infos))
    best = _best(planner, len(infos), wanted)
    if best is None:
        return None
    chosen, names = best.placement, [f"cuda:{index}" for index in indices]
    _log.info("placement: %s; %.2f requests a second expected of requests of %s", chosen, best.requests_per_s, USUAL)
    return Placement(
        chosen.groups, chosen.tensor_parallel, tuple(names[chosen.encoders :]), tuple(names[: chosen.encoders])
    )


def _best(planner: Planner, gpus: int, wanted: Callable[[Prediction], bool]) -> Prediction | None:
    """The most requests a second, or what has fewer parts and nearly as many."""
    found = [one for one in planner.predictions(gpus) if wanted(one)]
    if not found:
        return None
    enough = found[0].requests_per_s / WORTH
    return min(
        (one for one in found if one.requests_per_s >= enough),
        key=lambda one: (one.placement.encoders > 0, one.placement.tensor_parallel),
    )


def _usual(config: InternVLConfig) -> Kind:
    """The usual request, with as many tiles as the model takes of it and text that its context has room for."""
    tiles = min(USUAL.tiles, config.max_dynamic_patch + config.use_thumbnail) if config.dynamic_image_size else 1
    room = config.llm.max_model_len
    tiles = max(1, min(tiles, room // 2 // config.tokens_per_tile))
    left = max(2, room - tiles * config.tokens_per_tile)
    return Kind(tiles, min(USUAL.prompt, left // 2), min(USUAL.output, left // 2))


def _alike(visible: Sequence[GpuInfo]) -> list[int]:
    """The GPUs of the kind there are most of, of several such the one with most memory."""
    counts = Counter(info.name for info in visible)
    kind = max(visible, key=lambda info: (counts[info.name], info.memory_gb)).name
    found = [index for index, info in enumerate(visible) if info.name == kind]
    if len(found) < len(visible):
        _log.warning("placement: the GPUs are not alike; of %d, the %d %s are used", len(visible), len(found), kind)
    return found


def _all(visible: Sequence[GpuInfo]) -> list[str]:
    return [f"cuda:{index}" for index in range(len(visible))]


# --- options, each by itself ---


def _device_list(option: str, devices: Sequence[str] | None, visible: Sequence[GpuInfo]) -> tuple[str, ...]:
    """Names as "cpu" or "cuda:0", all of one type; an empty list is as good as None."""
    if devices is None:
        return ()
    if isinstance(devices, str) or not isinstance(devices, Sequence):
        raise ConfigError(f"{option} must be a list of devices like ['cuda:0'], not {devices!r}")
    names = []
    for device in devices:
        name = _device(option, device, visible)
        name = "cuda:0" if name == "cuda" else name
        if name != "cpu" and name in names:
            raise ConfigError(f"{option}={list(devices)}: {name} stands there twice")
        names.append(name)
    if "cpu" in names and len(set(names)) > 1:
        raise ConfigError(f"{option}={list(devices)}: CPU and GPUs do not share a half")
    return tuple(names)


def _device(option: str, device: object, visible: Sequence[GpuInfo]) -> str:
    """A device that is there: "cpu", "cuda" for whichever GPU, or "cuda:1"."""
    name = str(device)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"{option}: device {name!r} is not known; use 'cpu', 'cuda' or 'cuda:1'")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= len(visible):
        raise UnsupportedError(f"{option} {name}: {len(visible)} CUDA devices are visible")
    return name


def _one_of(option: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ConfigError(f"{option} {value!r} is not known; known: {', '.join(known)}")
    return value


def _positive(option: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{option} must be a positive integer, not {value!r}")
    return value
