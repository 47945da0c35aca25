"""Gradients of a module's trunk taken apart: by loss, and multiplied with each other.

For a model in one process. Gradients are those of a whole mini-batch: with several micro-batches or
ranks add up the lists first, since inner products of parts do not add up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from megatron_occ.losses.exact import GradientProducts

# one tensor for each parameter, of its shape
Gradient = list[Tensor]


def trunk_gradients(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Gradient]:
    """The gradient of each loss, zeros for parameters that it does not reach.

    No ``.grad`` changes, and the graph stays: a backward pass can follow.

    Args:
        losses: scalars, RL's first by convention.
        parameters: of the trunk.

    Raises:
        ValueError: a loss that reaches none of the parameters.
    """
    return [_gradient(loss, number, list(parameters)) for number, loss in enumerate(losses)]


def _gradient(loss: Tensor, number: int, parameters: list[Tensor]) -> Gradient:
    parts: Sequence[Tensor | None] = [None]
    if loss.requires_grad:
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    if all(part is None for part in parts):
        raise ValueError(
            f"loss {number} reaches none of the {len(parameters)} parameters: "
            "is it cut off from the trunk, or are these not the trunk's?"
        )
    return [
        torch.zeros_like(parameter) if part is None else part
        for parameter, part in zip(parameters, parts, strict=True)
    ]


def gradient_products(
    left: Sequence[Gradient],
    right: Sequence[Gradient],
    *,
    groups: Sequence[int] | None = None,
    denominators: Sequence[Tensor] | None = None,
) -> Tensor:
    """Inner products [len(left), len(right), G], float64 on the CPU.

    Args:
        left: gradients.
        right: gradients.
        groups: number of each parameter's group, from 0; None: all are one.
        denominators: of each parameter, what a product of two entries is divided by
            (:func:`adam_denominators`); None: 1, the Euclidean inner product.
    """
    groups = [0] * len(left[0]) if groups is None else groups
    total = torch.zeros(len(left), len(right), 1 + max(groups), dtype=torch.float64)
    assert all(len(gradient) == len(groups) for gradient in (*left, *right)), "other parameters"
    for index, group in enumerate(groups):
        rows, columns = _stacked(left, index), _stacked(right, index)
        if denominators is not None:
            rows = rows / denominators[index].flatten().double()
        total[:, :, group] += (rows @ columns.T).cpu()
    return total


def _stacked(gradients: Sequence[Gradient], index: int) -> Tensor:
    """One parameter's part of each gradient, [n, entries] in float64."""
    return torch.stack([gradient[index].detach().flatten().double() for gradient in gradients])


def adam_denominators(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[Tensor]:
    """`sqrt(v) + eps` of each parameter, v the bias-corrected second moment.

    Adam divides the entries of an update by it (arXiv 1412.6980, algorithm 1). Inner products that
    are divided by it measure in the optimizer's metric.

    Entries that no update had a gradient for are infinite, so that they take no part: divided by
    eps alone they would be the whole product. Those of tokens that have long not been seen still
    weigh much: leave the embedding of a large vocabulary out of the trunk's parameters.

    Args:
        optimizer: ``torch.optim.Adam`` or ``AdamW``, without ``amsgrad``, or one with their state.
        parameters: of the trunk, all of them in the optimizer.

    Raises:
        ValueError: a parameter that the optimizer does not hold, or has not updated yet.
    """
    settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return [_denominator(optimizer, settings, parameter) for parameter in parameters]


def _denominator(optimizer: Optimizer, settings: dict[int, dict], parameter: Tensor) -> Tensor:
    group, state = settings.get(id(parameter)), optimizer.state.get(parameter, {})
    shape = list(parameter.shape)
    if group is None:
        raise ValueError(f"a parameter of shape {shape} is not in the optimizer: leave it out")
    if "exp_avg_sq" not in state or group.get("amsgrad"):
        raise ValueError(
            f"the optimizer has no second moment of a parameter of shape {shape}: use Adam or "
            "AdamW without amsgrad, and measure after its first update"
        )
    moment = state["exp_avg_sq"].double()
    correction = 1 - group["betas"][1] ** float(state["step"])
    return torch.where(moment > 0, (moment / correction).sqrt() + group["eps"], torch.inf)


class GradientWindow:
    """The gradients of the last mini-batches, with which those of the next are multiplied.

    Products with them are free of the noise that gradients of one mini-batch share, as long as the
    mini-batches are independent: other prompts, and no group of responses cut in two.

    Args:
        size: mini-batches that are kept, each with all its gradients.
        groups: number of each parameter's group, from 0; None: all are one.
    """

    def __init__(self, size: int, groups: Sequence[int] | None = None) -> None:
        self._groups = groups
        self._kept: deque[list[Gradient]] = deque(maxlen=size)

    def products(
        self, gradients: Sequence[Gradient], denominators: Sequence[Tensor] | None = None
    ) -> GradientProducts:
        """Inner products within a mini-batch and with those before it, which it then belongs to.

        Gradients that are not finite are not kept: see ``is_finite`` of the answer.

        Args:
            gradients: from :func:`trunk_gradients`: RL's, then that of each depth with weight 1.
            denominators: see :func:`gradient_products`.
        """
        now = list(gradients)
        others = [gradient for kept in self._kept for gradient in kept]
        found = GradientProducts.from_blocks(
            gradient_products(now, [*now, *others], groups=self._groups, denominators=denominators)
        )
        if found.is_finite:
            self._kept.append(now)
        return found
