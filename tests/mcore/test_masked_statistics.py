"""Statistics under a softmax over some of the ids, against dense torch."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.mcore.vocabulary import logprobs
from megatron_occ.mcore.vocabulary.logprobs import HeadTokens, VocabShard, head_statistics
from megatron_occ.mcore.vocabulary.tiles import blocks

TOKENS, WIDTH, VOCABULARY, TEMPERATURE = 40, 8, 61, 0.8
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def problem():
    """Hidden states, weight, targets, upstream gradients, and masks of 0 to 5 ids or of all."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    orders = torch.stack([torch.randperm(VOCABULARY, generator=generator) for _ in range(TOKENS)])
    targets, masks = orders[:, 0], torch.zeros(TOKENS, 6, dtype=torch.int32)
    for row in range(TOKENS):
        kept = row % 6
        # the target is among them, in any place
        ids = orders[row, :kept].roll(row // 6)
        masks[row, :kept] = (ids + 1).int()
    upstream = torch.randn(2, TOKENS, generator=generator, dtype=torch.float64)
    return hidden, weight, targets, masks, upstream


def dense(hidden, weight, targets, masks, upstream):
    """Log-probs, entropies, top ids and gradients by the definition."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = hidden @ weight.t() / TEMPERATURE
    found, entropies, top = [], [], []
    for row, mask in enumerate(masks.tolist()):
        ids = [i - 1 for i in mask if i] or list(range(VOCABULARY))
        log_probs = logits[row, ids].log_softmax(-1)
        found.append(log_probs[ids.index(int(targets[row]))])
        entropies.append(-(log_probs.exp() * log_probs).sum())
        top.append(ids[int(log_probs.argmax())])
    values = torch.stack((torch.stack(found), torch.stack(entropies)))
    (values * upstream).sum().backward()
    return values.detach(), torch.tensor(top), hidden.grad, weight.grad


def ours(hidden, weight, targets, masks, upstream, *, entropy=True):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    head = HeadTokens(hidden, targets, entropy, top_ids=True, masks=masks)
    (found,) = head_statistics([head], weight, VocabShard(0, len(weight)), TEMPERATURE)
    values = [found.logprobs] + ([found.entropy] if entropy else [])
    sum((value * up).sum() for value, up in zip(values, upstream, strict=False)).backward()
    return torch.stack(values).detach(), found.top_ids, hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [2**6, 2**9, 2**24])
def test_values_and_gradients_are_those_of_the_definition(cut, chunk):
    cut(chunk)
    given = problem()
    for found, expected in zip(ours(*given), dense(*given), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


def test_a_log_prob_alone(cut):
    cut(2**7)
    *given, upstream = problem()
    upstream[1] = 0.0
    found, expected = ours(*given, upstream, entropy=False), dense(*given, upstream)
    torch.testing.assert_close(found[0][0], expected[0][0], **EXACT)
    for one, other in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_one_id_that_is_left_has_the_log_prob_0_and_no_gradient(cut):
    hidden, weight, targets, masks, upstream = problem()
    masks[:] = 0
    masks[:, 0] = targets.int() + 1
    values, top, *gradients = ours(hidden, weight, targets, masks, upstream)
    assert not values.any()
    assert torch.equal(top, targets)
    for gradient in gradients:
        assert gradient.abs().max() < 1e-12


def test_masks_hold_for_their_head_alone(cut):
    hidden, weight, targets, masks, _ = problem()
    shard = VocabShard(0, VOCABULARY)
    heads = [HeadTokens(hidden, targets, masks=masks), HeadTokens(hidden, targets)]
    _, other = head_statistics(heads, weight, shard)
    (alone,) = head_statistics([HeadTokens(hidden, targets)], weight, shard)
    assert torch.equal(other.logprobs, alone.logprobs)


@pytest.mark.parametrize("size", [1, 7, VOCABULARY])
def test_what_a_block_leaves_out(size):
    masks = problem()[3]
    kept = [{i - 1 for i in mask if i} or set(range(VOCABULARY)) for mask in masks.tolist()]
    for columns in blocks(VOCABULARY, size):
        removed = VocabShard(0, VOCABULARY).removed(masks, columns)
        for row, ids in enumerate(kept):
            left = {columns.start + i for i, flag in enumerate(removed[row].tolist()) if not flag}
            assert left == {i for i in ids if columns.start <= i < columns.stop}


def test_bf16_leaves_out_what_fp32_does(cut):
    hidden, weight, targets, masks, upstream = problem()
    narrow = ours(hidden.bfloat16(), weight.bfloat16(), targets, masks, upstream.float())
    exact = ours(hidden.bfloat16().double(), weight.bfloat16().double(), targets, masks, upstream)
    torch.testing.assert_close(narrow[0].double(), exact[0], atol=0.1, rtol=0)
    for one, other in zip(narrow[2:], exact[2:], strict=True):
        assert (one.double() - other).norm() < 0.03 * other.norm()


def run_rank(rank, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    logprobs.CHUNK_LOGITS = 2**6
    hidden, weight, targets, masks, upstream = problem()
    values, top, grad_hidden, grad_weight = dense(hidden, weight, targets, masks, upstream)
    rows = slice(0, 31) if rank == 0 else slice(31, VOCABULARY)
    shard = VocabShard(rows.start, rows.stop - rows.start, torch.distributed.group.WORLD)
    hidden, part = hidden.requires_grad_(), weight[rows].clone().requires_grad_()
    head = HeadTokens(hidden, targets, entropy=True, top_ids=True, masks=masks)
    (found,) = head_statistics([head], part, shard, TEMPERATURE)
    given = torch.stack((found.logprobs, found.entropy))
    (given * upstream).sum().backward()
    torch.testing.assert_close(given.detach(), values, **EXACT)
    assert torch.equal(found.top_ids, top)
    torch.distributed.all_reduce(hidden.grad)  # each shard has its part
    torch.testing.assert_close(hidden.grad, grad_hidden, **EXACT)
    torch.testing.assert_close(part.grad, grad_weight[rows], **EXACT)
    torch.distributed.destroy_process_group()


def test_two_tensor_parallel_ranks_equal_one(tmp_path):
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path / "store"),), nprocs=2)
