"""What is computed from a tile of logits, as one kernel each: for GPUs.

A GPU takes as long for a softmax as for reading and writing logits. Operation by operation that is
ten times what one kernel takes, which reads logits in the precision of matrix products and keeps
what is wider in registers. ``torch.compile`` makes the kernels; uncompiled the functions are those
of ``head_passes.py`` up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_occ.mcore.vocabulary.tiles import SoftmaxSums


@functools.cache
def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as a kernel for tensors of any size."""
    return torch.compile(function, dynamic=True)


def tile_sums(
    logits: Tensor,
    position: tuple[Tensor, Tensor],
    first_id: int,
    temperature: float,
    wanted: tuple[bool, bool],
) -> SoftmaxSums:
    """Softmax sums of a tile.

    Args:
        logits: [rows, columns], undivided, in the precision of matrix products.
        position: column of each row's target, and whether it is in this tile; each [rows].
        first_id: token id of the first column.
        temperature: divides the logits.
        wanted: whether entropies and whether top ids are.
    """
    want_entropy, want_top = wanted
    column, owned = position
    function = _sums_and_entropy if want_entropy else _sums
    maximum, total, picked, *weighted = kernel(function)(logits, column, owned, temperature)
    top_ids = logits.argmax(-1) + first_id if want_top else None
    return SoftmaxSums(maximum, total, picked, weighted[0] if weighted else None, top_ids)


def logit_gradient(
    logits: Tensor,
    position: tuple[Tensor, Tensor],
    temperature: float,
    log_z: Tensor,
    scale: Tensor,
    entropy_terms: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Gradient of undivided logits, in their precision.

    Args:
        logits: [rows, columns], as in :func:`tile_sums`.
        position: likewise.
        temperature: likewise.
        log_z: normalisers; [rows], as the rest.
        scale: gradients of the log-probs, divided by the temperature.
        entropy_terms: slope, the gradients of the entropies by the temperature, and
            slope * entropy + scale; None: nothing flows back from an entropy.
    """
    column, owned = position
    if entropy_terms is None:
        return kernel(_gradient)(logits, column, owned, temperature, log_z, scale)
    given = (log_z, scale, *entropy_terms)
    return kernel(_gradient_and_entropy)(logits, column, owned, temperature, *given)


def add(total: Tensor, product: Tensor) -> None:
    """Add a product to a total of higher precision, in place."""
    kernel(_add)(total, product)


def _add(total: Tensor, product: Tensor) -> None:
    total.add_(product)


def _divided(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1.0 else wide / temperature


def _picked(scaled: Tensor, column: Tensor, owned: Tensor) -> Tensor:
    return torch.where(owned, scaled.gather(-1, column[:, None]).squeeze(-1), 0.0)


def _sums(
    logits: Tensor, column: Tensor, owned: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    scaled = _divided(logits, temperature)
    maximum = scaled.amax(-1)
    total = (scaled - maximum[:, None]).exp().sum(-1)
    return maximum, total, _picked(scaled, column, owned)


def _sums_and_entropy(
    logits: Tensor, column: Tensor, owned: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scaled = _divided(logits, temperature)
    maximum = scaled.amax(-1)
    centred = scaled - maximum[:, None]
    exps = centred.exp()
    return maximum, exps.sum(-1), _picked(scaled, column, owned), (exps * centred).sum(-1)


def _at_target(logits: Tensor, column: Tensor, owned: Tensor, scale: Tensor) -> Tensor:
    """The target's own part, d log p_y / d logit = onehot(y) - p."""
    columns = torch.arange(logits.size(-1), device=logits.device)
    is_target = (columns == column[:, None]) & owned[:, None]
    return torch.where(is_target, scale[:, None], 0.0)


def _gradient(
    logits: Tensor, column: Tensor, owned: Tensor, temperature: float, log_z: Tensor, scale: Tensor
) -> Tensor:
    probabilities = (_divided(logits, temperature) - log_z[:, None]).exp()
    grad = _at_target(logits, column, owned, scale) - probabilities * scale[:, None]
    return grad.to(logits.dtype)


def _gradient_and_entropy(
    logits: Tensor,
    column: Tensor,
    owned: Tensor,
    temperature: float,
    log_z: Tensor,
    scale: Tensor,
    slope: Tensor,
    offset: Tensor,
) -> Tensor:
    log_probs = _divided(logits, temperature) - log_z[:, None]
    # d H / d logit = -p (log p + H)
    weights = log_probs * slope[:, None] + offset[:, None]
    grad = _at_target(logits, column, owned, scale) - log_probs.exp() * weights
    return grad.to(logits.dtype)
