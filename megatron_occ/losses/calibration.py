"""The OCC coefficient lambda: how much of each MTP depth's policy gradient the trunk receives.

Notation, everything token-aligned: `l` and `o` are the main head's log-probs under the current and
the old weights, `m_k` those of MTP depth k, `w` the response mask, `d_RL = l - o`, `d_k = m_k - o`.
The published coefficient is `lambda_k = lambda_plus * <d_RL, d_k> / (||d_k||^2 + eps)` (OCC, arXiv
2605.28184), a ratio of sums. The sums are what is accumulated over micro-batches and reduced over
ranks; `calibrator.OCCCalibrator` turns them into the coefficients of successive mini-batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_occ.losses._inputs import as_bool_mask, neutralised

ESTIMATORS = ("logprob", "released")

# Added to the diagonal of the joint system relative to its mean diagonal, so that depths which
# predict alike stay solvable in float64. The result changes by about this fraction.
JOINT_RELATIVE_RIDGE = 1e-12


@dataclass(frozen=True, eq=False)
class CalibrationSums:
    """Sums over response tokens from which lambda follows, float64, for K depths.

    Additive: over micro-batches with `+`, over data- and context-parallel ranks by one all-reduce
    (sum) of `to_tensor()`. Tensor-parallel ranks hold equal log-probs: do not reduce over them.
    """

    cross: Tensor  # [K]     sum_t w_k d_RL d_k
    gram: Tensor  # [K, K]   sum_t w_i w_j d_i d_j; its diagonal is ||d_k||^2
    count: Tensor  # [K]     sum_t w_k
    moved: Tensor  # [K]     sum_t w_k d_RL^2: 0 while the policy is still the old policy

    @property
    def norm_squared(self) -> Tensor:
        """[K], `||d_k||^2`."""
        return self.gram.diagonal()

    def __add__(self, other: CalibrationSums) -> CalibrationSums:
        return CalibrationSums(
            self.cross + other.cross,
            self.gram + other.gram,
            self.count + other.count,
            self.moved + other.moved,
        )

    @classmethod
    def zeros(cls, num_depths: int, device: torch.device | str | None = None) -> CalibrationSums:
        """The neutral element of `+` for `num_depths` depths."""
        size = num_depths * (num_depths + 3)
        return cls.from_tensor(torch.zeros(size, dtype=torch.float64, device=device))

    def to_tensor(self) -> Tensor:
        """All sums as one vector [K^2 + 3K]: gram row by row, cross, count, moved."""
        return torch.cat([self.gram.flatten(), self.cross, self.count, self.moved])

    @classmethod
    def from_tensor(cls, flat: Tensor) -> CalibrationSums:
        """Inverse of `to_tensor`.

        Raises:
            ValueError: the length is not K^2 + 3K for any K >= 1.
        """
        num_depths = (math.isqrt(4 * flat.numel() + 9) - 3) // 2
        if flat.dim() != 1 or flat.numel() == 0 or num_depths * (num_depths + 3) != flat.numel():
            raise ValueError(
                f"a tensor of shape {list(flat.shape)} does not hold calibration sums: give a "
                "vector of K^2 + 3K numbers, as to_tensor() makes it"
            )
        gram, cross, count, moved = flat.split([num_depths**2, num_depths, num_depths, num_depths])
        return cls(cross, gram.reshape(num_depths, num_depths), count, moved)


@torch.no_grad()
def calibration_sums(
    logprobs: Tensor, old_logprobs: Tensor, mtp_logprobs: Tensor, mask: Tensor
) -> CalibrationSums:
    """The sums of one micro-batch, detached.

    Any frame does for `cross`, `count`, `moved` and the diagonal of `gram`, as long as the inputs
    of one depth share it. Its off-diagonal, which only `joint` uses, multiplies different depths
    at the same entry and is right in the token frame only (`shift_to_tokens`).

    Args:
        logprobs: [b, s] or [K, b, s] l, aligned: entry t is about token x_t.
        old_logprobs: [b, s] or [K, b, s] o, aligned.
        mtp_logprobs: [K, b, s] m_k, aligned.
        mask: [b, s] or [K, b, s] response mask. Depth k has no prediction for the first k + 1
            tokens of a sequence. Other positions may hold anything, also NaN or infinity.

    Raises:
        ValueError: shapes that do not match.
    """
    keep, moved, gap = _differences(logprobs, old_logprobs, mtp_logprobs, mask)
    return CalibrationSums(
        cross=(moved * gap).sum(dim=1),
        gram=gap @ gap.T,
        count=keep.sum(dim=1).double(),
        moved=moved.square().sum(dim=1),
    )


def coefficient_from_sums(
    sums: CalibrationSums, *, lambda_plus: float, eps: float = 1e-8, joint: bool = False
) -> Tensor:
    """lambda [K], float64, from sums over any number of tokens.

    Each depth by itself, `lambda_plus * cross_k / (gram_kk + eps)` (OCC, arXiv 2605.28184), or with
    `joint` all depths at once, `lambda_plus * (G + eps I)^-1 c`, which does not count twice what
    the depths have in common. For K = 1 both agree. Non-finite sums give non-finite coefficients.
    """
    if not joint:
        return lambda_plus * sums.cross / (sums.norm_squared + eps)
    ridge = eps + JOINT_RELATIVE_RIDGE * sums.norm_squared.mean()
    system = sums.gram + ridge * torch.eye(len(sums.cross)).to(sums.gram)
    # solve_ex answers an unsolvable system with non-finite numbers; solve would raise.
    return lambda_plus * torch.linalg.solve_ex(system, sums.cross).result


@torch.no_grad()
def released_coefficient(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mtp_logprobs: Tensor,
    mask: Tensor,
    *,
    max_response_length: int,
    factor: float = 0.1,
    eps: float = 1e-8,
) -> Tensor:
    """lambda [K] of one micro-batch as the code released with OCC computes it, for reproduction.

    `(factor / K) * sum_t w_k d_RL d_k / (d_k^2 + eps) / (b * max_response_length)`. That code takes
    the mean over response positions alone, padded with exact zeros to the longest allowed response.
    Compared with `coefficient_from_sums`:

    - a mean of ratios is heavy-tailed: a single token with a tiny `d_k` can dominate;
    - zeros up to the longest allowed response dilute lambda by the fill fraction, response tokens
      over `b * max_response_length`; prompts are not in it;
    - each micro-batch has a lambda of its own, so the loss depends on how a mini-batch is cut.

    The released code stops for K > 1; here the formula is applied to each depth.

    Args:
        logprobs: [b, s] or [K, b, s], as for `calibration_sums`.
        old_logprobs: [b, s] or [K, b, s].
        mtp_logprobs: [K, b, s].
        mask: [b, s] or [K, b, s] response mask, without the first k + 1 tokens of a sequence.
            Without any token lambda is 0.
        max_response_length: tokens of the longest allowed response, at least those of any row.
        factor: f, 0.1 in the released training script.
        eps: added to each token's `d_k^2`.

    Raises:
        ValueError: shapes that do not match, `max_response_length` below 1.
    """
    if max_response_length < 1:
        raise ValueError(
            f"max_response_length is {max_response_length}: give the tokens that a response may "
            "have, 1 or more"
        )
    keep, moved, gap = _differences(logprobs, old_logprobs, mtp_logprobs, mask)
    ratio = torch.where(keep, moved * gap / (gap.square() + eps), 0.0)
    depths, rows = mtp_logprobs.shape[:2]
    return factor / depths * ratio.sum(dim=1) / (rows * max_response_length)


def occ_coefficient(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mtp_logprobs: Tensor,
    mask: Tensor,
    *,
    lambda_plus: float = 1.0,
    eps: float = 1e-8,
    estimator: str = "logprob",
    max_response_length: int | None = None,
    joint: bool = False,
) -> Tensor:
    """lambda [K], float64 and detached, of one batch that is held in memory at once.

    Over several micro-batches or ranks add `calibration_sums` instead and use
    `coefficient_from_sums`: lambda itself is not additive.

    Args:
        logprobs: [b, s] l, aligned: entry t is about token x_t.
        old_logprobs: [b, s] o, aligned.
        mtp_logprobs: [K, b, s] m_k, aligned.
        mask: [b, s] or [K, b, s] response mask, as for `calibration_sums`.
        lambda_plus: scale of the coefficient; for "released" the factor f (0.1 in its script).
        eps: added to the squared norm; for "released" to each token's `d_k^2`.
        estimator: "logprob", the paper's ratio of sums, or "released", for reproduction.
        max_response_length: tokens of the longest allowed response; "released" needs it, and it
            alone.
        joint: solve for all depths at once; "logprob" only.

    Raises:
        ValueError: unknown estimator, an argument that the estimator lacks or has no use for,
            shapes that do not match.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}: use one of {', '.join(ESTIMATORS)}")
    if estimator == "released":
        if joint:
            raise ValueError("joint=True needs estimator='logprob': 'released' has no joint form")
        if max_response_length is None:
            raise ValueError(
                "estimator='released' divides by the longest allowed response: give "
                "max_response_length"
            )
        return released_coefficient(
            logprobs,
            old_logprobs,
            mtp_logprobs,
            mask,
            max_response_length=max_response_length,
            factor=lambda_plus,
            eps=eps,
        )
    if max_response_length is not None:
        raise ValueError(
            f"max_response_length={max_response_length} needs estimator='released': 'logprob' has "
            "no use for it"
        )
    sums = calibration_sums(logprobs, old_logprobs, mtp_logprobs, mask)
    return coefficient_from_sums(sums, lambda_plus=lambda_plus, eps=eps, joint=joint)


