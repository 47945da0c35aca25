"""Chunked, vocabulary-parallel log-probs and draft distances against dense torch."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_occ.losses import soft_cross_entropy, total_variation
from megatron_occ.mcore.vocabulary import logprobs
from megatron_occ.mcore.vocabulary.logprobs import (
    HeadTokens,
    TokenStatistics,
    VocabShard,
    draft_distance,
    head_statistics,
)
from megatron_occ.mcore.vocabulary.tiles import Tiles
from tests.mcore.conftest import assert_same_up_to_rounding

TOKENS, WIDTH, VOCABULARY = 11, 6, 19
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def token_statistics(
    hidden, weight, targets, shard, temperature=1.0, *, entropy=False, top_ids=False
) -> TokenStatistics:
    """Statistics of one head."""
    head = HeadTokens(hidden, targets, entropy, top_ids)
    return head_statistics([head], weight, shard, temperature)[0]


everything = functools.partial(token_statistics, entropy=True, top_ids=True)
DENSE_DISTANCES = {"soft_ce": soft_cross_entropy, "tv": total_variation}


def inputs(dtype=torch.float64, rows=VOCABULARY, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    upstream = torch.randn(2, TOKENS, generator=generator, dtype=torch.float64)
    return (
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        targets,
        upstream,
    )


def dense_statistics(hidden, weight, targets, temperature=1.0):
    log_probs = (hidden @ weight.t() / temperature).log_softmax(-1)
    picked = torch.stack([log_probs[n, y] for n, y in enumerate(targets.tolist())])
    entropy = torch.distributions.Categorical(logits=log_probs).entropy()
    return picked, entropy, log_probs.argmax(-1)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("top_ids", [False, True])
def test_only_what_is_asked_for_comes_back_and_the_rest_is_the_same(entropy, top_ids):
    hidden, weight, targets, _ = inputs()
    got = token_statistics(hidden, weight, targets, whole(), 0.7, entropy=entropy, top_ids=top_ids)
    full = everything(hidden, weight, targets, whole(), 0.7)
    assert torch.equal(got.logprobs, full.logprobs)
    assert torch.equal(got.entropy, full.entropy) if entropy else got.entropy is None
    assert torch.equal(got.top_ids, full.top_ids) if top_ids else got.top_ids is None
    grads = [torch.autograd.grad(x.logprobs.sum(), (hidden, weight)) for x in (got, full)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def whole(rows=VOCABULARY):
    return VocabShard(0, rows)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("parts", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_statistics_and_gradients_equal_dense_ones(temperature, parts):
    hidden, weight, targets, upstream = inputs()
    upstream = upstream * torch.tensor(parts, dtype=torch.float64).unsqueeze(1)
    got = everything(hidden, weight, targets, whole(), temperature)
    picked, entropy, top = dense_statistics(hidden, weight, targets, temperature)
    torch.testing.assert_close(got.logprobs, picked, **EXACT)
    torch.testing.assert_close(got.entropy, entropy, **EXACT)
    assert torch.equal(got.top_ids, top)
    found = torch.autograd.grad(
        (upstream[0] * got.logprobs + upstream[1] * got.entropy).sum(), (hidden, weight)
    )
    expected = torch.autograd.grad(
        (upstream[0] * picked + upstream[1] * entropy).sum(), (hidden, weight)
    )
    for gradient, reference in zip(found, expected, strict=True):
        assert reference.abs().max() > 0
        torch.testing.assert_close(gradient, reference, **EXACT)


@pytest.mark.parametrize("name", ["logprobs", "entropy"])
def test_gradients_of_one_output_alone(name):
    """The other output's upstream gradient is then absent, not zero."""
    hidden, weight, targets, _ = inputs()
    getattr(everything(hidden, weight, targets, whole()), name).sum().backward()
    dense_hidden, dense_weight, _, _ = inputs()
    picked, entropy, _ = dense_statistics(dense_hidden, dense_weight, targets)
    (picked if name == "logprobs" else entropy).sum().backward()
    torch.testing.assert_close(hidden.grad, dense_hidden.grad, **EXACT)
    torch.testing.assert_close(weight.grad, dense_weight.grad, **EXACT)


def test_gradcheck():
    hidden, weight, targets, _ = inputs()

    def statistics(states, rows):
        result = everything(states, rows, targets, whole(), 0.7)
        return result.logprobs, result.entropy

    assert torch.autograd.gradcheck(statistics, (hidden, weight))
    teacher = inputs(seed=1)[0].detach()
    for kind in DENSE_DISTANCES:

        def distance(states, kind=kind):
            return draft_distance(kind, states, weight, teacher, whole(), 0.7)

        assert torch.autograd.gradcheck(distance, (hidden,))


def test_detached_weight_gets_no_gradient_and_costs_no_product():
    hidden, weight, targets, _ = inputs()
    product = 2 * TOKENS * WIDTH * VOCABULARY

    def backward_products(rows):
        result = everything(hidden, rows, targets, whole())
        with FlopCounterMode(display=False) as counter:
            result.logprobs.sum().backward()
        return counter.get_total_flops() / product

    # logits again and the gradient of hidden
    assert backward_products(weight.detach()) == 2
    assert weight.grad is None
    without = hidden.grad.clone()
    hidden.grad = None
    assert backward_products(weight) == 3
    assert torch.equal(hidden.grad, without)


