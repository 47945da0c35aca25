"""OCCCalibrator: holding, averaging, bounds, non-finite numbers, state."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_occ.losses import CalibrationSums, OCCCalibrator, calibration_sums


def sums(
    cross: list[float],
    norm: list[float],
    moved: list[float] | None = None,
    overlap: float = 0.0,
) -> CalibrationSums:
    """Sums over 10 tokens; `overlap` fills the off-diagonal of the gram matrix."""
    depths = len(cross)
    diagonal = torch.tensor(norm, dtype=torch.float64)
    gram = torch.full((depths, depths), overlap, dtype=torch.float64)
    gram[range(depths), range(depths)] = diagonal
    return CalibrationSums(
        cross=torch.tensor(cross, dtype=torch.float64),
        gram=gram,
        count=torch.full((depths,), 10.0, dtype=torch.float64),
        moved=torch.tensor(moved or [1.0] * depths, dtype=torch.float64),
    )


def test_update_is_the_ratio_of_sums() -> None:
    calibrator = OCCCalibrator(2, lambda_plus=2.0)
    assert calibrator.current.tolist() == [0.0, 0.0]
    answer = calibrator.update(sums([1.0, 3.0], [4.0, 2.0]))
    assert answer.values.tolist() == pytest.approx([0.5, 3.0], rel=1e-8)
    assert torch.equal(answer.raw, answer.values)
    assert torch.equal(calibrator.current, answer.values)
    assert answer.cross.tolist() == [1.0, 3.0]
    assert answer.norm_squared.tolist() == [4.0, 2.0]
    assert (answer.events, answer.held) == ([], False)
    assert answer.values.dtype == torch.float64


def test_unmoved_policy_holds_the_last_coefficient_and_the_average() -> None:
    """Weak point 7: the first mini-batch of every RL step has l == o."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(2, 5, generator=generator)
    mtp = old + torch.randn(1, 2, 5, generator=generator)
    mask = torch.ones(2, 5)
    calibrator = OCCCalibrator(1, clamp=(None, None), ema=0.5)

    at_start = calibrator.update(calibration_sums(old, old, mtp, mask))
    assert (at_start.values.item(), at_start.held) == (0.0, True)
    moved = calibrator.update(calibration_sums(old + 0.1 * mtp[0], old, mtp, mask))
    assert not moved.held
    assert moved.values.item() != 0.0
    before = calibrator.state_dict()
    for noise in (0.0, 1e-7):  # exactly the old policy, and up to float32 rounding
        again = calibrator.update(calibration_sums(old + noise, old, mtp, mask))
        assert again.held
        assert again.events == []
        assert torch.equal(again.values, moved.values)
    empty = calibrator.update(calibration_sums(old + 1.0, old, mtp, 0 * mask))
    assert empty.held
    after = calibrator.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_movement_tolerance_is_per_token() -> None:
    barely = sums([1.0], [2.0], moved=[1e-9])  # 10 tokens, 1e-10 each: still unmoved
    assert OCCCalibrator(1).update(barely).held
    assert not OCCCalibrator(1).update(sums([1.0], [2.0], moved=[1.1e-9])).held
    assert not OCCCalibrator(1, tolerance=1e-12).update(barely).held
    assert OCCCalibrator(1, tolerance=1.0).update(sums([1.0], [2.0], moved=[9.0])).held


def test_one_depth_without_information_is_held_alone() -> None:
    calibrator = OCCCalibrator(2, ema=0.5)
    calibrator.update(sums([1.0, 1.0], [2.0, 4.0]))
    answer = calibrator.update(sums([2.0, 0.0], [2.0, 4.0], moved=[1.0, 0.0]))
    assert answer.values[1].item() == pytest.approx(0.25, rel=1e-8)
    assert answer.values[0].item() == pytest.approx(0.8333333, rel=1e-6)
    assert not answer.held


def test_average_is_over_the_sums_with_bias_correction() -> None:
    calibrator = OCCCalibrator(1, ema=0.8, eps=0.0)
    history = [(1.0, 2.0), (3.0, 30.0), (-2.0, 1.0), (5.0, 8.0)]
    for step in range(len(history)):
        cross, norm = history[step]
        answer = calibrator.update(sums([cross], [norm]))
        weights = [0.2 * 0.8 ** (step - i) for i in range(step + 1)]
        past = list(zip(weights, history[: step + 1], strict=True))
        expected = sum(w * c for w, (c, _) in past) / sum(w * n for w, (_, n) in past)
        assert answer.values.item() == pytest.approx(max(expected, 0.0), rel=1e-12)
        assert answer.raw.item() == pytest.approx(cross / norm, rel=1e-12)


def test_first_average_is_unbiased_even_against_eps() -> None:
    plain, averaged = OCCCalibrator(1, eps=1.0), OCCCalibrator(1, eps=1.0, ema=0.99)
    first = sums([3.0], [2.0])
    assert plain.update(first).values.item() == 1.0
    assert averaged.update(first).values.item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("joint", [False, True])
