"""Gradients of a module's trunk taken apart: by loss, and multiplied with each other.

For a model in one process. With several micro-batches or ranks add up the lists of gradients first,
since their inner products do not add up.
"""

from __future__ import annotations

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


def parts_by_prompt(prompts: Tensor, count: int) -> list[Tensor]:
    """Rows of each of ``count`` parts, for :func:`products_of_parts`.

    All rows of a prompt lie in one part. The most frequent prompt goes first, each into the part
    with the fewest rows: parts are equal where numbers of rows allow it, or nearly so.

    Args:
        prompts: [b] number or [b, s] padded tokens of each row's prompt.
        count: P.

    Raises:
        ValueError: fewer prompts than parts.
    """
    _, prompt, rows = prompts.unique(dim=0, return_inverse=True, return_counts=True)
    if len(rows) < count:
        raise ValueError(f"{len(rows)} prompts make no {count} parts: use fewer, or more prompts")
    parts: list[list[int]] = [[] for _ in range(count)]
    for number in rows.argsort(descending=True):
        min(parts, key=len).extend((prompt == number).nonzero().flatten().tolist())
    return [torch.tensor(part, device=prompts.device) for part in parts]


def products_of_parts(
    parts: Sequence[Sequence[Gradient]],
    *,
    groups: Sequence[int] | None = None,
    denominators: Sequence[Tensor] | None = None,
) -> GradientProducts:
    """Inner products of a mini-batch's gradients, from those of P parts of it at the same weights.

    With `S` the products of the whole gradients and `S_i` those within part i, ``same`` is `S`, and
    ``cross`` has the pairs of different parts alone, `P / (P - 1) (S - sum_i S_i)`. Parts share no
    noise where they share no prompt, so that ``cross`` is unbiased; with one part it is None.

    Pairs of successive mini-batches are no substitute: the update by g_n in between shifts g_(n+1)
    by `-eta H g_n` (step eta, Hessian H), so that their product has the noise of g_n in it again.

    Args:
        parts: of each its gradients from :func:`trunk_gradients`: RL's, then that of each depth
            with weight 1. Parts have equally many rows (:func:`parts_by_prompt`), and losses one
            normalizer, such as the tokens of the mini-batch, so that gradients of parts add up.
        groups: see :func:`gradient_products`.
        denominators: see :func:`gradient_products`.

    Raises:
        ValueError: no part, or parts with different numbers of gradients.
    """
    counts = [len(part) for part in parts]
    if len(set(counts)) != 1:
        raise ValueError(f"parts have {counts} gradients: give one part or more, all with 1 + K")
    flat = [gradient for part in parts for gradient in part]
    pairs = gradient_products(flat, flat, groups=groups, denominators=denominators)
    # [P, 1+K, P, 1+K, G]
    pairs = pairs.unflatten(0, (len(parts), -1)).unflatten(2, (len(parts), -1))
    same = pairs.sum(dim=(0, 2))
    if len(parts) == 1:
        return GradientProducts(same)
    within = pairs.diagonal(dim1=0, dim2=2).sum(dim=-1)
    return GradientProducts(same, len(parts) / (len(parts) - 1) * (same - within))
