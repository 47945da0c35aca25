"""Tiles of logits as a GPU works on them against the CPU's operations; gradients against dense
torch are in ``test_head_statistics.py``."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.mcore.vocabulary import fused, logprobs
from megatron_occ.mcore.vocabulary.logprobs import HeadTokens, VocabShard, head_statistics
from tests.mcore.test_head_statistics import several_heads

TEMPERATURE = 0.8


@pytest.fixture
def tiles(monkeypatch):
    """Choose the kind of tiles and their size; what a GPU would compile runs as it is."""
    monkeypatch.setattr(fused, "kernel", lambda function: function)

    def choose(*, is_fused, logits=2**26):
        monkeypatch.setattr(logprobs, "is_fused", lambda device: is_fused)
        monkeypatch.setattr(logprobs, "FUSED_LOGITS", logits)

    return choose


def statistics(weight, hidden, targets, scales):
    """Log-probs, entropies and top ids of a head, and gradients by weight and hidden states."""
    leaves = [x.detach().clone().requires_grad_() for x in (weight, hidden)]
    head = HeadTokens(leaves[1], targets, entropy=True, top_ids=True)
    shard = VocabShard(0, weight.size(0) - 3)  # three rows are padding
    (found,) = head_statistics([head], leaves[0], shard, TEMPERATURE)
    ((found.logprobs * scales).sum() + 0.3 * found.entropy.sum()).backward()
    return found, [x.grad for x in leaves]


@pytest.mark.parametrize("logits", [2**8, 2**26])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_kinds_of_tiles_agree(tiles, dtype, logits):
    (weight, hidden, *_), targets, scales = several_heads(60, 131, 16, dtype)
    given = weight, hidden, targets[0].clamp(max=120), scales[0]
    tiles(is_fused=False)
    expected, expected_grads = statistics(*given)
    tiles(is_fused=True, logits=logits)
    found, grads = statistics(*given)
    close = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-6}[dtype]
    for name in ("logprobs", "entropy"):
        one, other = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(one, other, atol=close, rtol=close)
    assert torch.equal(found.top_ids, expected.top_ids)
    # sums over tiles round in bf16
    near = 0.02 if dtype == torch.bfloat16 else close
    for one, other in zip(grads, expected_grads, strict=True):
        assert (one - other).abs().max() <= near * other.abs().max()
    assert not grads[0][-3:].any()


@pytest.mark.parametrize("compiles", [True, False])
def test_the_kind_follows_the_device_and_what_can_be_compiled_for_it(monkeypatch, compiles):
    monkeypatch.setattr(logprobs, "compiles", lambda: compiles)
    assert logprobs.is_fused(torch.device("cuda")) is compiles
    assert not logprobs.is_fused(torch.device("cpu"))
