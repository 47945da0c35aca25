"""A number made of the bits of tensors: equal weights have one, and others hardly ever have."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# a prime below 2^31, so that a product with a 32-bit word stays within 63 bits
_PRIME = 2_147_483_629
_CHUNK = 2**20
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """A fingerprint of tensors in their order, computed where they are.

    Each element's bits count times a weight that depends on its position. It tells weights that
    moved from those that did not; it is no protection against somebody who means harm.

    Args:
        tensors: of any shapes and types of up to eight bytes.

    Returns:
        A number from 0 to 2^31.
    """
    total = 0
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
        own = 0
        for first in range(0, bits.numel(), _CHUNK):
            part = bits[first : first + _CHUNK].to(torch.int64) % _PRIME
            weights = torch.arange(first + 1, first + 1 + part.numel(), device=bits.device)
            own += int((part * (weights % _PRIME) % _PRIME).sum())
        # the order of tensors counts, and an empty one does too
        total = (total * 31 + own + 1) % _PRIME
    return total
