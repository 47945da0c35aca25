"""What the machine or the layout can't do is refused with the key and the remedy."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_occ.mcore import capabilities, provider
from megatron_occ.mcore.capabilities import check_machine
from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.mcore.transformer_config import transformer_config
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


ENGINE = [
    ({"attention_backend": "flash"}, r"attention_backend=flash.*use attention_backend=auto or"),
    ({"attention_backend": "unfused"}, r"attention_backend=unfused.*no CUDA device"),
    (
        {"recompute": "selective", "recompute_modules": ["moe_act"]},
        r"moe_act again by TransformerEngine.*leave moe_act out",
    ),
    (
        {"recompute": "selective", "recompute_modules": ["moe", "layernorm"]},
        r"layernorm again by TransformerEngine.*leave layernorm out",
    ),
    ({"moments_dtype": "bf16"}, r"moments_dtype=bf16: .*no CUDA device.*moments_dtype=fp32"),
    ({"optimizer_offload": 0.5}, r"optimizer_offload=0\.5: .*no CUDA device.*_offload=0"),
    ({"token_dispatcher": "alltoall"}, r"token_dispatcher=alltoall.*no CUDA.*=auto or allgather"),
]


@pytest.mark.parametrize(("setting", "message"), ENGINE)
def test_what_needs_a_gpu_is_refused_but_in_a_dry_run(layout, setting, message):
    config = small_config()
    config.model.moe.num_experts = 4
    for name, value in setting.items():
        setattr(config.parallel if hasattr(config.parallel, name) else config, name, value)
    with pytest.raises(ValueError, match=message):
        check_machine(config, torch.device("cpu"))
    build_model(config, VOCABULARY, torch.device("meta"))


def test_moments_in_bf16_need_transformer_engine_on_a_gpu_and_those_on_the_host_do_not():
    config = small_config()
    config.parallel.optimizer_offload = 0.5
    check_machine(config, torch.device("cuda"))
    config.parallel.moments_dtype = "bf16"
    with pytest.raises(ValueError, match=r"moments_dtype=bf16: .*it is not installed here"):
        check_machine(config, torch.device("cuda"))


def test_the_flexible_dispatcher_needs_its_library(monkeypatch):
    config = small_config()
    config.parallel.token_dispatcher = "flex"
    with pytest.raises(ValueError, match=r"token_dispatcher=flex: needs DeepEP.*=alltoall"):
        check_machine(config, torch.device("cuda"))
    monkeypatch.setattr(capabilities, "find_spec", lambda name: name)
    check_machine(config, torch.device("cuda"))


@pytest.mark.parametrize(
    ("scaling", "name", "remedy"),
    [
        ("block", "Float8BlockScaling", "unset NVTE_FP8_BLOCK_SCALING_FP32_SCALES"),
        ("current", "Float8CurrentScaling", "export NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES=1"),
    ],
)
def test_rollouts_in_fp8_want_scales_that_are_powers_of_two(monkeypatch, scaling, name, remedy):
    def recipes(of_inputs, of_weights):
        quantized = [SimpleNamespace(power_2_scale=each) for each in (of_inputs, of_weights)]
        recipe = SimpleNamespace(fp8_quant_fwd_inp=quantized[0], fp8_quant_fwd_weight=quantized[1])
        module = SimpleNamespace(**{name: recipe})
        monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", module)

    monkeypatch.setattr(capabilities, "uses_transformer_engine", lambda: True)
    config = small_config()
    config.precision, config.fp8.format, config.fp8.scaling = "bf16", "e4m3", scaling
    device = torch.device("cuda")
    recipes(False, False)
    check_machine(config, device)
    config.rl.rollout.fp8 = True
    for given in ((False, True), (True, False)):
        recipes(*given)
        with pytest.raises(ValueError, match=rf"rl\.rollout\.fp8=true.*={scaling} .*{remedy}"):
            check_machine(config, device)
    recipes(True, True)
    check_machine(config, device)


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


def test_experts_of_other_ranks_and_their_parts_are_drawn_apart(layout, monkeypatch):
    config = small_config()
    config.model.moe.num_experts = 4

    def drawn(rank, part):
        torch.manual_seed(0)
        model = build_model(config, VOCABULARY, torch.device("cpu"))
        state = provider.parallel_state
        monkeypatch.setattr(state, "get_expert_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(state, "get_expert_tensor_parallel_rank", lambda: part)
        torch.manual_seed(1)
        provider._draw_experts_apart([model], config)
        monkeypatch.undo()
        named = model.named_parameters()
        return torch.cat([p.detach().flatten() for name, p in named if ".experts." in name])

    places = [(0, 0), (1, 0), (1, 1), (2, 0)]
    found = [drawn(*place) for place in places]
    assert torch.equal(drawn(1, 1), found[2])
    for i, one in enumerate(found):
        for other in found[:i]:
            assert (one != other).float().mean() > 0.99


def test_a_second_module_on_the_weights_casts_them_to_fp8_at_every_pass():
    quiet = provider._quiet(transformer_config(small_config()))
    assert quiet.disable_parameter_transpose_cache
