"""Clipped policy loss: numbers, gradients, masking, normalisation, importance weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_occ.losses import clipped_policy_loss, response_counts

AGGREGATIONS = ("token", "sequence", "gspo")
GARBAGE = (math.nan, math.inf, -math.inf, 1e30)


def batch(seed: int = 0, rows: int = 4, length: int = 7, spread: float = 0.5) -> dict[str, Tensor]:
    """Random float64 batch; row 1 is masked whole, the others in part."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -normal(rows, length).abs()
    mask = (torch.rand(rows, length, generator=generator) < 0.6).double()
    mask[:, 2], mask[:, -1], mask[1] = 1.0, 0.0, 0.0
    return {
        "logprobs": old + spread * normal(rows, length),
        "old_logprobs": old,
        "advantages": normal(rows, length),
        "mask": mask,
    }


def naive_loss(
    data: dict[str, Tensor], aggregation: str, dual_clip: float | None, normalizer: float
) -> float:
    """Plain Python, one token at a time."""

    def term(ratio: float, advantage: float) -> float:
        clipped = min(max(ratio, 0.8), 1.28)
        loss = max(-advantage * ratio, -advantage * clipped)
        return min(loss, -dual_clip * advantage) if dual_clip and advantage < 0 else loss

    total = 0.0
    weights = data.get("importance_weights", torch.ones_like(data["mask"]))
    for row in range(len(data["mask"])):
        where = [t for t, kept in enumerate(data["mask"][row].tolist()) if kept]
        if not where:
            continue
        log_ratios = [(data["logprobs"] - data["old_logprobs"])[row, t].item() for t in where]
        advantages = [data["advantages"][row, t].item() for t in where]
        weight = [weights[row, t].item() for t in where]
        n = len(where)
        if aggregation == "gspo":
            value = term(math.exp(sum(log_ratios) / n), sum(advantages) / n)
            total += value * sum(weight) / n
        else:
            terms = zip(log_ratios, advantages, weight, strict=True)
            value = sum(w * term(math.exp(d), a) for d, a, w in terms)
            total += value / n if aggregation == "sequence" else value
    return total / normalizer


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_matches_naive_loop(aggregation: str, dual_clip: float | None, weighted: bool) -> None:
    data: dict[str, Any] = batch(seed=3, spread=1.0)
    if weighted:
        data["importance_weights"] = torch.rand_like(data["mask"]) * 2
    tokens, sequences = response_counts(data["mask"])
    own = tokens if aggregation == "token" else sequences
    loss, _ = clipped_policy_loss(**data, aggregation=aggregation, dual_clip=dual_clip)
    expected = naive_loss(data, aggregation, dual_clip, own.item())
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_one_token_by_hand() -> None:
    def loss_of(ratio: float, advantage: float, **options: Any) -> tuple[float, float]:
        logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
        old, mask = torch.zeros(1, 1), torch.ones(1, 1)
        loss, _ = clipped_policy_loss(logprobs, old, torch.tensor([advantage]), mask, **options)
        loss.backward()
        return pytest.approx(loss.item()), pytest.approx(logprobs.grad.item())

    assert loss_of(1.5, 2.0) == (-2.56, 0.0)  # clipped at 1.28
    assert loss_of(1.2, 2.0) == (-2.4, -2.4)
    assert loss_of(0.5, 2.0) == (-1.0, -1.0)  # low ratio, positive advantage: not clipped
    assert loss_of(0.5, -2.0) == (1.6, 0.0)  # clipped at 0.8
    assert loss_of(5.0, -2.0) == (10.0, 10.0)  # high ratio, negative advantage: not clipped
    assert loss_of(5.0, -2.0, dual_clip=3.0) == (6.0, 0.0)
    assert loss_of(5.0, 2.0, dual_clip=3.0) == (-2.56, 0.0)  # dual clip: A < 0 only