def test_not_finite_is_answered_by_zero_and_an_event(bad: float, joint: bool) -> None:
    """Weak point 13."""
    calibrator = OCCCalibrator(2, ema=0.5, joint=joint, eps=0.0)
    calibrator.update(sums([1.0, 1.0], [2.0, 4.0]))
    answer = calibrator.update(sums([bad, 1.0], [math.nan, 4.0], overlap=math.nan))
    assert answer.values.tolist() == pytest.approx([0.0, 0.25], rel=1e-9)
    assert math.isnan(answer.raw[0])
    assert answer.raw[1].item() == pytest.approx(0.25, rel=1e-9)
    assert answer.events == [
        f"lambda[1] not finite (cross={bad:g}, norm_squared=nan): using 0",
    ]
    assert all(torch.isfinite(value).all() for value in calibrator.state_dict().values())
    # the average of depth 1 is what it was before the bad sums, and recovers
    recovered = calibrator.update(sums([1.0, 1.0], [2.0, 4.0]))
    assert recovered.values.tolist() == pytest.approx([0.5, 0.25], rel=1e-9)
    assert recovered.events == []


def test_not_finite_everywhere() -> None:
    answer = OCCCalibrator(2).update(sums([math.nan] * 2, [1.0] * 2, moved=[math.nan] * 2))
    assert answer.values.tolist() == [0.0, 0.0]
    assert [event[:9] for event in answer.events] == ["lambda[1]", "lambda[2]"]
    assert not answer.held


def test_overflow_of_finite_sums_is_caught() -> None:
    answer = OCCCalibrator(1).update(sums([1e305], [0.0]))
    assert answer.values.item() == 0.0
    assert math.isinf(answer.raw.item())
    assert len(answer.events) == 1


def test_clamp_is_last() -> None:
    high = sums([30.0], [10.0])
    low = sums([-30.0], [10.0])
    for clamp, expected in {
        (None, None): (3.0, -3.0),
        (0.0, None): (3.0, 0.0),
        (-1.0, 2.0): (2.0, -1.0),
        (None, 2.0): (2.0, -3.0),
    }.items():
        answers = [OCCCalibrator(1, clamp=clamp).update(s) for s in (high, low)]
        assert [a.values.item() for a in answers] == pytest.approx(expected, rel=1e-8)
        assert [a.raw.item() for a in answers] == pytest.approx([3.0, -3.0], rel=1e-8)
    floor = OCCCalibrator(1, clamp=(0.1, 1.0))
    assert floor.current.item() == 0.1
    broken = floor.update(sums([math.nan], [1.0]))
    assert broken.values.item() == 0.1
    assert broken.events[0].endswith("using 0.1")


def test_joint_uses_the_whole_matrix() -> None:
    answer = OCCCalibrator(2, joint=True, clamp=(None, None)).update(
        sums([2.0, 5.0], [4.0, 3.0], overlap=2.0)
    )
    assert answer.values.tolist() == pytest.approx([-0.5, 2.0], rel=1e-7)


def test_joint_leaves_a_broken_depth_out_of_the_others() -> None:
    calibrator = OCCCalibrator(3, joint=True, clamp=(None, None))
    three = sums([2.0, 5.0, math.inf], [4.0, 3.0, math.inf], overlap=2.0)
    three.gram[2, :2] = three.gram[:2, 2] = math.nan
    answer = calibrator.update(three)
    assert answer.values.tolist() == pytest.approx([-0.5, 2.0, 0.0], rel=1e-7)
    assert len(answer.events) == 1


def test_state_round_trip_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)

    def random_sums() -> CalibrationSums:
        old = -torch.rand(2, 5, generator=generator)
        mtp = old + torch.randn(2, 2, 5, generator=generator)
        return calibration_sums(old + 0.1 * mtp[0], old, mtp, torch.ones(2, 5))

    first = OCCCalibrator(2, ema=0.9, joint=True, clamp=(None, None))
    for _ in range(3):
        first.update(random_sums())
    state = first.state_dict()
    second = OCCCalibrator(2, ema=0.9, joint=True, clamp=(None, None))
    second.load_state_dict(state)
    following = random_sums()
    saved = {k: v.clone() for k, v in state.items()}
    assert torch.equal(first.update(following).values, second.update(following).values)
    assert all(torch.equal(state[k], saved[k]) for k in state)  # a copy, not a view
    assert all(torch.equal(first.state_dict()[k], second.state_dict()[k]) for k in state)


def test_state_of_another_number_of_depths_is_refused() -> None:
    with pytest.raises(ValueError, match=r"current \[3\].*expected.*current \[2\]"):
        OCCCalibrator(2).load_state_dict(OCCCalibrator(3).state_dict())
    state = OCCCalibrator(2).state_dict()
    del state["gram"]
    with pytest.raises(ValueError, match="another number of MTP depths or by another version"):
        OCCCalibrator(2).load_state_dict(state)
    with pytest.raises(ValueError, match="sums for 1 depths, but the calibrator has num_depths=2"):
        OCCCalibrator(2).update(sums([1.0], [1.0]))


def test_answers_and_state_are_copies() -> None:
    calibrator = OCCCalibrator(1)
    answer = calibrator.update(sums([1.0], [2.0]))
    state = calibrator.state_dict()
    answer.values.fill_(9.0)
    for value in state.values():
        value.fill_(9.0)
    assert calibrator.current.item() == pytest.approx(0.5, rel=1e-8)
    assert calibrator.update(sums([1.0], [4.0])).values.item() == pytest.approx(0.25, rel=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_depths": 0}, "num_depths is 0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"ema": -0.1}, "ema is -0.1"),
        ({"lambda_plus": math.nan}, "lambda_plus is nan"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"clamp": (1.0, 0.0)}, "lower bound exceeds"),
        ({"clamp": (math.nan, None)}, "use numbers or None"),
    ],
)
def test_bad_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OCCCalibrator(**{"num_depths": 1, **options})
