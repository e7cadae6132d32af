"""Training by the clock: a CPU and a GPU see very different numbers of pictures in the same minutes."""

import time


class Clock:
    """How much of the time given to a stage has passed."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.start = time.perf_counter()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @property
    def fraction(self) -> float:
        return self.elapsed / self.seconds


def learning_rate(step: int, fraction: float, decay_from: float, warmup: int = 100) -> float:
    """A share of the peak rate: a short rise by steps, a plateau, then linearly to zero from `decay_from` on."""
    decay = min(1.0, max(0.0, (1 - fraction) / (1 - decay_from)))
    return min(1.0, (step + 1) / warmup) * decay
