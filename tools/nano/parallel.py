"""Several single-threaded workers that train one model: on a busy CPU they waste less than the threads of one.

Start a stage with `torchrun --nproc-per-node 2 ...`; started plainly it is a single worker.
"""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def join_workers() -> tuple[int, int]:
    """This worker's rank and how many there are."""
    workers = int(os.environ.get("WORLD_SIZE", "1"))
    if workers > 1:
        dist.init_process_group("gloo")
    return int(os.environ.get("RANK", "0")), workers


def average_gradients(parameters: Sequence[nn.Parameter], workers: int, fraction: float) -> float:
    """Makes every worker's gradients their mean; returns the mean of `fraction`, so that all stop together."""
    if workers == 1:
        return fraction
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(grad.flatten() for grad in grads), Tensor([fraction])])
    dist.all_reduce(flat)
    flat /= workers
    start = 0
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = flat[start : start + grad.numel()].view_as(grad)
        start += grad.numel()
    return float(flat[-1])
