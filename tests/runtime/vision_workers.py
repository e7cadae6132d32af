"""Workers of the vision half for tests: threads of this process that answer when they like, in any order."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from time import sleep

import pytest
import torch

from vitrail.runtime import api as api_module
from vitrail.runtime.api import Runtime
from vitrail.runtime.engine.engine import Engine
from vitrail.runtime.errors import VitrailError


class ThreadWorkers:
    """`VisionWorkers` of one model. gate: they answer only while it is set; most: tiles that were in flight at once."""

    def __init__(self, model, capacity=4, threads=3):
        self.model, self.capacity = model, capacity
        self.gate = threading.Event()
        self.gate.set()
        self.most = 0
        self.calls = 0
        self._in_flight = self._unanswered = 0
        self._changed = threading.Condition()
        self._draw = random.Random(0)
        self._pool = ThreadPoolExecutor(threads)

    def encode(self, tiles, done):
        with self._changed:
            self.calls += 1
            self._in_flight += len(tiles)
            self._unanswered += 1
            self.most = max(self.most, self._in_flight)
        self._pool.submit(self._run, tiles, done, self._draw.choice([0, 0, 0, 0.001, 0.003]))

    def _run(self, tiles, done, delay):
        sleep(delay)
        assert self.gate.wait(30)
        try:
            with torch.inference_mode():
                result = self.model.encode_tiles(tiles).flatten(0, 1)
        except Exception as error:
            result = VitrailError(f"a worker failed: {error}")
        with self._changed:  # before the engine hears of it, which may send more at once
            self._in_flight -= len(tiles)
        done(result)
        with self._changed:
            self._unanswered -= 1
            self._changed.notify_all()

    def settle(self):
        """Wait until everything has been answered."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._unanswered == 0, 30)

    def stats(self):
        return {"workers": 1, "alive": 1}

    def close(self):
        self._pool.shutdown()


def split_runtime(parts, workers, **options):
    """A Runtime whose engine has its vision half on `workers`."""

    def build(*arguments, **keywords):
        return Engine(*arguments, **{**keywords, "vision": workers})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api_module, "Engine", build)
        return Runtime(*parts, **options)
