"""How much memory keys and values may take."""

import re
from pathlib import Path

import torch

from ..errors import CapacityError
from ..layers.kv_cache import BLOCK_SIZE, KVCache
from .block_manager import BlockManager
from .runner import Runner

# What keys and values may take where the system does not tell how much memory is available.
_UNKNOWN_MEMORY = 4 * 2**30
# Keys and values on a CPU begin with this much and grow as they are needed.
_FIRST_MEMORY = 64 * 2**20


def first_blocks(runner: Runner, gpu_memory_utilization: float) -> BlockManager:
    """The blocks to begin with: all that fit on a GPU, at once; elsewhere memory is taken as requests need it."""
    device, block_bytes = runner.device, KVCache.bytes_per_block(runner.config.llm, runner.cache_dtype)
    useful = runner.max_num_seqs * -(-runner.max_model_len // BLOCK_SIZE)
    if device.type != "cuda":
        limit = _half_of_available() // block_bytes
        return BlockManager(max(1, min(_FIRST_MEMORY // block_bytes, useful, limit)), BLOCK_SIZE, limit=limit)
    torch.cuda.empty_cache()  # what loading and warming up have freed counts as free
    free, total = torch.cuda.mem_get_info(device)
    spare = free - runner.vision_bytes - int((1 - gpu_memory_utilization) * total)
    num_blocks = min(max(0, spare) // block_bytes, useful)
    if not num_blocks:
        raise CapacityError(f"{device}: the weights leave no memory for keys and values")
    runner.allocate(num_blocks, keep=False)
    return BlockManager(num_blocks, BLOCK_SIZE)


def _half_of_available() -> int:
    try:
        # Not the free pages alone: a checkpoint that was just read still stands in the page cache.
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return int(found[1]) * 1024 // 2 if found else _UNKNOWN_MEMORY
