"""Weights and rejection for a policy that sampled otherwise: by hand, and against plain Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_occ.losses.correction import CorrectionSettings, correct, correction_metrics

LOW, HIGH = 0.7, 1.5


def case(rows=40, length=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sampled = -torch.rand(rows, length, generator=generator, dtype=torch.float64)
    old = sampled + 0.4 * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    mask = (torch.rand(rows, length, generator=generator) < 0.7).double()
    mask[0] = 0
    old[mask == 0], sampled[mask == 0] = math.nan, math.inf
    return old, sampled, mask


def by_hand(old, sampled, mask, settings):
    """Weights (1 where not kept) and what is kept, one sequence at a time."""
    weights, keep = torch.ones_like(mask), torch.zeros_like(mask, dtype=torch.bool)
    for row in range(len(mask)):
        where = [t for t in range(mask.size(1)) if mask[row, t]]
        ratios = {t: math.exp(old[row, t] - sampled[row, t]) for t in where}
        product = math.prod(ratios.values())
        mean = product ** (1 / max(len(where), 1))
        judged = {
            "none": dict.fromkeys(where, 1.0),
            "token": ratios,
            "sequence": dict.fromkeys(where, product),
            "geometric": dict.fromkeys(where, mean),
        }
        vetoed = settings.veto is not None and any(r < settings.veto for r in ratios.values())
        for t in where:
            value = judged[settings.reject][t]
            low = settings.reject_low is not None and value < settings.reject_low
            high = settings.reject_high is not None and value > settings.reject_high
            if vetoed or low or high:
                continue
            keep[row, t] = True
            weight = judged[settings.weights][t]
            bounded = max(weight, settings.low or 0.0)
            bounded = bounded if settings.high is None else min(bounded, settings.high)
            is_masked = settings.outside == "mask" and bounded != weight
            weights[row, t] = 0.0 if is_masked else bounded
    return weights, keep


SETTINGS = [
    *(
        CorrectionSettings(weights, LOW, HIGH, outside)
        for weights, outside in itertools.product(("token", "sequence"), ("truncate", "mask"))
    ),
    CorrectionSettings("token", high=HIGH),
    CorrectionSettings("token"),
    *(
        CorrectionSettings(reject=reject, reject_low=LOW, reject_high=HIGH)
        for reject in ("token", "sequence", "geometric")
    ),
    CorrectionSettings(reject="geometric", reject_high=1.1),
    CorrectionSettings(veto=0.5),
    CorrectionSettings("token", None, HIGH, "truncate", "geometric", LOW, HIGH, veto=0.4),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_weights_and_rejection_are_those_of_plain_python(settings):
    old, sampled, mask = case()
    found = correct(old.requires_grad_(), sampled, mask, settings)
    weights, keep = by_hand(old.detach(), sampled, mask, settings)
    assert torch.equal(found.keep, keep)
    if settings.weights == "none":
        assert found.weights is None
    else:
        torch.testing.assert_close(found.weights, weights)
        assert not found.weights.requires_grad
    # every setting does something, and leaves something
    assert settings.acts
    assert ((weights != 1) | (mask.bool() & ~keep)).any()
    assert keep.any()


def test_one_sequence_by_hand():
    """Ratios 2, 1/2 and 1/4: product 1/4, geometric mean (1/4)^(1/3) = 0.63."""
    old = torch.tensor([[2.0, 0.5, 0.25]]).log()
    sampled, mask = torch.zeros(1, 3), torch.ones(1, 3)

    def weights(**settings):
        return correct(old, sampled, mask, CorrectionSettings(**settings)).weights.tolist()[0]

    def kept(**settings):
        return correct(old, sampled, mask, CorrectionSettings(**settings)).keep.tolist()[0]

    close = pytest.approx
    assert weights(weights="token", high=1.5) == close([1.5, 0.5, 0.25])
    assert weights(weights="token", low=0.4, high=1.5) == close([1.5, 0.5, 0.4])
    assert weights(weights="token", low=0.4, high=1.5, outside="mask") == close([0.0, 0.5, 0.0])
    assert weights(weights="sequence") == close([0.25] * 3)
    assert kept(reject="token", reject_low=0.4) == [True, True, False]
    assert kept(reject="sequence", reject_low=0.3) == [False] * 3
    assert kept(reject="geometric", reject_low=0.6) == [True] * 3
    assert kept(reject="geometric", reject_low=0.7) == [False] * 3
    assert kept(veto=0.3) == [False] * 3
    assert kept(veto=0.2) == [True] * 3


def test_what_is_rejected_has_no_part_in_the_product_of_its_sequence():
    old = torch.tensor([[0.5, 0.0, -9.0]])
    settings = CorrectionSettings("sequence", reject="token", reject_low=0.1)
    found = correct(old, torch.zeros(1, 3), torch.ones(1, 3), settings)
    assert found.keep.tolist() == [[True, True, False]]
    assert found.weights.tolist() == [pytest.approx([math.exp(0.5), math.exp(0.5), 1.0])]


def test_bounds_far_beyond_what_a_number_holds_act():
    old, mask = torch.tensor([[-80.0, -80.0], [0.0, 0.0]]), torch.ones(2, 2)
    for settings in (
        CorrectionSettings(reject="sequence", reject_low=1e-60),
        CorrectionSettings(veto=1e-30),
    ):
        found = correct(old, torch.zeros(2, 2), mask, settings)
        assert found.keep.tolist() == [[False, False], [True, True]]


def test_metrics_add_up_over_parts():
    old, sampled, mask = case()
    settings = SETTINGS[-1]
    whole = correct(old, sampled, mask, settings)
    cuts = [slice(start, start + 7) for start in range(0, len(mask), 7)]
    parts = [correct(old[cut], sampled[cut], mask[cut], settings) for cut in cuts]
    sums = torch.stack([part.sums for part in parts]).sum(0)
    torch.testing.assert_close(sums, whole.sums)
    found = {name: float(value) for name, value in correction_metrics(sums, settings).items()}
    keep, given = whole.keep, mask.bool()
    used = whole.weights[keep]
    raw = (old - sampled)[keep].exp()
    assert found == pytest.approx(
        {
            "rejected/tokens": 1 - keep.sum().item() / given.sum().item(),
            "rejected/sequences": 1 - keep.any(1).sum().item() / given.any(1).sum().item(),
            "weight/mean": used.mean().item(),
            "weight/low": 0.0,
            "weight/high": (raw > HIGH).double().mean().item(),
            "weight/effective": (used.sum() ** 2 / used.square().sum()).item() / len(used),
        }
    )


def test_nothing_of_a_masked_row_and_no_row_at_all():
    for rows in (0, 1):
        empty = torch.zeros(rows, 3)
        found = correct(empty, empty, empty, SETTINGS[-1])
        assert not found.keep.any()
        assert all(torch.isfinite(v) for v in correction_metrics(found.sums, SETTINGS[-1]).values())


@pytest.mark.parametrize("name", ["weights", "outside", "reject"])
def test_unknown_names_are_refused(name):
    values = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=f"{name} is 'x': use one of"):
        correct(values, values, values, CorrectionSettings(**{name: "x"}))
