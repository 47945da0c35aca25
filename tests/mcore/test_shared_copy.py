"""A second module on the same weights: same numbers, no gradient, no memory of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.mcore.provider import build_inference_chunk
from megatron_occ.mcore.shared_copy import SharedCopy
from megatron_occ.rl.batch import head_targets
from tests.mcore.conftest import (
    VOCABULARY,
    assert_same_up_to_rounding,
    build_model,
    gradients,
    positions,
    random_ids,
    small_config,
)


class Net(nn.Module):
    """Two layers, a buffer, and recompute of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)
        self.register_buffer("shift", torch.tensor([0.5, -1.0]))
        self.register_buffer("nothing", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = checkpoint(lambda x: self.first(x).tanh(), x, use_reentrant=True)
        return self.second(hidden) + self.shift


@pytest.fixture
def pair():
    torch.manual_seed(0)
    source = Net()
    return source, SharedCopy(source, Net)


def inputs():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def test_outputs_are_those_of_the_source(pair):
    source, shared = pair
    assert torch.equal(shared.refresh()(inputs()), source(inputs()))


def test_it_has_the_sources_memory_and_no_trainable_parameter(pair):
    source, shared = pair
    module = shared.refresh()
    assert module is not source
    own = dict(source.named_parameters())
    for name, parameter in module.named_parameters():
        assert parameter.data_ptr() == own.pop(name).data_ptr()
        assert not parameter.requires_grad
    assert not own
    assert module.shift is source.shift
    assert module.nothing is None


def test_it_follows_updates_replaced_data_and_replaced_buffers(pair):
    source, shared = pair
    module = shared.refresh()
    optimizer = torch.optim.SGD(source.parameters(), lr=0.5)
    source(inputs()).square().sum().backward()
    before = source(inputs())
    optimizer.step()
    assert not torch.allclose(source(inputs()), before)
    # updates in place are seen at once
    assert torch.equal(module(inputs()), source(inputs()))
    # what puts other tensors in place is seen after refresh
    kept = {name: parameter.data for name, parameter in source.named_parameters()}
    for parameter in source.parameters():
        parameter.data = torch.ones_like(parameter)
    source.shift = torch.tensor([3.0, 4.0])
    assert torch.equal(shared.refresh()(inputs()), source(inputs()))
    for name, parameter in source.named_parameters():
        parameter.data = kept[name]
    assert torch.equal(shared.refresh()(inputs()), source(inputs()))


def test_no_gradient_reaches_the_source_where_layers_are_computed_again(pair):
    source, shared = pair
    x = inputs().requires_grad_()
    source(x).sum().backward()
    expected, x.grad = x.grad, None
    assert all(parameter.grad is not None for parameter in source.parameters())
    source.zero_grad()
    shared.refresh()(x).sum().backward()
    assert torch.equal(x.grad, expected)
    assert not gradients(source)


def test_swapped_parameters_would_leak_where_layers_are_computed_again(pair):
    """Why there is a copy: recompute runs when the swapped parameters are gone."""
    source, _ = pair
    detached = {name: parameter.detach() for name, parameter in source.named_parameters()}
    functional_call(source, detached, (inputs().requires_grad_(),)).sum().backward()
    assert set(gradients(source)) == {"first.weight", "first.bias"}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_pass_for_the_trunk_alone_leaves_every_head_parameter_without_gradient(
    layout, recompute, kind
):
    config = model_config(kind)
    reference = build_model(config, VOCABULARY, layout.device)
    config.recompute = recompute
    model = build_model(config, VOCABULARY, layout.device)
    model.load_state_dict(reference.state_dict())
    ids = random_ids()

    def trunk_gradients(model, passes):
        model.zero_grad()
        request = HeadRequest(head_targets(ids, 2), passes=passes)
        outputs = model(ids, positions(ids), None, request=request)
        outputs.passes[0].square().sum().backward()
        return gradients(model), outputs.passes[0]

    found, logprobs = trunk_gradients(model, ((True, False),))
    assert not [name for name in found if name.startswith("mtp.")]
    whole, expected = trunk_gradients(reference, ((True, True),))
    assert_same_up_to_rounding(logprobs, expected)
    trunk = {name: gradient for name, gradient in whole.items() if not name.startswith("mtp.")}
    assert found.keys() == trunk.keys()
    for name, gradient in trunk.items():
        largest = float(gradient.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(found[name], gradient, atol=1e-6 * largest, rtol=0, msg=name)


def test_the_frozen_head_follows_updates_and_is_no_part_of_the_model(layout):
    model = build_model(small_config(), VOCABULARY, layout.device)
    names = set(model.state_dict())
    ids = random_ids()

    def both():
        with torch.no_grad():
            request = HeadRequest(head_targets(ids, 2), passes=((True, False), (False, True)))
            return model(ids, positions(ids), None, request=request).passes

    frozen, own = both()
    assert_same_up_to_rounding(frozen, own)
    with torch.no_grad():
        for parameter in model.mtp.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    moved_frozen, moved = both()
    assert_same_up_to_rounding(moved_frozen, moved)
    assert (moved - own).abs().max() > 0.01
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_model_for_generation_has_no_memory_of_its_own(layout, kind):
    config = model_config(kind)
    model = build_model(config, VOCABULARY, layout.device)
    chunk = build_inference_chunk(model, config).refresh()
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shared = {**dict(chunk.named_parameters()), **dict(chunk.named_buffers())}
    assert [name for name in shared if name.startswith("mtp.")]
    assert set(own) == set(shared)
    for name, tensor in shared.items():
        assert tensor.data_ptr() == own[name].data_ptr(), name
        assert not tensor.requires_grad
    biases = [name for name in shared if name.endswith("router.expert_bias")]
    assert bool(biases) == (kind == "moe")
    assert all(shared[name] is own[name] for name in biases)


def model_config(kind):
    config = small_config()
    if kind == "moe":
        moe = config.model.moe
        moe.num_experts, moe.top_k, moe.ffn_hidden_size = 4, 2, 24
        moe.score_function, moe.expert_bias = "sigmoid", True
    return config