def test_frozen_hidden_states_get_no_gradient():
    hidden, weight, targets, _ = inputs()
    everything(hidden.detach(), weight, targets, whole()).logprobs.sum().backward()
    assert hidden.grad is None
    assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("chunk", [1, 2 * VOCABULARY, 5 * VOCABULARY + 3, TOKENS * VOCABULARY])
def test_chunks_change_nothing_and_bound_the_logits(monkeypatch, chunk):
    def run():
        hidden, weight, targets, upstream = inputs()
        teacher = inputs(seed=1)[0].detach()
        got = everything(hidden, weight, targets, whole(), 0.7)
        tv = draft_distance("tv", hidden, weight, teacher, whole(), 0.7)
        soft = draft_distance("soft_ce", hidden, weight, teacher, whole(), 0.7)
        loss = upstream[0] * (got.logprobs + tv) + upstream[1] * (got.entropy + soft)
        loss.sum().backward()
        return got.logprobs, got.entropy, got.top_ids, tv, soft, hidden.grad, weight.grad

    expected = run()
    sizes, original = [], Tiles.logits
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", chunk)

    def recorded(*arguments, **copy):
        logits = original(*arguments, **copy)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(Tiles, "logits", recorded)
    for value, reference in zip(run(), expected, strict=True):
        torch.testing.assert_close(value, reference, **EXACT)
    # distances: one token is the least
    assert max(sizes) <= max(chunk, VOCABULARY)


def test_bf16_inputs_give_fp32_logprobs_close_to_those_of_fp32():
    hidden, weight, targets, upstream = inputs(torch.bfloat16)
    got = everything(hidden, weight, targets, whole())
    single = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    picked, entropy, _ = dense_statistics(*single, targets)
    assert got.logprobs.dtype == got.entropy.dtype == torch.float32
    # a logit of at most 8 is rounded by up to 2**-6, in the picked one and in the normaliser
    torch.testing.assert_close(got.logprobs, picked, atol=2**-5, rtol=0)
    torch.testing.assert_close(got.entropy, entropy, atol=2**-4, rtol=0)
    scale = upstream[0].float()
    (scale * got.logprobs).sum().backward()
    (scale * picked).sum().backward()
    for low, reference in zip((hidden, weight), single, strict=True):
        assert low.grad.dtype == torch.bfloat16
        error = (low.grad.float() - reference.grad).norm() / reference.grad.norm()
        assert error < 0.02


def test_the_gradient_of_bf16_weights_is_summed_in_fp32(monkeypatch):
    """400 chunks of one token each: a sum in bf16 would stop growing."""
    generator = torch.Generator().manual_seed(6)
    hidden = 1 + torch.rand(400, WIDTH, generator=generator)
    targets = torch.randint(0, 4, (400,), generator=generator)

    def gradient(dtype):
        weight = torch.zeros(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
        everything(hidden.to(dtype), weight, targets, whole()).logprobs.sum().backward()
        return weight.grad.float()

    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 1)
    exact = gradient(torch.float32)
    assert (gradient(torch.bfloat16) - exact).norm() / exact.norm() < 0.004


def test_log_softmax_itself_is_computed_in_fp32():
    """Equal logits: rounding of 1/v or of the sum to bf16 would show."""
    rows = 1000
    hidden, weight = torch.zeros(2, WIDTH).bfloat16(), torch.ones(rows, WIDTH).bfloat16()
    got = everything(hidden, weight, torch.tensor([3, 999]), whole(rows))
    expected = torch.full((2,), -6.907755278982137)  # -ln 1000
    assert_same_up_to_rounding(got.logprobs, expected)
    assert_same_up_to_rounding(got.entropy, -expected)


def test_padding_rows_take_no_part():
    hidden, weight, targets, upstream = inputs(rows=VOCABULARY + 4)
    teacher = inputs(seed=1)[0].detach()
    with torch.no_grad():
        weight[VOCABULARY:] = 50.0  # would win every softmax
    shard = VocabShard(0, VOCABULARY)
    got = everything(hidden, weight, targets, shard)
    picked, entropy, top = dense_statistics(hidden, weight[:VOCABULARY], targets)
    torch.testing.assert_close(got.logprobs, picked, **EXACT)
    torch.testing.assert_close(got.entropy, entropy, **EXACT)
    assert torch.equal(got.top_ids, top)
    (upstream[0] * got.logprobs + upstream[1] * got.entropy).sum().backward()
    assert weight.grad.shape == weight.shape
    assert torch.count_nonzero(weight.grad[VOCABULARY:]) == 0
    assert weight.grad[:VOCABULARY].abs().max() > 0
    for kind, dense in DENSE_DISTANCES.items():
        distance = draft_distance(kind, hidden, weight, teacher, shard)
        reference = dense(hidden @ weight[:VOCABULARY].t(), teacher @ weight[:VOCABULARY].t())
        torch.testing.assert_close(distance, reference, **EXACT)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["soft_ce", "tv"])
