"""The record of a user's own model: the numbers in it, and that it can be summarized."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from megatron_occ.audit.page import render_audit
from megatron_occ.audit.recorder import AuditRecorder
from megatron_occ.audit.summary import summarize
from megatron_occ.audit.text import audit_text

ADVANTAGES = torch.tensor([[1.0], [-1.0], [0.5], [-0.5]])


class Heads(nn.Module):
    """Log-probs [2, b, 3] of a main and an MTP head on a trunk of two parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

    def forward(self, ids):
        hidden = self.layer(self.embedding(ids)).tanh()
        return [nn.functional.logsigmoid(head(hidden)).squeeze(-1) for head in self.heads]

    def groups(self):
        return {"embedding": [self.embedding.weight], "layer 1": list(self.layer.parameters())}


def losses(model, ids):
    """RL's loss, and those of two signals with their log-probs."""
    main, mtp = model(ids)
    signals = {
        "policy": (-(ADVANTAGES * mtp).mean(), mtp),
        "cross-entropy": (-mtp.mean(), mtp),
    }
    return -(ADVANTAGES * main).mean(), signals


def batches(count=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, (4, 3), generator=generator) for _ in range(count)]


MASK = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0]])


def recorded(model, optimizer=None):
    recorder = AuditRecorder(model.groups(), optimizer=optimizer, window=2)
    for ids in batches():
        recorder.measure(*losses(model, ids), MASK)
    return recorder.record("mine", "toy", updates=7)


def trunk_gradient(model, ids, name):
    """By a backward pass of its own, in each group."""
    rl, signals = losses(model, ids)
    model.zero_grad()
    (rl if name == "rl" else signals[name][0]).backward()
    parts = [[p.grad.flatten() for p in parameters] for parameters in model.groups().values()]
    return [torch.cat(part).double() for part in parts]


def products(left, right):
    return pytest.approx([float(a @ b) for a, b in zip(left, right, strict=True)], abs=1e-12)


def test_the_record_holds_the_products_of_separate_backward_passes():
    model = Heads()
    record = recorded(model)
    assert record["groups"] == ["embedding", "layer 1"]
    assert record["parameters"] == 20 + 20
    assert [s["name"] for s in record["signals"]] == ["policy", "cross-entropy"]
    names = ("rl", "policy", "cross-entropy")
    rl, policy, ce = ([trunk_gradient(model, ids, name) for ids in batches()] for name in names)
    sample = record["samples"][4]
    assert (sample["sequences"], sample["tokens"]) == (3, 8)
    same = sample["same"]["euclidean"]
    assert same["rl"] == products(rl[4], rl[4])
    assert same["c"] == [products(rl[4], policy[4]), products(rl[4], ce[4])]
    assert same["v2"] == [products(policy[4], policy[4]), products(ce[4], ce[4])]
    first, second = sample["cross"]["euclidean"]
    assert (first["other"], second["other"]) == (2, 3)
    assert second["rl"] == products(rl[4], rl[3])
    assert second["c"] == [products(rl[4], policy[3]), products(rl[4], ce[3])]
    assert second["c_back"] == [products(policy[4], rl[3]), products(ce[4], rl[3])]
    assert second["v2"] == [products(policy[4], policy[3]), products(ce[4], ce[3])]


def test_tails_are_of_the_tokens_weights():
    policy, ce = recorded(Heads())["samples"][0]["tails"]
    # 8 tokens: |w| 1 six times, 0.5 twice; a thousandth of them is a part of the largest
    assert policy["effective"] == pytest.approx(7**2 / 6.5 / 8)
    assert policy["top"] == pytest.approx(0.008 / 6.5)
    assert ce["effective"] == pytest.approx(1.0)


def test_the_weights_of_the_model_stay_as_they_are():
    model = Heads()
    before = [p.detach().clone() for p in model.parameters()]
    recorded(model)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_table_and_page_of_a_record_with_the_optimizers_metric():
    model = Heads()
    optimizer = torch.optim.Adam(model.parameters())
    losses(model, batches()[0])[0].backward()
    optimizer.step()
    record = recorded(model, optimizer)
    assert record["metrics"] == ["euclidean", "adam"]
    summary = summarize(json.loads(json.dumps(record, allow_nan=False)))
    assert summary["judged_in"] == "adam"
    assert (summary["samples"], summary["pairs"]) == (6, 9)
    text = audit_text(summary)
    assert "audit of mine (toy, 7 RL updates)" in text
    assert "Adam's metric" in text
    assert "cross-entropy" in render_audit(summary)


def test_what_can_not_be_measured_is_refused():
    model = Heads()
    recorder = AuditRecorder(model.groups(), window=1)
    rl, signals = losses(model, batches()[0])
    recorder.measure(rl, signals, MASK)
    with pytest.raises(ValueError, match="give the same each time"):
        recorder.measure(rl, {"policy": signals["policy"]}, MASK)
    loss, logprobs = signals["policy"]
    infinite = {**signals, "policy": (loss * torch.inf, logprobs)}
    with pytest.raises(ValueError, match=r"gradient of 'policy' is not finite"):
        recorder.measure(rl, infinite, MASK)
    detached = {**signals, "policy": (loss, logprobs.detach())}
    with pytest.raises(ValueError, match=r"loss of 'policy' was not computed from the log-probs"):
        recorder.measure(rl, detached, MASK)
    assert len(recorder.record("mine", "toy")["samples"]) == 1
