"""Layers of the CPU back end: every kind trains, and gives what a naive computation gives."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch.nn import functional

from megatron_occ.mcore.cpu.backend import apply_cpu_backend
from megatron_occ.mcore.cpu.modules import LatentSelfAttention, NormColumnParallelLinear
from tests.mcore.cpu_models import (
    HEADS,
    HIDDEN,
    KINDS,
    LENGTH,
    backward,
    build,
    gradients,
    inner_layer,
    token_ids,
)

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture
def megatron():
    apply_cpu_backend()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    MTPLossLoggingHelper.tracker = {}  # a class global, of the size of the first model's depths
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("depths", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_every_kind_trains(megatron, kind, depths):
    model = build(kind, depths)
    backward(model)
    grads = gradients(model)
    assert grads.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in grads.items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 1e-5, name
    # the first layer is dense, MTP layers are of the last one's kind
    moe = "num_moe_experts" in KINDS[kind]
    layers = [*model.decoder.layers, *(inner_layer(layer) for layer in model.mtp.layers)]
    found = [hasattr(layer.mlp, "experts") for layer in layers]
    assert found == [False, *[moe] * (1 + depths)]


@pytest.mark.parametrize("kind", ["qk_norm", "mla_moe"])
def test_packed_sequences_equal_padded_ones(megatron, kind):
    bounds = torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32)
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=LENGTH, max_seqlen_kv=LENGTH)
    model = build(kind)
    losses, grads = [], []
    ids, places = token_ids(), torch.arange(LENGTH).expand(2, -1)
    losses.append(backward(model, ids))
    grads.append(gradients(model))
    model.zero_grad()
    losses.append(backward(model, ids.reshape(1, -1), packed, places.reshape(1, -1)))
    grads.append(gradients(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in grads[0].items():
        scale = gradient.abs().max()
        torch.testing.assert_close(grads[1][name] / scale, gradient / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("depths", [None, 2])
@pytest.mark.parametrize("kind", ["qk_norm", "mla_moe"])
def test_recomputed_activations_give_the_same_gradients(megatron, kind, depths):
    """To the last digit without MTP; with it, states that several heads use get theirs in turn."""
    recompute = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    found = []
    for options in ({}, recompute):
        model = build(kind, depths, **options)
        layers = [model.decoder.layers[1]]
        layers += [inner_layer(layer) for layer in model.mtp.layers] if depths else []
        calls = []
        for layer in layers:
            layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        backward(model)
        found.append((gradients(model), len(calls) / len(layers)))
    assert (found[0][1], found[1][1]) == (1, 2)
    for name, gradient in found[0][0].items():
        difference = (found[1][0][name] - gradient).abs().max() / gradient.abs().max()
        assert difference < 1e-6 if depths else difference == 0, name


# a naive mixture of experts and a naive latent attention


def feed_forward(module, x):
    gate, up = (x @ module.linear_fc1.weight.t()).chunk(2, dim=-1)
    return (functional.silu(gate) * up) @ module.linear_fc2.weight.t()


def naive_moe(layer, x, sigmoid):
    """Token by token, expert by expert."""
    logits = x @ layer.router.weight.t()
    output = torch.zeros_like(x) if layer.shared_experts is None else None
    output = feed_forward(layer.shared_experts, x) if output is None else output
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:2])):
        s, b = index.tolist()
        if sigmoid:
            scores = logits[s, b].sigmoid()
            chosen = (scores + layer.router.expert_bias).topk(2).indices
            weights = 1.5 * scores[chosen] / scores[chosen].sum()
        else:
            chosen = logits[s, b].topk(2).indices
            weights = logits[s, b][chosen].softmax(-1)
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            module = layer.experts.local_experts[expert]
            output[s, b] = output[s, b] + weight * feed_forward(module, x[s, b])
    return output


def compare(module, ours, naive, x):
    """Outputs, and the gradients of every parameter and of the input."""
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    found = []
    for function in (ours, naive):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        output = function(leaf)
        (output * upstream).sum().backward()
        found.append((output.detach(), leaf.grad, gradients(module)))
    torch.testing.assert_close(found[0][0], found[1][0], **CLOSE)
    assert found[0][2].keys() == found[1][2].keys()
    pairs = [(found[0][1], found[1][1])]
    pairs += [(found[0][2][name], gradient) for name, gradient in found[1][2].items()]
    for gradient, reference in pairs:
        scale = reference.abs().max()
        assert scale > 0
        torch.testing.assert_close(gradient / scale, reference / scale, atol=1e-5, rtol=0)


def hidden_states():
    return torch.randn(LENGTH, 2, HIDDEN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["moe", "sigmoid", "shared_expert", "mla_moe"])
def test_experts_equal_a_naive_loop(megatron, kind):
    layer = build(kind).decoder.layers[1].mlp
    sigmoid = layer.config.moe_router_enable_expert_bias
    if sigmoid:
        layer.router.expert_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1]))
    x = hidden_states()
    chosen = (x @ layer.router.weight.t()).topk(2).indices
    assert len(chosen.unique()) == 4
    compare(layer, lambda h: layer(h)[0], lambda h: naive_moe(layer, h, sigmoid), x)


def rotate(x):
    """Pairs of neighbours turn by position * 10000 ** (-2i / d). [s, b, n, d]"""
    frequency = 10000.0 ** (-torch.arange(0, x.size(-1), 2) / x.size(-1))
    angles = torch.outer(torch.arange(x.size(0)), frequency)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None, None]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def normed_linear(module, x):
    if isinstance(module, NormColumnParallelLinear):
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.layer_norm_weight
    return x @ module.weight.t()


def naive_latent_attention(module, x):
    """DeepSeek-V2 (arXiv:2405.04434), equations 9 to 19 and 37 to 47."""
    if module.config.q_lora_rank is None:
        query = x @ module.linear_q_proj.weight.t()
    else:
        compressed = x @ module.linear_q_down_proj.weight.t()
        query = normed_linear(module.linear_q_up_proj, compressed)
    query, query_turned = query.unflatten(-1, (HEADS, 12)).split([8, 4], dim=-1)
    compressed, key_turned = (x @ module.linear_kv_down_proj.weight.t()).split([12, 4], dim=-1)
    up = normed_linear(module.linear_kv_up_proj, compressed).unflatten(-1, (HEADS, 14))
    key, value = up.split([8, 6], dim=-1)
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key)
    scores = scores + torch.einsum(
        "qbnd,kbd->bnqk", rotate(query_turned), rotate(key_turned.unsqueeze(2)).squeeze(2)
    )
    future = torch.ones(x.size(0), x.size(0), dtype=torch.bool).triu(1)
    weights = (scores / math.sqrt(12)).masked_fill(future, -math.inf).softmax(-1)
    context = torch.einsum("bnqk,kbnd->qbnd", weights, value).flatten(2)
    return context @ module.linear_proj.weight.t()


@pytest.mark.parametrize("kind", ["mla", "mla_q_lora"])
def test_latent_attention_equals_a_naive_one(megatron, kind):
    module = build(kind).decoder.layers[0].self_attention
    assert isinstance(module, LatentSelfAttention)
    compare(
        module,
        lambda h: module(h, attention_mask=None)[0],
        lambda h: naive_latent_attention(module, h),
        hidden_states(),
    )
