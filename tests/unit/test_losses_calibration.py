"""Calibration sums and the coefficient: numbers, masks, additivity, the released formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_occ.losses import (
    CalibrationSums,
    calibration_sums,
    coefficient_from_sums,
    occ_coefficient,
    released_coefficient,
)


def batch(seed: int = 0, depths: int = 2, rows: int = 4, length: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -normal(rows, length).abs()
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[1] = False
    return {
        "logprobs": old + 0.1 * normal(rows, length),
        "old_logprobs": old,
        "mtp_logprobs": old + 0.5 * normal(depths, rows, length),
        "mask": mask,
    }


def naive_sums(data: dict[str, Tensor]) -> dict[str, list]:
    """One token at a time, in plain Python."""
    depths, rows, length = data["mtp_logprobs"].shape
    mask = data["mask"].expand(depths, rows, length).tolist()
    cross, count, moved = ([0.0] * depths for _ in range(3))
    gram = [[0.0] * depths for _ in range(depths)]
    for b in range(rows):
        for t in range(length):
            old = data["old_logprobs"][b, t].item()
            rl = data["logprobs"][b, t].item() - old
            gap = [data["mtp_logprobs"][k, b, t].item() - old for k in range(depths)]
            for i in range(depths):
                if not mask[i][b][t]:
                    continue
                cross[i] += rl * gap[i]
                count[i] += 1
                moved[i] += rl * rl
                for j in range(depths):
                    gram[i][j] += gap[i] * gap[j] if mask[j][b][t] else 0.0
    return {"cross": cross, "gram": gram, "count": count, "moved": moved}


def assert_sums(sums: CalibrationSums, expected: dict[str, list]) -> None:
    for name, value in expected.items():
        reference = torch.tensor(value, dtype=torch.float64)
        torch.testing.assert_close(getattr(sums, name), reference, rtol=1e-12, atol=1e-15)


def test_coefficient_by_hand() -> None:
    # d_RL = (1, 2), d_1 = (2, 1): lambda = (2 + 2) / (4 + 1); the third token is masked
    coefficient = occ_coefficient(
        torch.tensor([[0.0, 1.0, 7.0]]),
        torch.tensor([[-1.0, -1.0, 0.0]]),
        torch.tensor([[[1.0, 0.0, 3.0]]]),
        torch.tensor([[1, 1, 0]]),
    )
    assert coefficient.dtype == torch.float64
    assert coefficient.tolist() == pytest.approx([0.8], rel=1e-8)


@pytest.mark.parametrize("per_depth", [False, True])
def test_sums_match_naive_loop(per_depth: bool) -> None:
    data = batch(depths=3)
    if per_depth:  # each deeper depth lacks one more token
        data["mask"] = torch.stack([data["mask"].clone() for _ in range(3)])
        for k in range(3):
            data["mask"][k, :, : k + 2] = False
    assert_sums(calibration_sums(**data), naive_sums(data))
    expanded = {k: v.expand(3, 4, 6) for k, v in data.items()}
    assert_sums(calibration_sums(**expanded), naive_sums(data))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_sums_do_not_depend_on_the_micro_batches(rows: int) -> None:
    """Weak point 3."""
    data = batch()
    total = CalibrationSums.zeros(2)
    for start in range(0, 4, rows):
        cut = slice(start, start + rows)
        part = {k: v[:, cut] if v.dim() == 3 else v[cut] for k, v in data.items()}
        total = total + calibration_sums(**part)
    for joint in (False, True):
        together = occ_coefficient(**data, joint=joint)
        apart = coefficient_from_sums(total, lambda_plus=1.0, joint=joint)
        torch.testing.assert_close(apart, together, rtol=1e-12, atol=0)


def test_released_does_depend_on_the_micro_batches() -> None:
    """Each half has a lambda of its own; the whole has the mean of both."""
    data = batch(depths=1)
    halves = [{k: v[..., rows, :] for k, v in data.items()} for rows in (slice(0, 2), slice(2, 4))]
    whole, first, second = (
        released_coefficient(**part, max_response_length=6) for part in (data, *halves)
    )
    assert abs(first - second).item() > 1e-3
    torch.testing.assert_close(whole, (first + second) / 2, rtol=1e-12, atol=0)


def test_one_all_reduce_carries_all_sums() -> None:
    first, second = calibration_sums(**batch(0, depths=3)), calibration_sums(**batch(1, depths=3))
    reduced = CalibrationSums.from_tensor(first.to_tensor() + second.to_tensor())
    direct = first + second
    assert first.to_tensor().shape == (18,)
    for name in ("cross", "gram", "count", "moved"):
        assert torch.equal(getattr(reduced, name), getattr(direct, name))
    for length in (0, 3, 5, 9):
        with pytest.raises(ValueError, match="K\\^2 \\+ 3K"):
            CalibrationSums.from_tensor(torch.zeros(length))


def test_zeros_is_neutral() -> None:
    sums = calibration_sums(**batch())
    same = CalibrationSums.zeros(2) + sums
    assert torch.equal(same.to_tensor(), sums.to_tensor())
    assert CalibrationSums.zeros(1).to_tensor().tolist() == [0.0] * 4


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_masked_positions_do_not_matter(garbage: float) -> None:
    clean = batch()
    dirty = {k: v.clone() for k, v in clean.items()}
    for name in ("logprobs", "old_logprobs", "mtp_logprobs"):
        dirty[name][..., ~clean["mask"]] = garbage
    clean_sums, dirty_sums = calibration_sums(**clean), calibration_sums(**dirty)
    assert torch.equal(clean_sums.to_tensor(), dirty_sums.to_tensor())
    released = [released_coefficient(**data, max_response_length=6) for data in (clean, dirty)]
    assert torch.equal(*released)
    assert (released[0].abs() > 1e-3).all()


def test_the_fill_fraction_dilutes_the_released_formula_only() -> None:
    """Weak point 2: responses of 3 tokens behind prompts of 3, of 3, 6 and 48 allowed tokens."""
    data = batch(depths=1)
    data["mask"] = torch.tensor([False] * 3 + [True] * 3).expand(4, 6)
    keep = data["mask"]
    moved = (data["logprobs"] - data["old_logprobs"])[keep]
    gap = (data["mtp_logprobs"][0] - data["old_logprobs"])[keep]
    full = 0.1 * (moved * gap / (gap.square() + 1e-8)).mean().item()
    ours = occ_coefficient(**data)
    # columns that no row fills are not what dilutes, and neither are prompts
    wider: dict[str, Any] = {
        k: torch.cat([v, torch.zeros_like(v)], dim=-1) for k, v in data.items()
    }
    short: dict[str, Any] = {k: v[..., 3:] for k, v in data.items()}
    for given in (data, wider, short):
        torch.testing.assert_close(occ_coefficient(**given), ours, rtol=1e-14, atol=0)
        for allowed, filled in ((3, 1), (6, 1 / 2), (48, 1 / 16)):
            released = released_coefficient(**given, max_response_length=allowed)
            assert released.item() == pytest.approx(filled * full, rel=1e-12)


def test_ratio_of_sums_varies_far_less_than_the_mean_of_ratios() -> None:
    """Weak point 1, over 400 random batches of 256 tokens."""
    generator = torch.Generator().manual_seed(0)
    moved = 0.05 * torch.randn(400, 256, generator=generator, dtype=torch.float64)
    gap = 0.5 * torch.randn(400, 256, generator=generator, dtype=torch.float64)
    zeros, mask = torch.zeros(1, 256), torch.ones(1, 256)
    ours, released = (
        torch.cat([
            occ_coefficient(m[None], zeros, g[None, None], mask, **options)
            for m, g in zip(moved, gap, strict=True)
        ]).std()
        for options in ({}, {"estimator": "released", "max_response_length": 256})
    )  # fmt: skip
    # for normal gaps of deviation 0.5 the variances differ by 0.5 * sqrt(pi / 8 / eps) = 56^2
    assert 40 < released / ours < 80
    # a single token: d_RL / (2 sqrt(eps)) at d_k = sqrt(eps)
    one = torch.ones(1, 1)
    worst = released_coefficient(
        one, 0 * one, 1e-4 * one[None], one, max_response_length=1, factor=1.0
    )
    assert worst.item() == pytest.approx(5000, rel=1e-6)


def test_released_by_hand() -> None:
    """Two rows, of prompts of 2 tokens and responses of 3 and 1, where 10 tokens are allowed.

    With o = 0: d_RL = l and d_k = m_k. A token's ratio is l / m, up to 1e-8 / m^2.
    """
    prompt, pad = 7.0, math.nan
    main = torch.tensor([[prompt, prompt, 0.5, 1.0, 0.2], [prompt, prompt, 0.3, pad, pad]])
    old = torch.zeros(2, 5)
    depth_1 = torch.tensor([[prompt, prompt, 0.25, -2.0, 0.1], [prompt, prompt, 0.1, pad, pad]])
    depth_2 = torch.tensor([[prompt, prompt, 9.0, 0.5, -0.4], [prompt, prompt, 9.0, pad, pad]])
    mask_1 = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]])
    mask_2 = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])  # depth 2 lacks the first 3 tokens
    sum_1 = 0.5 / 0.25 - 1.0 / 2.0 + 0.2 / 0.1 + 0.3 / 0.1
    sum_2 = 1.0 / 0.5 - 0.2 / 0.4
    single = released_coefficient(main, old, depth_1[None], mask_1, max_response_length=10)
    assert single.dtype == torch.float64
    assert single.tolist() == pytest.approx([0.1 * sum_1 / 20], rel=1e-5)
    assert single.tolist() == pytest.approx([0.0325], rel=1e-5)
    both, masks = torch.stack((depth_1, depth_2)), torch.stack((mask_1, mask_2))
    double = released_coefficient(main, old, both, masks, max_response_length=10)
    assert double.tolist() == pytest.approx([0.05 * sum_1 / 20, 0.05 * sum_2 / 20], rel=1e-5)


def test_released_matches_naive_loop_for_several_depths() -> None:
    """Weak point 4: the released code stops for K > 1; its factor is f / K."""
    data = batch(depths=3)
    result = released_coefficient(**data, max_response_length=9, factor=0.3)
    for k in range(3):
        total = 0.0
        for b in range(4):
            for t in range(6):
                old = data["old_logprobs"][b, t].item()
                rl = data["logprobs"][b, t].item() - old
                gap = data["mtp_logprobs"][k, b, t].item() - old
                total += rl * gap / (gap**2 + 1e-8) if data["mask"][b, t] else 0.0
        assert result[k].item() == pytest.approx(0.3 / 3 * total / (4 * 9), rel=1e-12)
    options = {"estimator": "released", "lambda_plus": 0.3, "max_response_length": 9}
    assert torch.equal(occ_coefficient(**data, **options), result)


def test_depths_are_independent_unless_joint() -> None:
    data = batch(depths=3)
    mtp = data.pop("mtp_logprobs")
    alone = [occ_coefficient(mtp_logprobs=mtp[k : k + 1], **data).item() for k in range(3)]
    together = occ_coefficient(mtp_logprobs=mtp, **data)
    assert together.tolist() == pytest.approx(alone, rel=1e-12)
    joint = occ_coefficient(mtp_logprobs=mtp, **data, joint=True)
    assert (joint - together).abs().max() > 1e-3


def test_joint_solves_the_normal_equations() -> None:
    gram = torch.tensor([[4.0, 2.0], [2.0, 3.0]], dtype=torch.float64)
    cross, count = torch.tensor([2.0, 5.0], dtype=torch.float64), torch.ones(2)
    sums = CalibrationSums(cross, gram, count, count)
    # inverse of the matrix is [[3, -2], [-2, 4]] / 8
    result = coefficient_from_sums(sums, lambda_plus=2.0, joint=True)
    assert result.tolist() == pytest.approx([2 * (6 - 10) / 8, 2 * (-4 + 20) / 8], rel=1e-7)


def test_joint_is_the_best_fit_of_the_policy_change() -> None:
    data = batch(depths=2)
    keep = data["mask"]
    gaps = (data["mtp_logprobs"] - data["old_logprobs"])[:, keep]
    moved = (data["logprobs"] - data["old_logprobs"])[keep]
    best = torch.linalg.lstsq(gaps.T, moved.unsqueeze(1)).solution.squeeze(1)
    torch.testing.assert_close(occ_coefficient(**data, joint=True), best, rtol=1e-7, atol=0)


def test_joint_of_one_depth_and_of_equal_depths() -> None:
    data = batch(depths=1)
    single = occ_coefficient(**data)
    torch.testing.assert_close(occ_coefficient(**data, joint=True), single, rtol=1e-11, atol=0)
    data["mtp_logprobs"] = data["mtp_logprobs"].expand(2, -1, -1)
    shared = occ_coefficient(**data, joint=True)
    # float64 rounding over the relative ridge of 1e-12 leaves three digits
    assert shared.tolist() == pytest.approx([single.item() / 2] * 2, rel=1e-2)
    # so many tokens that eps is lost in the rounding of the matrix
    many, count = torch.full((2, 2), 1e9, dtype=torch.float64), torch.ones(2)
    sums = CalibrationSums(many[0], many, count, count)
    result = coefficient_from_sums(sums, lambda_plus=1.0, joint=True)
    assert result.tolist() == pytest.approx([0.5, 0.5], rel=1e-2)


def test_coefficient_scales_and_is_detached() -> None:
    data = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in batch().items()}
    unit, double = occ_coefficient(**data), occ_coefficient(**data, lambda_plus=2.0)
    torch.testing.assert_close(double, 2 * unit)
    assert not unit.requires_grad
    assert not calibration_sums(**data).cross.requires_grad
    assert not released_coefficient(**data, max_response_length=6).requires_grad


def test_float32_input_is_accumulated_in_float64() -> None:
    n = 1 << 14
    old, gap = torch.zeros(1, n), torch.full((1, 1, n), 0.1)
    sums = calibration_sums(old + 0.1, old, gap, torch.ones(1, n))
    exact = float(torch.tensor(0.1)) ** 2 * n
    assert sums.cross.item() == pytest.approx(exact, rel=1e-13)
    assert sums.moved.item() == pytest.approx(exact, rel=1e-13)


def test_without_tokens_or_gap_lambda_is_zero() -> None:
    data = batch()
    data["mask"][:] = False
    for joint in (False, True):
        assert occ_coefficient(**data, joint=joint).tolist() == [0.0, 0.0]
    assert released_coefficient(**data, max_response_length=6, eps=0.0).tolist() == [0.0, 0.0]
    data = batch()
    data["mtp_logprobs"] = data["old_logprobs"].expand(2, -1, -1)
    assert occ_coefficient(**data).tolist() == [0.0, 0.0]
    assert released_coefficient(**data, max_response_length=6).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "exact"}, "'exact': use one of logprob, released"),
        ({"estimator": "released", "joint": True}, "joint=True needs estimator='logprob'"),
        ({"estimator": "released"}, "longest allowed response: give max_response_length"),
        ({"max_response_length": 6}, "max_response_length=6 needs estimator='released'"),
        ({"estimator": "released", "max_response_length": 0}, "max_response_length is 0: give"),
        ({"mtp_logprobs": torch.zeros(4, 6)}, r"\[4, 6\]: give \[K, b, s\]"),
        ({"mask": torch.zeros(4, 5)}, r"mask has shape \[4, 5\]"),
        ({"logprobs": torch.zeros(3, 4, 6)}, r"logprobs has shape \[3, 4, 6\]"),
        ({"old_logprobs": torch.zeros(4)}, r"old_logprobs has shape \[4\]"),
    ],
)
def test_bad_input_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        occ_coefficient(**{**batch(), **options})
