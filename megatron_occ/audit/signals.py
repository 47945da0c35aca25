"""The MTP signals that an audit measures, each as it would reach the trunk with weight 1."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_occ.losses.calibration import calibration_sums, released_coefficient
from megatron_occ.losses.heads import HeadOutputs, JointTargets, LossReport, Normalizers
from megatron_occ.losses.joint import JointLoss, token_aligned
from megatron_occ.losses.regime import PolicySettings, Regime

SIGNALS: dict[str, Regime] = {
    "policy, no dual clip": Regime(trunk="policy", dual_clip=None),
    "policy, dual clip 10": Regime(trunk="policy"),
    "policy, dual clip 3": Regime(trunk="policy", dual_clip=3.0),
    "policy, ratio at most 1": Regime(trunk="policy", weighting="truncated"),
    "policy, no ratio": Regime(trunk="policy", weighting="unit"),
    "cross-entropy": Regime(trunk="ce"),
}
# squared weights of tokens are counted in bins of a factor 2^(1/2), from 2^-60 to 2^60
BINS, _PER_DOUBLING, _LOWEST = 241, 2, -60
TOP = 1e-3


class SignalLoss:
    """Loss of one depth of a signal, with weight 1, and the tail of its tokens' weights.

    The weight of a token is the derivative of the loss by its log-prob: what its gradient is
    multiplied by.

    Args:
        policy: settings of the policy loss.
        regime: of the signal.
        depth: counted from 0.
        max_response_length: of the released formula and the aggregation ``constant``.
    """

    def __init__(
        self, policy: PolicySettings, regime: Regime, depth: int, max_response_length: int
    ) -> None:
        self._joint, self._depth = JointLoss(policy, regime, max_response_length), depth

    def __call__(
        self, outputs: HeadOutputs, targets: JointTargets, counts: Normalizers
    ) -> tuple[Tensor, LossReport]:
        """Loss; sums by bin of the squared weights, and what the paper's proxies are made of."""
        loss = self._joint.trunk_losses(outputs, targets, counts)[self._depth]
        (weights,) = torch.autograd.grad(loss, outputs.passes[0], retain_graph=True)
        mask = targets.mask[1 + self._depth] > 0
        aligned = token_aligned(outputs, targets)
        rows, depths = outputs.logprobs.size(0), outputs.passes[0].size(0)
        # linear in the rows: of equal parts it is the mean
        released = released_coefficient(
            *aligned, max_response_length=self._joint.max_response_length, factor=float(depths)
        )
        metrics = binned(weights[self._depth].double().square(), mask)
        metrics["released"] = released[self._depth] * rows / counts.sequences[0]
        return loss, LossReport(metrics, calibration_sums(*aligned))


def policy_gradient(policy: PolicySettings, max_response_length: int) -> JointLoss:
    """RL's loss alone."""
    return JointLoss(policy, Regime(trunk="none", head="none"), max_response_length)


def binned(squares: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Sums for :func:`tail`: tokens and their squared weights by bin, and the weights.

    Args:
        squares: [b, s] squared weights.
        mask: [b, s] bool.
    """
    # bin 0 also holds the zeros
    values = torch.where(mask, squares, 0.0).flatten()
    exponent = values.clamp(min=2.0**_LOWEST).log2()
    index = ((exponent - _LOWEST) * _PER_DOUBLING).round().long().clamp(0, BINS - 1)
    counts = torch.zeros(BINS, dtype=torch.float64, device=values.device)
    sums, roots = counts.clone(), values.sqrt().sum()
    counts.index_add_(0, index, mask.flatten().double())
    sums.index_add_(0, index, values)
    found = {f"count/{i}": value for i, value in enumerate(counts)}
    found |= {f"square/{i}": value for i, value in enumerate(sums)}
    return found | {"absolute": roots}


def tail(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Concentration of the squared weights, from sums over all micro-batches and ranks.

    Returns:
        ``top``: share of the sum of squares that the largest thousandth of the tokens holds, which
        is their share of v^2 where the gradients of tokens are close to orthogonal.
        ``effective``: `(sum w)^2 / sum w^2` as a share of the tokens, 1 where all weigh alike.
    """
    counts = [float(metrics[f"count/{i}"]) for i in range(BINS)]
    squares = [float(metrics[f"square/{i}"]) for i in range(BINS)]
    tokens, total = sum(counts), sum(squares)
    if total == 0:
        return {"top": 0.0, "effective": 0.0}
    left, held = TOP * tokens, 0.0
    for count, square in zip(reversed(counts), reversed(squares), strict=True):
        if count == 0:
            continue
        part = min(1.0, left / count)
        held, left = held + part * square, left - part * count
        if left <= 0:
            break
    absolute = float(metrics["absolute"])
    return {"top": held / total, "effective": absolute**2 / total / tokens}
