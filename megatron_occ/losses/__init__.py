"""Losses and calibration as pure functions of log-probs, logits and rewards; torch only."""

from __future__ import annotations

from megatron_occ.losses.advantages import (
    advantage_sums,
    group_advantages,
    group_has_spread,
    overlong_penalty,
    step_advantages,
)
from megatron_occ.losses.alignment import align_mtp_targets, shift_to_source, shift_to_tokens
from megatron_occ.losses.calibration import (
    CalibrationSums,
    calibration_sums,
    coefficient_from_sums,
    occ_coefficient,
    released_coefficient,
)
from megatron_occ.losses.calibrator import Coefficient, OCCCalibrator
from megatron_occ.losses.correction import CorrectionSettings, correct
from megatron_occ.losses.drafting import agreement, soft_cross_entropy, total_variation
from megatron_occ.losses.exact import ExactCalibrator, ExactSettings, GradientProducts
from megatron_occ.losses.gradients import (
    adam_denominators,
    gradient_products,
    parts_by_prompt,
    products_of_parts,
    trunk_gradients,
)
from megatron_occ.losses.kl import kl_penalty, masked_sum
from megatron_occ.losses.objectives import Cispo, Clipped, Dppo, Sapo
from megatron_occ.losses.policy import clipped_policy_loss, policy_loss, response_counts
from megatron_occ.losses.selection import entropy_threshold, entropy_weights
from megatron_occ.losses.weighted import weighted_policy_loss

__all__ = [
    "CalibrationSums",
    "Cispo",
    "Clipped",
    "Coefficient",
    "CorrectionSettings",
    "Dppo",
    "ExactCalibrator",
    "ExactSettings",
    "GradientProducts",
    "OCCCalibrator",
    "Sapo",
    "adam_denominators",
    "advantage_sums",
    "agreement",
    "align_mtp_targets",
    "calibration_sums",
    "clipped_policy_loss",
    "coefficient_from_sums",
    "correct",
    "entropy_threshold",
    "entropy_weights",
    "gradient_products",
    "group_advantages",
    "group_has_spread",
    "kl_penalty",
    "masked_sum",
    "occ_coefficient",
    "overlong_penalty",
    "parts_by_prompt",
    "policy_loss",
    "products_of_parts",
    "released_coefficient",
    "response_counts",
    "shift_to_source",
    "shift_to_tokens",
    "soft_cross_entropy",
    "step_advantages",
    "total_variation",
    "trunk_gradients",
    "weighted_policy_loss",
]
