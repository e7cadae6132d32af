"""Threads, markers and sampling for every test."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports torch. One thread a process: the models are tiny, workers share the cores, and sums are added
# in the same order on every machine. No test reaches for the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# Triton decides when a kernel is defined whether its interpreter or its compiler runs it.
if not any(Path(file).exists() for file in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ["TRITON_INTERPRET"] = "1"

# A machine under load must not fail a test by its clock; CI draws the same examples every time.
settings.register_profile("vitrail", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("vitrail")

SMOKE_EXAMPLES = 10


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smoke", action="store_true", help="one parameter set of every test, few examples of every property"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            skip = pytest.mark.skip(reason="no CUDA device")
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(skip)
    if config.getoption("--smoke"):
        keep_one_of_each(config, items)


def _is_long(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("slow")
    return marker is not None and not marker.kwargs.get("smoke", True)


def keep_one_of_each(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect all parameter sets but the first of each test function, and draw few examples where it draws any.

    What takes minutes whatever is drawn is marked `slow(smoke=False)`.
    """
    first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
    dropped = [item for item in items if first[item.nodeid.partition("[")[0]] is not item or _is_long(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]
    for item in items:
        function = getattr(item, "obj", None)
        # Hypothesis keeps a test's settings under this name, and has no public way to lower them from outside.
        chosen = getattr(function, "_hypothesis_internal_use_settings", None)
        if chosen is not None:
            lowered = settings(chosen, max_examples=min(chosen.max_examples, SMOKE_EXAMPLES))
            function._hypothesis_internal_use_settings = lowered