def _differences(
    logprobs: Tensor, old_logprobs: Tensor, mtp_logprobs: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Bool mask, d_RL and d_k, each [K, b * s]; float64, exact zeros where masked."""
    keep = as_bool_mask(_per_depth(mask, mtp_logprobs, "mask"))
    old = neutralised(_per_depth(old_logprobs, mtp_logprobs, "old_logprobs").double(), keep)
    main = neutralised(_per_depth(logprobs, mtp_logprobs, "logprobs").double(), keep)
    mtp = neutralised(mtp_logprobs.double(), keep)
    keep, moved, gap = (v.flatten(start_dim=1) for v in (keep, main - old, mtp - old))
    return keep, moved, gap


def _per_depth(values: Tensor, mtp_logprobs: Tensor, name: str) -> Tensor:
    """`values` [b, s] or [K, b, s] as [K, b, s]."""
    if mtp_logprobs.dim() != 3:
        raise ValueError(
            f"mtp_logprobs have shape {list(mtp_logprobs.shape)}: give [K, b, s], with "
            "unsqueeze(0) for a single depth"
        )
    if values.shape not in (mtp_logprobs.shape, mtp_logprobs.shape[1:]):
        raise ValueError(
            f"{name} has shape {list(values.shape)}: with mtp_logprobs "
            f"{list(mtp_logprobs.shape)} give [b, s] or [K, b, s]"
        )
    return values.expand_as(mtp_logprobs)
