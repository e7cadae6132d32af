"""What of memory a kernel touches under Triton's interpreter."""

import pytest
from torch import Tensor


def forbid_access_outside(tensors: list[Tensor], patch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter check what it otherwise does not: that every access stays within one of the tensors."""
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def check(ptrs, mask) -> None:
        addresses = ptrs.data[mask.data].astype("int64")
        if addresses.size:
            first, last = addresses.min(), addresses.max()
            assert any(t.data_ptr() <= first and last <= t[(-1,) * t.ndim].data_ptr() for t in tensors)

    def checked_load(self, ptrs, mask, *rest, **options):
        check(ptrs, mask)
        return load(self, ptrs, mask, *rest, **options)

    def checked_store(self, ptrs, value, mask, *rest, **options):
        check(ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **options)

    patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    patch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
