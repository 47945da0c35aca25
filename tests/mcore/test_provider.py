"""What the machine or the layout can't do is refused with the key and the remedy."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.mcore.capabilities import check_machine
from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.rl.batch import head_targets
from tests.mcore.conftest import VOCABULARY, build_model, positions, random_ids, small_config


def test_bf16_on_the_cpu_has_bf16_weights_and_nearly_the_logprobs_of_fp32(layout):
    config = small_config()
    reference = build_model(config, VOCABULARY, layout.device)
    config.precision = "bf16"
    model = build_model(config, VOCABULARY, layout.device)
    model.load_state_dict(reference.state_dict())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    ids = random_ids()
    request = HeadRequest(head_targets(ids, 2))
    with torch.no_grad():
        sides = [m(ids, positions(ids), None, request=request) for m in (model, reference)]
    pairs = zip(*((side.logprobs, side.passes[0]) for side in sides), strict=True)
    for values, wanted in pairs:
        assert values.dtype == torch.float32
        assert 1e-4 < (values - wanted).abs().mean() < 0.1


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_fp8_without_transformer_engine_is_refused(layout, precision):
    config = small_config()
    config.precision, config.fp8.format = precision, "hybrid"
    with pytest.raises(ValueError, match=r"fp8\.format=hybrid.*no CUDA device.*fp8\.format=none"):
        build_model(config, VOCABULARY, torch.device("cpu"))


def test_experts_on_a_gpu_without_transformer_engine_are_refused():
    config = small_config()
    check_machine(config, torch.device("cuda"))
    config.model.moe.num_experts = 4
    check_machine(config, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"num_experts=4.*not installed: pip install"):
        check_machine(config, torch.device("cuda"))


@pytest.mark.parametrize(
    ("device", "keys"),
    [
        ("cpu", {}),
        ("cuda", {"parallel.tensor": 2}),
        ("cuda", {"parallel.pipeline": 2}),
    ],
)
def test_leaving_out_graphs_that_could_not_be_is_refused(device, keys):
    config = small_config()
    for key, value in keys.items():
        setattr(config.parallel, key.rpartition(".")[2], value)
    check_machine(config, torch.device(device))
    config.rl.rollout.cuda_graphs = False
    with pytest.raises(ValueError, match=r"rl\.rollout\.cuda_graphs=false: .*leave it out"):
        check_machine(config, torch.device(device))


def test_graphs_are_left_out_where_they_could_be():
    config = small_config()
    config.rl.rollout.cuda_graphs = False
    check_machine(config, torch.device("cuda"))


def test_nothing_is_refused_where_nothing_is_computed():
    config = small_config()
    config.precision, config.fp8.format = "bf16", "hybrid"
    config.model.moe.num_experts = 4
    check_machine(config, torch.device("meta"))


def test_a_tensor_parallel_rank_without_token_ids_is_refused(layout):
    config = small_config()
    config.parallel.tensor = 4
    with pytest.raises(ValueError, match=r"parallel\.tensor=4 leaves a rank without any of the 5"):
        build_model(config, 5, layout.device)


def test_a_model_without_mtp_layers_works_and_has_no_head_parameters(layout):
    model = build_model(small_config(depths=0), VOCABULARY, layout.device)
    ids = random_ids()
    assert not any(name.startswith("mtp") for name, _ in model.named_parameters())
    logits = model(ids, positions(ids), None)
    assert logits.shape == (*ids.shape, VOCABULARY)


def test_qk_norm_bias_and_untied_output_change_the_parameters(layout):
    config = small_config()
    config.model.qk_layernorm = config.model.qkv_bias = True
    config.model.tie_embeddings = False
    names = {name for name, _ in build_model(config, VOCABULARY, layout.device).named_parameters()}
    layer = "decoder.layers.0.self_attention"
    assert {
        f"{layer}.q_layernorm.weight",
        f"{layer}.linear_qkv.bias",
        "output_layer.weight",
    } <= names
