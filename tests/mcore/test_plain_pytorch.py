"""The model against an independent one in plain PyTorch: log-probs of all heads and gradients."""

from __future__ import annotations

import torch

from benchmarks.plain_model import PlainGPT, from_megatron
from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.rl.batch import head_targets
from tests.mcore.conftest import (
    VOCABULARY,
    build_model,
    gradients,
    positions,
    random_ids,
    small_config,
)

DEPTHS = 2


def test_logprobs_and_gradients_equal_those_of_the_plain_model(layout):
    config = small_config(DEPTHS)
    assert config.model.num_query_groups < config.model.num_attention_heads
    model = build_model(config, VOCABULARY, layout.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones at first, which one norm in place of another would not change
                parameter.uniform_(0.5, 1.5)
    plain = PlainGPT(config.model, VOCABULARY, DEPTHS)
    plain.load_state_dict(from_megatron(dict(model.named_parameters()), config.model))

    ids = random_ids()
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(1 + DEPTHS, *ids.shape, generator=generator)
    outputs = model(ids, positions(ids), None, request=HeadRequest(head_targets(ids, DEPTHS)))
    got, expected = (outputs.logprobs, *outputs.passes[0]), plain(ids)
    losses = [0.0, 0.0]
    for depth in range(1 + DEPTHS):
        # the last positions have no target at this depth
        length = ids.size(1) - 1 - depth
        torch.testing.assert_close(got[depth][:, :length], expected[depth], atol=1e-5, rtol=1e-5)
        for side, values in enumerate((got, expected)):
            losses[side] += (values[depth][:, :length] * upstream[depth, :, :length]).sum()
    for loss in losses:
        loss.backward()

    found, reference = from_megatron(gradients(model), config.model), gradients(plain)
    assert found.keys() == reference.keys() == dict(plain.named_parameters()).keys()
    for name, gradient in reference.items():
        largest = gradient.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(found[name], gradient, atol=1e-4 * largest, rtol=0, msg=name)
