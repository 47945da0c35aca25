"""MTP layers that read the trunk's state after the final norm, in a family that reads it before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_occ.convert.reader import Reader
from megatron_occ.convert.slots import Slot


class BeforeFinalNorm:
    """Weights for a reader whose MTP layer gets the trunk's state before the final norm.

    The checkpoint's MTP layers get it after the norm (``model.mtp_reads=after``). A norm after a
    norm is one norm whose weight is the product, up to a factor that depends on the token, the root
    mean square of what the first one gives. That is near the root mean square of the first norm's
    weight, which is divided out here: drafts are nearly those of the trainer, and exactly
    those where the norm's weights are equal. Responses are the same in any case.

    Args:
        reader: of the weights as they are.
    """

    _FINAL = "decoder.final_layernorm.weight"

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def check(self, slots: Sequence[Slot]) -> None:
        """See ``DistributedReader``."""
        self._reader.check(slots)

    def dtype(self, slot: Slot) -> torch.dtype:
        """See ``DistributedReader``."""
        return self._reader.dtype(slot)

    def tensor(self, slot: Slot) -> Tensor:
        """See ``DistributedReader``; of the norm of hidden states the product."""
        found = self._reader.tensor(slot)
        if not slot.name.endswith(".hnorm.weight"):
            return found
        final = Slot(self._FINAL, self._FINAL, slot.shape, slot.shape, (0,))
        wide = self._reader.tensor(final).float()
        return (found.float() * wide / wide.square().mean().sqrt()).to(found.dtype)
