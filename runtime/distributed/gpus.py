"""GPUs that `vitrail plan` knows: their datasheets, and what share of those each stage is taken to reach."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import ConfigError


@dataclass(frozen=True)
class Shares:
    """What a stage reaches of a datasheet's rate. `source` says how far it can be trusted.

    vision, prefill: of the products of a type of numbers. weights: of bandwidth, when decoding reads weights of so many
    bits. kv: of bandwidth, when it reads keys and values.
    """

    vision: Mapping[str, float]
    vision_attention: float
    elementwise: float
    prefill: Mapping[str, float]
    prefill_attention: float
    weights: Mapping[int, float]
    kv: float
    source: str


@dataclass(frozen=True)
class Gpu:
    """A datasheet: GB, dense TFLOP/s by type of numbers, TB/s of memory; and what an all-reduce between two takes.

    reduce_us, reduce_gb_s: of a short one, and of a long one. devices: names that `bench/results` has for it.
    capability: CUDA's.
    """

    name: str
    memory_gb: float
    tflops: Mapping[str, float]
    bandwidth: float
    reduce_us: float
    reduce_gb_s: float
    shares: Shares
    devices: tuple[str, ...]
    capability: tuple[int, int]


AMPERE = Shares(
    vision={"bf16": 0.82, "int8": 0.76},
    vision_attention=0.68,
    elementwise=0.87,
    prefill={"bf16": 0.80, "int8": 0.70},
    prefill_attention=0.50,
    weights={16: 0.82, 8: 0.72, 4: 0.65},
    kv=0.75,
    source="published rates of single kernels on an A100 (cuBLAS 82 %, CUTLASS int8 80 %, FlashAttention 68 % of peak, "
    "gpt-fast 82 % of copy bandwidth); the whole was not measured",
)
HOPPER = Shares(
    vision={"bf16": 0.78, "int8": 0.62, "fp8": 0.68},
    vision_attention=0.57,
    elementwise=0.896,
    prefill={"bf16": 0.76, "int8": 0.58, "fp8": 0.64},
    prefill_attention=0.43,
    weights={16: 0.74, 8: 0.65, 4: 0.58},
    kv=0.70,
    source="copy and cuBLAS bf16 measured on an H200 (4.3 TB/s, 769 to 798 TFLOP/s), the rest published rates of "
    "single kernels on an H100 or estimates; the whole was not measured",
)
ADA = Shares(
    vision={"bf16": 0.70, "int8": 0.60},
    vision_attention=0.55,
    elementwise=0.85,
    prefill={"bf16": 0.68, "int8": 0.56},
    prefill_attention=0.45,
    weights={16: 0.85, 8: 0.80, 4: 0.75},
    kv=0.75,
    source="estimates: no published rate of this GPU was found",
)
_A100 = {"bf16": 312, "int8": 624}
_HOPPER = {"bf16": 989, "int8": 1979, "fp8": 1979}

# Datasheets: NVIDIA's. An L40S has no NVLink: its all-reduces go over PCIe 4. It has fp8 products, for which vitrail
# has no kernels before Hopper. All-reduces of an A100: the placement model's; the others: judged by their links.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 40, _A100, 1.555, 12, 240, AMPERE, ("a100-sxm4-40gb", "a100-pcie-40gb"), (8, 0)),
        Gpu("a100-80gb", 80, _A100, 2.039, 12, 240, AMPERE, ("a100-sxm4-80gb", "a100-80gb-pcie"), (8, 0)),
        Gpu("h100", 80, _HOPPER, 3.35, 10, 360, HOPPER, ("h100-80gb-hbm3",), (9, 0)),
        Gpu("h200", 141, _HOPPER, 4.8, 10, 360, HOPPER, ("h200",), (9, 0)),
        Gpu("l40s", 48, {"bf16": 362, "int8": 733}, 0.864, 25, 20, ADA, ("l40s",), (8, 9)),
    )
}


def nearest_gpu(device: str, memory_gb: float, capability: tuple[int, int]) -> tuple[Gpu, bool]:
    """The row for a GPU by its name in `bench/results`, and whether it is that GPU's own.

    One that has none is taken for the row of the nearest compute capability from below, or the lowest, and there of the
    nearest memory; its memory is its own.
    """
    for gpu in GPUS.values():
        if device in gpu.devices:
            return gpu, True
    known = sorted({gpu.capability for gpu in GPUS.values()})
    below = max((one for one in known if one <= capability), default=known[0])
    alike = [gpu for gpu in GPUS.values() if gpu.capability == below]
    return replace(min(alike, key=lambda gpu: abs(gpu.memory_gb - memory_gb)), memory_gb=memory_gb), False


def find_gpu(name: str) -> Gpu:
    """The row of a GPU; raises `ConfigError` with the known ones."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(f"--gpu {name}: unknown; known: {', '.join(GPUS)}")
    return gpu
