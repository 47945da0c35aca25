"""Recompute of modules and of the first layers: the same gradients, and it does happen."""

from __future__ import annotations

import re

import pytest
import torch

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


def model_config(kind: str):
    config = small_config()
    moe, mla = config.model.moe, config.model.mla
    if "moe" in kind:
        moe.num_experts, moe.ffn_hidden_size, moe.first_dense_layers = 4, 16, 1
        moe.shared_ffn_hidden_size = 24
    if "mla" in kind:
        config.model.num_query_groups, config.model.qk_layernorm = None, True
        mla.enabled, mla.kv_lora_rank, mla.qk_head_dim = True, 12, 8
        mla.qk_rope_head_dim, mla.v_head_dim = 4, 6
    return config


# kind of model, setting, submodule that then runs twice, in which trunk layers, in MTP layers too
CASES = [
    ("dense", {"recompute_modules": ["mlp"]}, "mlp", [1, 2], True),
    ("dense", {"recompute_modules": ["core_attn"]}, "self_attention.core_attention", [1, 2], True),
    ("moe", {"recompute_modules": ["mlp"]}, "mlp", [1], False),
    ("moe", {"recompute_modules": ["moe"]}, "mlp.experts", [2], True),
    ("moe", {"recompute_modules": ["shared_experts"]}, "mlp.shared_experts", [2], True),
    (
        "mla",
        {"recompute_modules": ["mla_up_proj"]},
        "self_attention.linear_kv_up_proj",
        [1, 2],
        True,
    ),
    ("mla_moe", {"recompute_modules": ["moe", "mla_up_proj"]}, "mlp", [], False),
    ("dense", {"recompute_layers": 1}, "self_attention", [1], False),
    ("dense", {"recompute_layers": None}, "self_attention", [1, 2], True),
]


@pytest.mark.parametrize(("kind", "setting", "part", "trunk", "head"), CASES)
def test_gradients_are_those_without_recompute(layout, kind, setting, part, trunk, head):
    config = model_config(kind)
    reference = build_model(config, VOCABULARY, layout.device)
    config.recompute = "full" if "recompute_layers" in setting else "selective"
    for name, value in setting.items():
        setattr(config, name, value)
    model = build_model(config, VOCABULARY, layout.device)
    model.load_state_dict(reference.state_dict())
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1})
        )
    found, logprobs = passes(model)
    expected, wanted = passes(reference)
    torch.testing.assert_close(logprobs, wanted, atol=0, rtol=0)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, atol=2e-6 * largest, rtol=0, msg=name)
    # both layers of the trunk run once, and again where they are computed again
    times = {
        int(match[1]) + 1: count
        for name, count in calls.items()
        if (match := re.fullmatch(rf"decoder\.layers\.(\d+)\.{re.escape(part)}", name))
    }
    assert [number for number, count in times.items() if count == 2] == trunk
    mtp = [count for name, count in calls.items() if re.fullmatch(rf"mtp\..*layer\.{part}", name)]
    # a pass for the head runs the trainable layer once
    assert mtp == [1 + head, 1 + head]


def passes(model):
    """Gradients of the main head and of two passes, one for the trunk and one for the head."""
    ids = random_ids()
    request = HeadRequest(head_targets(ids, 2), passes=((True, False), (False, True)))
    outputs = model(ids, positions(ids), None, request=request)
    values = torch.cat([outputs.logprobs[None], *outputs.passes])
    (values * torch.linspace(0.5, 2, values.size(0)).view(-1, 1, 1)).sum().backward()
    return gradients(model), values.detach()
