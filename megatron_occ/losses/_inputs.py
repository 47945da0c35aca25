"""Input handling shared by the losses: masks, working precision, shape checks."""

from __future__ import annotations

import torch
from torch import Tensor

# exp(20) is 5e8: far outside of any clip range, and small enough not to overflow when multiplied
# by advantages and summed in float32.
MAX_LOG_RATIO = 20.0


def bounded(log_ratio: Tensor) -> Tensor:
    """A log-ratio within +- ``MAX_LOG_RATIO``, beyond which it has no gradient."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def as_bool_mask(mask: Tensor) -> Tensor:
    """Bool, integer or float mask -> bool mask of the same shape; anything non-zero is kept."""
    return mask if mask.dtype == torch.bool else mask != 0


def at_least_float32(values: Tensor) -> Tensor:
    """Half-precision and integer values as float32; float32 and float64 unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def neutralised(values: Tensor, keep: Tensor) -> Tensor:
    """`values` with exact zeros where `keep` is False, so that NaN or infinity there cannot spread.

    Zeroing before the arithmetic matters: multiplying by a mask afterwards gives `0 * inf = NaN`,
    in the value or in the gradient.
    """
    return torch.where(keep, at_least_float32(values), 0.0)


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError, naming both, when a tensor's shape differs from the first one's."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != reference.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, but {first} has "
                f"{list(reference.shape)}: give both the same shape"
            )
