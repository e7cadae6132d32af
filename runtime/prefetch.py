"""Work done a little ahead of where it is wanted, in threads: Pillow decodes and resizes without holding the GIL."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

WORKERS = min(16, os.cpu_count() or 1)


def prefetched(make: Callable[[Item], Made], items: Iterable[Item], ahead: int) -> Iterator[Made]:
    """`make` of every item, in order; at most `ahead` results wait in memory."""
    pool = ThreadPoolExecutor(WORKERS)
    waiting: deque[Future[Made]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`items` in lists of `size`, the last one shorter."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