@pytest.mark.parametrize("shape", ["row", "token"])
def test_gradient_at_ratio_one_is_minus_advantage_over_count(shape: str) -> None:
    data = batch()
    advantages = data["advantages"][:, 0] if shape == "row" else data["advantages"]
    per_token = advantages.unsqueeze(1).expand(4, 7) if shape == "row" else advantages
    keep, counts = data["mask"], data["mask"].sum(dim=1, keepdim=True).clamp(min=1)
    row_mean = (per_token * keep).sum(dim=1, keepdim=True) / counts
    expected = {
        "token": -per_token * keep / keep.sum(),
        "sequence": -per_token * keep / counts / 3,  # 3 rows have response tokens
        "gspo": -row_mean * keep / counts / 3,
    }
    for aggregation, gradient in expected.items():
        logprobs = data["old_logprobs"].clone().requires_grad_()
        loss, metrics = clipped_policy_loss(
            logprobs, data["old_logprobs"], advantages, keep, aggregation=aggregation
        )
        loss.backward()
        torch.testing.assert_close(logprobs.grad, gradient, rtol=1e-12, atol=1e-15)
        assert metrics["approx_kl"].item() == 0.0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradient_matches_finite_differences(aggregation: str) -> None:
    data = batch(seed=5, rows=2, length=4)
    data["mask"][1] = 1.0

    def loss_of(logprobs: Tensor) -> Tensor:
        return clipped_policy_loss(
            logprobs, *(data[k] for k in ("old_logprobs", "advantages", "mask")),
            aggregation=aggregation, dual_clip=3.0,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss_of, data["logprobs"].requires_grad_())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_micro_batches_add_up_to_the_mini_batch(aggregation: str, rows: int) -> None:
    data: dict[str, Any] = batch(seed=1, rows=4)
    data["importance_weights"] = torch.rand_like(data["mask"]) * 2
    tokens, sequences = response_counts(data["mask"])
    normalizer = tokens if aggregation == "token" else sequences
    options = {"aggregation": aggregation, "dual_clip": 2.0}

    whole_input = data["logprobs"].clone().requires_grad_()
    whole, whole_metrics = clipped_policy_loss(**{**data, "logprobs": whole_input}, **options)
    whole.backward()

    total, sums, parts_input = 0.0, dict.fromkeys(whole_metrics, 0.0), data["logprobs"].clone()
    parts_input.requires_grad_()
    for start in range(0, 4, rows):
        part = {k: v[start : start + rows] for k, v in {**data, "logprobs": parts_input}.items()}
        loss, metrics = clipped_policy_loss(**part, normalizer=normalizer, **options)
        loss.backward()
        total += loss.item()
        sums = {k: sums[k] + v.item() for k, v in metrics.items()}
    assert total == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(parts_input.grad, whole_input.grad, rtol=1e-12, atol=1e-15)
    assert sums == pytest.approx({k: v.item() for k, v in whole_metrics.items()}, rel=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_garbage_changes_nothing(aggregation: str, garbage: float) -> None:
    clean: dict[str, Any] = batch(seed=2)
    clean["importance_weights"] = torch.ones_like(clean["mask"])
    dirty = {k: v.clone() for k, v in clean.items()}
    for name in ("logprobs", "old_logprobs", "advantages", "importance_weights"):
        dirty[name][clean["mask"] == 0] = garbage
    results = []
    for data in (clean, dirty):
        data["logprobs"].requires_grad_()
        loss, metrics = clipped_policy_loss(**data, aggregation=aggregation, dual_clip=10.0)
        loss.backward()
        results.append((loss.item(), metrics, data["logprobs"].grad))
    assert results[0][0] == results[1][0]
    assert results[0][1] == results[1][1]
    assert torch.equal(results[0][2], results[1][2])
    assert (results[1][2][clean["mask"] == 0] == 0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("normalizer", [None, 0, 5.0, torch.tensor(0), torch.tensor(3.0)])
def test_wholly_masked_batch_is_zero_with_a_graph(aggregation: str, normalizer: Any) -> None:
    data = batch()
    logprobs = torch.full((4, 7), math.nan).requires_grad_()
    loss, metrics = clipped_policy_loss(
        logprobs, data["old_logprobs"], data["advantages"], torch.zeros(4, 7),
        aggregation=aggregation, normalizer=normalizer,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logprobs.grad, torch.zeros(4, 7))
    assert all(value.item() == 0.0 for value in metrics.values())


def test_all_masked_row_counts_nowhere() -> None:
    data = batch()  # row 1 has no response token
    rest = {k: v[[0, 2, 3]] for k, v in data.items()}
    for aggregation in AGGREGATIONS:
        with_row, _ = clipped_policy_loss(**data, aggregation=aggregation)
        without, _ = clipped_policy_loss(**rest, aggregation=aggregation)
        assert with_row.item() == pytest.approx(without.item(), rel=1e-14)


def test_aggregations_weigh_lengths_differently() -> None:
    # one token of advantage 1, three tokens of advantage -1, ratio 1 throughout
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    zeros, advantages = torch.zeros(2, 3), torch.tensor([1.0, -1.0])
    losses = {a: clipped_policy_loss(zeros, zeros, advantages, mask, aggregation=a)[0].item()
              for a in AGGREGATIONS}  # fmt: skip
    assert losses == {"token": 0.5, "sequence": 0.0, "gspo": 0.0}


def test_gspo_ratio_is_the_geometric_mean() -> None:
    old = torch.zeros(1, 4, dtype=torch.float64)
    logprobs = torch.tensor([[0.4, -0.2, 0.1, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    loss, metrics = clipped_policy_loss(
        logprobs, old, torch.tensor([-2.0]), mask, aggregation="gspo", clip_low=3e-4, clip_high=4e-4
    )
    assert loss.item() == pytest.approx(2 * math.exp(0.1), rel=1e-12)
    assert metrics["ratio_sum"].item() == pytest.approx(math.exp(0.1), rel=1e-12)
    k3 = [math.exp(d) - 1 - d for d in (0.4, -0.2, 0.1)]
    assert metrics["approx_kl"].item() == pytest.approx(sum(k3) / 3, rel=1e-12)


def test_metrics_are_sums_over_tokens() -> None:
    ratios = torch.tensor([[0.5, 1.5, 1.0, 5.0, 0.5, 1.5]], dtype=torch.float64)
    advantages = torch.tensor([[-1.0, 1.0, 1.0, -1.0, 1.0, -1.0]])
    mask = torch.ones(1, 6)
    for aggregation in ("token", "sequence"):
        _, metrics = clipped_policy_loss(
            ratios.log(), torch.zeros(1, 6), advantages, mask,
            dual_clip=3.0, aggregation=aggregation, normalizer=100.0,
        )  # fmt: skip
        assert metrics["clip_fraction_low"].item() == 1.0
        assert metrics["clip_fraction_high"].item() == 1.0
        assert metrics["dual_clip_fraction"].item() == 1.0
        assert metrics["ratio_sum"].item() == pytest.approx(10.0)
        k3 = sum(r - 1 - math.log(r) for r in ratios[0].tolist())
        assert metrics["approx_kl"].item() == pytest.approx(k3)
        assert all(v.dim() == 0 and not v.requires_grad for v in metrics.values())


def test_extreme_ratios_stay_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        logprobs = torch.tensor([[0.0, -3e4]], dtype=dtype, requires_grad=True)
        old = torch.tensor([[-3e4, 0.0]], dtype=dtype)
        loss, metrics = clipped_policy_loss(logprobs, old, torch.tensor([-1.0]), torch.ones(1, 2))
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx((math.exp(20) + 0.8) / 2, rel=1e-6)
        assert torch.isfinite(logprobs.grad).all()
        assert all(torch.isfinite(v) for v in metrics.values())


def test_only_the_current_logprobs_receive_a_gradient() -> None:
    data: dict[str, Any] = {k: v.requires_grad_() for k, v in batch().items() if k != "mask"}
    data["importance_weights"] = torch.ones(4, 7, requires_grad=True)
    loss, _ = clipped_policy_loss(**data, mask=batch()["mask"])
    loss.backward()
    assert [k for k, v in data.items() if v.grad is not None] == ["logprobs"]


def test_negative_coefficient_scales_the_loss_and_does_not_flip_the_clip() -> None:
    """Weak point 8: lambda times the advantage would clip the other side."""
    old, mask, advantage, factor = torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1), -0.5

    def gradient(scale: float, advantage: Tensor) -> list[float]:
        logprobs = torch.tensor([[math.log(1.5), math.log(0.5)]], requires_grad=True)
        loss, _ = clipped_policy_loss(logprobs, old, advantage, mask)
        (scale * loss).backward()
        return logprobs.grad[0].tolist()

    plain = gradient(1.0, advantage)
    assert plain == pytest.approx([0.0, -0.25])  # 1.5 is clipped, 0.5 is not
    assert gradient(factor, advantage) == pytest.approx([factor * g for g in plain])
    released = gradient(1.0, factor * advantage)
    assert released == pytest.approx([0.375, 0.0])  # now 0.5 is clipped and 1.5 is not


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "mean"}, "'mean': use one of token, sequence, sum, constant, gspo"),
        ({"clip_low": -0.1}, "clip_low is -0.1"),
        ({"clip_low": 1.1}, "clip_low is 1.1"),
        ({"clip_high": -0.1}, "clip_high is -0.1"),
        ({"clip_high": math.nan}, "clip_high is nan"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0"),
        ({"normalizer": -1.0}, "normalizer is -1.0"),
        ({"normalizer": math.nan}, "normalizer is nan"),
        ({"normalizer": torch.ones(2)}, r"normalizer has shape \[2\]"),
        ({"advantages": torch.ones(7)}, r"advantages have shape \[7\]"),
        ({"mask": torch.ones(4, 6)}, r"mask has shape \[4, 6\]"),
        ({"importance_weights": torch.ones(4)}, r"importance_weights has shape \[4\]"),
    ],
)
def test_bad_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipped_policy_loss(**{**batch(), **options})