def test_draft_distances_equal_the_dense_definitions(kind, temperature):
    hidden, weight, _, upstream = inputs()
    teacher = inputs(seed=1)[0]
    distance = draft_distance(kind, hidden, weight, teacher, whole(), temperature)
    (upstream[0] * distance).sum().backward()
    assert weight.grad is None
    assert teacher.grad is None
    student = hidden.detach().requires_grad_()
    logits = [states @ weight.detach().t() / temperature for states in (student, teacher.detach())]
    reference = DENSE_DISTANCES[kind](*logits)
    (upstream[0] * reference).sum().backward()
    torch.testing.assert_close(distance, reference, **EXACT)
    torch.testing.assert_close(hidden.grad, student.grad, **EXACT)


def test_distance_of_a_perfect_drafter():
    hidden, weight, targets, _ = inputs()
    copy = hidden.detach().requires_grad_()
    shard = whole()
    tv = draft_distance("tv", copy, weight, hidden, shard)
    soft = draft_distance("soft_ce", copy, weight, hidden, shard)
    assert torch.count_nonzero(tv) == 0
    entropy = everything(hidden, weight, targets, shard).entropy
    torch.testing.assert_close(soft, entropy, **EXACT)
    (tv + soft).sum().backward()
    assert copy.grad.abs().max() < 1e-12


def integer_inputs():
    """Small whole numbers: logits are exact however they are computed, and often tie."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randint(-2, 3, (3, 40, WIDTH), generator=generator).double()
    weight = torch.randint(-2, 3, (24, WIDTH), generator=generator).double()
    weight[15] = weight[3]  # a tie across shards
    weight[23] = 50.0  # padding
    targets = torch.randint(0, 23, (40,), generator=generator)
    upstream = torch.randn(4, 40, generator=generator, dtype=torch.float64)
    return hidden, weight, targets, upstream


def joint_run(hidden, weight, targets, upstream, shard):
    """Values, and gradients of an arbitrary combination of all outputs."""
    hidden = hidden[0].clone().requires_grad_(), hidden[1].clone().requires_grad_(), hidden[2]
    weight = weight.clone().requires_grad_()
    got = everything(hidden[0], weight, targets, shard, 0.7)
    soft = draft_distance("soft_ce", hidden[1], weight, hidden[2], shard, 0.7)
    tv = draft_distance("tv", hidden[1], weight, hidden[2], shard, 0.7)
    values = torch.stack((got.logprobs, got.entropy, soft, tv))
    (upstream * values).sum().backward()
    return values.detach(), got.top_ids, (hidden[0].grad, hidden[1].grad), weight.grad


def run_rank(rank, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    hidden, weight, targets, upstream = integer_inputs()
    values, top, grads, weight_grad = joint_run(hidden, weight, targets, upstream, whole(23))
    best = (hidden[0] @ weight[:23].t()).amax(-1, keepdim=True) == hidden[0] @ weight[:23].t()
    across_shards = best[:, :12].any(-1) & best[:, 12:].any(-1)
    assert across_shards.sum() >= 3

    # several tiles a rank, so that ties cross them too
    logprobs.CHUNK_LOGITS = 2**5
    rows = slice(12 * rank, 12 * rank + 12)
    # unequal sizes: 12 ids on rank 0; 11 and one row of padding on rank 1
    shard = VocabShard(12 * rank, 12 - rank, torch.distributed.group.WORLD)
    part = joint_run(hidden, weight[rows], targets, upstream, shard)
    torch.testing.assert_close(part[0], values, **EXACT)
    assert torch.equal(part[1], top)
    for gradient, reference in zip(part[2], grads, strict=True):
        torch.distributed.all_reduce(gradient)  # each shard has its part
        torch.testing.assert_close(gradient, reference, **EXACT)
    torch.testing.assert_close(part[3], weight_grad[rows], **EXACT)
    # rank 1 has padding alone
    padded = torch.cat((weight, torch.full((24, WIDTH), 50.0, dtype=torch.float64)))
    rows = slice(24 * rank, 24 * rank + 24)
    shard = VocabShard(24 * rank, 23 * (1 - rank), torch.distributed.group.WORLD)
    alone = joint_run(hidden, padded[rows], targets, upstream, shard)
    torch.testing.assert_close(alone[0], values, **EXACT)
    assert torch.equal(alone[1], top)
    for gradient, reference in zip(alone[2], grads, strict=True):
        expected = torch.zeros_like(reference) if rank else reference
        torch.testing.assert_close(gradient, expected, **EXACT)
    expected = torch.zeros_like(weight_grad) if rank else weight_grad
    torch.testing.assert_close(alone[3], expected, **EXACT)
    torch.distributed.destroy_process_group()


def test_two_tensor_parallel_ranks_equal_one(tmp_path):
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path / "store"),), nprocs=2)
