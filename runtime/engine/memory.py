"""How much memory keys and values begin with."""

from ..errors import CapacityError
from ..layers.kv_cache import BLOCK_SIZE
from .block_manager import BlockManager
from .runner import Runner

# Keys and values on a CPU begin with this much and grow as they are needed.
_FIRST_MEMORY = 64 * 2**20


def first_blocks(runner: Runner, gpu_memory_utilization: float) -> BlockManager:
    """The blocks to begin with: all that fit on a GPU, at once; elsewhere memory is taken as requests need it."""
    useful = runner.max_num_seqs * -(-runner.max_model_len // BLOCK_SIZE)
    limit = max(0, runner.spare_bytes(gpu_memory_utilization)) // runner.block_bytes
    if runner.device.type != "cuda":
        first = min(_FIRST_MEMORY // runner.block_bytes, useful, limit)
        return BlockManager(max(1, first), BLOCK_SIZE, limit=limit)
    num_blocks = min(limit, useful)
    if not num_blocks:
        raise CapacityError(f"{runner.device}: the weights leave no memory for keys and values")
    runner.allocate(num_blocks, keep=False)
    return BlockManager(num_blocks, BLOCK_SIZE)
