"""What may be locked is compared with all that is locked, not with one slot."""

import pytest
import torch

from zo.errors import UserError
from zo.io import hardware
from zo.io.engines import DeepNvme


class Handle:
    """Stands in for DeepSpeed's, which needs libaio to be built."""

    def new_cpu_locked_tensor(self, size, like):
        return torch.empty(size, dtype=like.dtype)


def test_slots_that_together_are_over_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr("zo.io.engines._deepnvme_handle", lambda: lambda *settings: Handle())
    monkeypatch.setattr(hardware, "lockable_bytes", lambda: 3.0 * 2**20)
    engine = DeepNvme()
    engine.allocate(2 * 2**20)
    with pytest.raises(
        UserError, match=r"needs 4194304 bytes of host memory that is locked.*may lock 3145728"
    ):
        engine.allocate(2 * 2**20)
    engine.allocate(2**20)
