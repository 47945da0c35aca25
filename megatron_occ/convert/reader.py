"""What an export asks of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_occ.convert.slots import Slot


class Reader(Protocol):
    """Parameters to write; ``DistributedReader`` is one."""

    def dtype(self, slot: Slot) -> torch.dtype: ...

    def tensor(self, slot: Slot) -> Tensor: ...

    def check(self, slots: Sequence[Slot]) -> None: ...
