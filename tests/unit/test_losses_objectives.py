"""CISPO, SAPO and DPPO: the papers' formulas token by token, gradients, and how they add up."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_occ.losses import Cispo, Clipped, Dppo, Sapo, policy_loss, response_counts
from tests.unit.test_losses_policy import GARBAGE, batch

TOKENWISE = ("token", "sequence", "sum", "constant")
LENGTH = 9.0


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def binary(p, q, kind):
    """Divergence of "this token or another" between old probability q and new p."""
    if kind == "tv":
        return 0.5 * (abs(p - q) + abs((1 - p) - (1 - q)))
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


def cispo(new, old, advantage):
    weight = min(max(math.exp(new - old), 0.3), 1.4)
    return -weight * advantage * new, -weight * advantage


def sapo(new, old, advantage):
    ratio, tau = math.exp(new - old), 2.0 if advantage > 0 else 3.0
    gate = sigmoid(tau * (ratio - 1))
    # (4 / tau) tau gate (1 - gate) d ratio / d new
    return -4 / tau * gate * advantage, -4 * gate * (1 - gate) * ratio * advantage


def dppo(kind, limit):
    def term(new, old, advantage):
        ratio = math.exp(new - old)
        leaves = (advantage > 0 and ratio > 1) or (advantage < 0 and ratio < 1)
        if leaves and binary(math.exp(new), math.exp(old), kind) > limit:
            return 0.0, 0.0
        return -ratio * advantage, -ratio * advantage

    return term


# objective, and (loss, derivative by the new log-prob) of one token by the paper's formula
CASES = {
    "cispo": (Cispo(0.7, 0.4), cispo),
    "sapo": (Sapo(2.0, 3.0), sapo),
    "dppo tv": (Dppo(0.1, "tv"), dppo("tv", 0.1)),
    "dppo kl": (Dppo(0.02, "kl"), dppo("kl", 0.02)),
}


def data_of(seed=3):
    data = batch(seed=seed, spread=1.0)
    # log-probs: at most 0
    data["logprobs"] = data["logprobs"].clamp(max=-0.01)
    data["old_logprobs"] = data["old_logprobs"].clamp(max=-0.01)
    return data


def counts(aggregation, mask):
    tokens, sequences = response_counts(mask)
    return {"token": tokens, "constant": sequences * LENGTH}.get(aggregation, sequences).double()


@pytest.mark.parametrize("aggregation", TOKENWISE)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_formulas(name, aggregation):
    objective, term = CASES[name]
    data = data_of()
    weights = torch.rand_like(data["mask"]) * 2
    count = counts(aggregation, data["mask"])
    logprobs = data["logprobs"].clone().requires_grad_()
    loss, _ = policy_loss(
        **{**data, "logprobs": logprobs},
        objective=objective,
        aggregation=aggregation,
        importance_weights=weights,
        normalizer=count,
    )
    loss.backward()
    total, gradient, cut = 0.0, torch.zeros_like(logprobs), 0
    for row, kept in enumerate(data["mask"].tolist()):
        share = 1 / max(sum(kept), 1) if aggregation == "sequence" else 1.0
        for t in [t for t, is_kept in enumerate(kept) if is_kept]:
            given = [data[key][row, t].item() for key in ("logprobs", "old_logprobs", "advantages")]
            value, slope = term(*given)
            factor = share * weights[row, t].item() / count.item()
            total += factor * value
            gradient[row, t] = factor * slope
            cut += slope == 0
    assert loss.item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(logprobs.grad, gradient, rtol=1e-10, atol=1e-14)
    # the case has to reach what it is a case of
    assert (cut > 0) == name.startswith("dppo")


@pytest.mark.parametrize("name", CASES)
def test_on_policy_every_objective_has_the_policy_gradient(name):
    """At r = 1 the slope is -A, as of the clipped loss."""
    data = data_of()
    logprobs = data["old_logprobs"].clone().requires_grad_()
    given = (data["old_logprobs"], data["advantages"], data["mask"])
    policy_loss(logprobs, *given, CASES[name][0])[0].backward()
    again = data["old_logprobs"].clone().requires_grad_()
    policy_loss(again, *given, Clipped())[0].backward()
    torch.testing.assert_close(logprobs.grad, again.grad)


@pytest.mark.parametrize("aggregation", TOKENWISE)
@pytest.mark.parametrize("name", CASES)
def test_parts_add_up_and_masked_positions_may_hold_anything(name, aggregation):
    data = data_of()
    options = {"objective": CASES[name][0], "aggregation": aggregation}
    options["normalizer"] = counts(aggregation, data["mask"])
    whole, metrics = policy_loss(**data, **options)
    spoilt = {key: value.clone() for key, value in data.items()}
    hidden = data["mask"] == 0
    for key in ("logprobs", "old_logprobs", "advantages"):
        spoilt[key][hidden] = torch.tensor(GARBAGE, dtype=torch.float64)[
            torch.arange(int(hidden.sum())) % len(GARBAGE)
        ]
    spoilt["logprobs"].requires_grad_()
    parts = [policy_loss(**{k: v[i : i + 2] for k, v in spoilt.items()}, **options) for i in (0, 2)]
    total = parts[0][0] + parts[1][0]
    total.backward()
    torch.testing.assert_close(total.detach(), whole)
    assert torch.isfinite(spoilt["logprobs"].grad).all()
    assert not spoilt["logprobs"].grad[hidden].any()
    for key, value in metrics.items():
        torch.testing.assert_close(parts[0][1][key] + parts[1][1][key], value)


def test_what_is_cut_is_counted():
    old = torch.tensor([[-1.0, -1.0, -1.0, -1.0]]).double()
    new = torch.tensor([[-2.0, -0.1, -0.1, -2.0]]).double()
    advantages = torch.tensor([[-1.0, 1.0, -1.0, 1.0]]).double()
    mask = torch.ones(1, 4)
    for objective, low, high in ((Dppo(0.1), 1, 1), (Cispo(0.5, 0.5), 2, 2), (Sapo(), 0, 0)):
        _, found = policy_loss(new, old, advantages, mask, objective)
        assert (found["clip_fraction_low"], found["clip_fraction_high"]) == (low, high), objective
        assert found["dual_clip_fraction"] == 0


def test_a_divergence_at_the_end_of_its_range_is_finite():
    """A token that was certain, and one that has become certain."""
    new = torch.tensor([[0.0, -5.0, 0.0]], requires_grad=True)
    old = torch.tensor([[-5.0, 0.0, 0.0]])
    advantages = torch.tensor([[1.0, -1.0, 1.0]])
    for kind in ("tv", "kl"):
        loss, found = policy_loss(new, old, advantages, torch.ones(1, 3), Dppo(0.1, kind))
        (gradient,) = torch.autograd.grad(loss, new)
        assert gradient.tolist() == [[0.0, 0.0, pytest.approx(-1 / 3)]]
        assert found["clip_fraction_low"] == found["clip_fraction_high"] == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sapo(tau_positive=0), "tau_positive is 0"),
        (lambda: Dppo(0), "divergence_limit is 0"),
        (lambda: Dppo(0.1, "js"), "'js': use one of tv, kl"),
        (lambda: Cispo(2.0, 1.0), "clip_low is 2.0"),
        (
            lambda: policy_loss(**data_of(), objective=Sapo(), aggregation="constant"),
            "give a normalizer, sequences",
        ),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
