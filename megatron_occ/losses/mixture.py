"""How much of each MTP gradient to add to the policy's, from inner products of the gradients.

With g_0 the trunk's RL gradient in a mini-batch, g_k the gradient of MTP depth k with weight 1,
`S_ij = E<g_i, g_j>` over one mini-batch, and `h_i = <E g_0, E g_i>` between independent ones, a
step of size eta along `sum_i w_i g_i` of an L-smooth objective gains in expectation

    eta <h, w> - (L eta^2 / 2) w^T S w.

S holds the noise of the gradients, which costs, h must not hold it: g_0 and g_k of one mini-batch
weight the same responses by the same advantages, so that `S_0k` is their common noise in the first
place (docs/method.md). All inner products may be taken in the optimizer's metric.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Mixture:
    """The best mixture of RL and MTP gradients.

    Args:
        weights: [K] of the MTP gradients where RL's weighs 1.
        gain: what the best step gains more than the best step along g_0 alone, as a share of that.
    """

    weights: Tensor
    gain: float


def best_mixture(same: Tensor, signal: Tensor) -> Mixture:
    """Weights of the MTP gradients that gain most at the best step size.

    The maximum of `<h, w>^2 / (w^T S w)` is at `w = S^-1 h`; the gain at the best step size is
    `h^T S^-1 h / (2 L)`, along g_0 alone `h_0^2 / (2 L S_00)`. Neither the weights relative to w_0
    nor the relative gain depends on L and eta.

    Args:
        same: [1+K, 1+K] S.
        signal: [1+K] h; h_0 > 0.

    Returns:
        The mixture; weights are not finite where S can't be solved or RL's own weight is not
        positive, which no positive step can follow.
    """
    same, signal = same.double(), signal.double()
    solved = torch.linalg.solve_ex(same, signal).result
    main = solved[0] if solved[0] > 0 else solved.new_tensor(torch.nan)
    alone = signal[0].square() / same[0, 0]
    return Mixture(solved[1:] / main, float(signal @ solved / alone) - 1.0)


def mixture_slope(same: Tensor, signal: Tensor, weights: Tensor) -> float:
    """How steeply a unit step along a given mixture gains, relative to one along g_0 alone.

    `(<h, w> / sqrt(w^T S w)) / (h_0 / sqrt(S_00))`, with w_0 = 1. The best step along the mixture
    gains its square times what the best along g_0 does; where it is negative, no step gains.

    Args:
        same: [1+K, 1+K] S.
        signal: [1+K] h; h_0 > 0.
        weights: [K] of the MTP gradients.
    """
    same, signal = same.double(), signal.double()
    mixed = torch.cat((torch.ones_like(same[0, :1]), weights.double()))
    alone = signal[0] / same[0, 0].sqrt()
    return float((signal @ mixed) / (mixed @ same @ mixed).sqrt() / alone)


def gram_weights(gram: Tensor, cross: Tensor) -> Tensor:
    """`G^-1 c`, [K]: the weights that gain most at a given, small step, up to a common factor.

    For K = 1 this is `c / v^2`, the coefficient of OCC (arXiv 2605.28184) from the gradients
    themselves. Not finite where G can't be solved.

    Args:
        gram: [K, K] `<g_i, g_j>` of the depths.
        cross: [K] `<g_0, g_k>`.
    """
    return torch.linalg.solve_ex(gram.double(), cross.double()).result


def update_share(same: Tensor, weights: Tensor) -> float:
    """Norm of the MTP part of the trunk's gradient as a share of the RL part's.

    `sqrt(w^T S_kk w / S_00)`, in the metric of the inner products: in Adam's it is the share of
    the update.

    Args:
        same: [1+K, 1+K] S.
        weights: [K] of the depths' gradients.
    """
    if same[0, 0] <= 0:
        return 0.0
    mtp = weights.double() @ same[1:, 1:].double() @ weights.double()
    return float((mtp.clamp(min=0) / same[0, 0]).sqrt())
