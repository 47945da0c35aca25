"""Log-probs of several heads in one call, and memory: against dense torch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_occ.mcore.vocabulary import logprobs
from megatron_occ.mcore.vocabulary.logprobs import (
    HeadTokens,
    TokenStatistics,
    VocabShard,
    draft_distance,
    head_statistics,
)

WIDTH = 16


def dense_statistics(hidden, weight, targets, temperature=1.0):
    logits = hidden @ weight.t() / temperature
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    picked = log_probs.gather(-1, targets[:, None]).squeeze(-1)
    return picked, -(log_probs.exp() * log_probs).sum(-1)


def joint_loss(results, scales):
    found = [result.logprobs for result in results]
    entropies = [result.entropy for result in results if result.entropy is not None]
    return (torch.stack(found) * scales).sum() + 0.3 * sum(e.sum() for e in entropies)


def several_heads(tokens, vocabulary, width, dtype, count=3):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(count, tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / 2
    targets = torch.randint(0, vocabulary, (count, tokens), generator=generator)
    scales = torch.randn(count, tokens, generator=generator)
    leaves = [x.to(dtype).requires_grad_() for x in (weight, *hidden)]
    return leaves, targets, scales


def run_heads(leaves, targets, scales, detached=()):
    """Ours, in fresh leaves; heads in ``detached`` do not train the weight."""
    weight, *hidden = (x.detach().clone().requires_grad_() for x in leaves)
    heads = [
        HeadTokens(x, y, entropy=k != 1)
        for k, (x, y) in enumerate(zip(hidden, targets, strict=True))
    ]
    shard = VocabShard(0, weight.size(0))
    groups = (weight, [k for k in range(len(heads)) if k not in detached])
    groups = [groups, (weight.detach(), list(detached))] if detached else [groups]
    results = {}
    for rows, members in groups:
        found = head_statistics([heads[k] for k in members], rows, shard, 0.9)
        results |= dict(zip(members, found, strict=True))
    joint_loss([results[k] for k in range(len(heads))], scales).backward()
    return [x.grad for x in (weight, *hidden)]


def run_dense(leaves, targets, scales, detached=()):
    weight, *hidden = (x.detach().double().requires_grad_() for x in leaves)
    results = []
    for k, (x, y) in enumerate(zip(hidden, targets, strict=True)):
        rows = weight.detach() if k in detached else weight
        picked, entropy = dense_statistics(x, rows, y, 0.9)
        results.append(TokenStatistics(picked, entropy if k != 1 else None, None))
    joint_loss(results, scales).backward()
    return [x.grad for x in (weight, *hidden)]


@pytest.mark.parametrize("chunk", [2**8, 2**10, 2**24])
@pytest.mark.parametrize("detached", [(), (1, 2)])
def test_fp32_gradients_of_several_heads_equal_dense_ones(cut, chunk, detached):
    cut(chunk)
    problem = several_heads(70, 203, 16, torch.float32)
    pairs = zip(run_heads(*problem, detached), run_dense(*problem, detached), strict=True)
    for found, expected in pairs:
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_bf16_gradients_over_many_tiles_are_those_of_one_tile(cut):
    """Sums over tiles are in fp32: cutting the same problem finely costs little precision."""
    problem = several_heads(300, 600, 16, torch.bfloat16)
    exact = run_dense(*problem)
    whole_error = errors(run_heads(*problem), exact)
    cut(2**8)
    for fine, coarse in zip(errors(run_heads(*problem), exact), whole_error, strict=True):
        assert coarse < 0.01
        assert fine < 1.3 * coarse


def errors(found, expected):
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


def test_a_head_that_nothing_flows_back_into():
    (weight, *hidden), targets, _ = several_heads(9, 21, 6, torch.float64)
    heads = [HeadTokens(x, y) for x, y in zip(hidden, targets, strict=True)]
    head_statistics(heads, weight, VocabShard(0, 21))[1].logprobs.sum().backward()
    assert hidden[0].grad is None
    assert hidden[2].grad is None
    states, rows = (x.detach().requires_grad_() for x in (hidden[1], weight))
    dense_statistics(states, rows, targets[1])[0].sum().backward()
    torch.testing.assert_close(hidden[1].grad, states.grad, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(weight.grad, rows.grad, atol=1e-12, rtol=1e-12)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        result = operation(*args, **(kwargs or {}))
        for storage in {x.untyped_storage() for x in tree_leaves(result) if is_tensor(x)}:
            if storage._cdata not in given and storage._cdata not in self.known:
                self.known[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata)
        self.peak = max(self.peak, self.live)
        return result

    def freed(self, key):
        self.live -= self.known.pop(key)


def is_tensor(value):
    return isinstance(value, torch.Tensor)


def extra_bytes(run, leaves):
    """Peak of a forward and backward pass less the gradients that it leaves."""
    for leaf in leaves:
        leaf.grad = None
    gc.collect()
    with LiveBytes() as counter:
        run().backward()
    return counter.peak - sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)


def statistics_bytes(tokens, vocabulary, heads, dtype, compute=head_statistics):
    leaves, targets, scales = several_heads(tokens, vocabulary, WIDTH, dtype, heads)
    weight, *hidden = leaves
    asked = [HeadTokens(x, y, entropy=True) for x, y in zip(hidden, targets, strict=True)]
    shard = VocabShard(0, vocabulary)
    return extra_bytes(lambda: joint_loss(compute(asked, weight, shard), scales), leaves)


def dense_heads(asked, weight, _shard):
    found = [dense_statistics(head.hidden, weight, head.targets) for head in asked]
    return [TokenStatistics(picked, entropy, None) for picked, entropy in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_one_tile(monkeypatch, dtype):
    """Whatever tokens, heads and vocabulary; a token's own numbers remain."""
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 2**14)
    tile = 4 * 2**14
    base = statistics_bytes(256, 2048, 2, dtype)
    # one tile, one more for the entropy, one in bf16; a block of the weight's gradient
    assert 2 * tile < base < 3.5 * tile
    # normaliser, entropy, upstream gradients; sum for hidden states in fp32 beside bf16
    per_token = 64 + (4 * WIDTH if dtype == torch.bfloat16 else 0)
    assert per_token < 4 * 2048 / 50
    assert statistics_bytes(1024, 2048, 2, dtype) - base <= per_token * 2 * 768
    assert statistics_bytes(256, 2048, 6, dtype) - base <= per_token * 4 * 256
    assert statistics_bytes(256, 8192, 2, dtype) <= base
    # few tokens: a tile could be wide, but not the blocks of weight that go with it
    assert statistics_bytes(8, 8192, 2, dtype) < base
    dense = statistics_bytes(256, 2048, 2, dtype, dense_heads)
    assert dense > 8 * base


@pytest.mark.parametrize("kind", ["soft_ce", "tv"])
def test_memory_of_a_distance_is_that_of_one_tile(monkeypatch, kind):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 2**14)
    tile = 4 * 2**14

    def measure(tokens):
        leaves, _, _ = several_heads(tokens, 2048, WIDTH, torch.float32, 2)
        weight, hidden, teacher = leaves
        shard = VocabShard(0, 2048)
        return extra_bytes(
            lambda: draft_distance(kind, hidden, weight, teacher, shard).sum(), leaves
        )

    base = measure(256)
    assert 2 * tile <= base < 2.5 * tile
    assert measure(1024) - base <= 16 * 768
