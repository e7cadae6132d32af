"""How the parity tests compare, and where their figures go."""

from collections.abc import Callable

import pytest
from torch import Tensor

Compare = Callable[..., None]

# Both sides compute in fp32 and differ only in the order of sums (fused against separate attention, one projection of
# [q | k | v] against three, a matrix product against a convolution). A sum of a few hundred terms then differs by a few
# fp32 roundings of 6e-8, and three to six layers pass that on: some 1e-6 of the largest value. A wrong eps, a missing
# bias or a swapped axis shows at 1e-3 or above.
RELATIVE_BOUND = 5e-6


@pytest.fixture
def compare(record_property: Callable[[str, object], None]) -> Compare:
    """Assert that two fp32 tensors agree to `RELATIVE_BOUND` of the largest value; print and record the error."""

    def check(what: str, ours: Tensor, theirs: Tensor) -> None:
        assert ours.shape == theirs.shape, what
        assert ours.isfinite().all(), what
        scale = theirs.abs().max().item()
        error = (ours - theirs).abs().max().item()
        record_property(what, error / scale)
        print(f"parity: {what}: max |error| {error:.1e}, {error / scale:.1e} of the largest value {scale:.3g}")
        assert error <= RELATIVE_BOUND * scale, what

    return check
