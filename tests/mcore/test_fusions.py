"""Fused kernels: which are taken where, what reaches Megatron, and the same numbers without."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.moe import moe_utils
from torch import nn

from megatron_occ.config import load_config
from megatron_occ.mcore import capabilities, compiling, fusions
from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.mcore.provider import wrap_data_parallel
from megatron_occ.rl.batch import head_targets
from tests.mcore.conftest import (
    VOCABULARY,
    assert_same_up_to_rounding,
    build_model,
    positions,
    random_ids,
    small_config,
)

MOE = ["model.moe.num_experts=8"]
MLA = ["model.mla.enabled=true", "model.num_query_groups=null"]
DENSE_GPU = {fusions.SWIGLU, fusions.ROTARY, fusions.WEIGHT_GRADIENTS}
EXPERTS = {fusions.PERMUTATION, fusions.ROUTER}
MEGATRON = {
    fusions.SWIGLU: "bias_activation_fusion",
    fusions.ROTARY: "apply_rope_fusion",
    fusions.PERMUTATION: "moe_permute_fusion",
    fusions.ROUTER: "moe_router_fusion",
}


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, TransformerEngine and a compiler, as far as these functions ask."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (capabilities, fusions):
        monkeypatch.setattr(
            module, "find_spec", lambda name: name != "fused_weight_gradient_mlp_cuda"
        )
    monkeypatch.setattr(fusions, "compiles", lambda: True)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object(), raising=False)
    for name in ("fused_permute_with_probs", "fused_topk_with_score_function"):
        monkeypatch.setattr(moe_utils, name, object(), raising=False)
    return monkeypatch


def used(*given: str) -> set[str]:
    return {name for name, on in fusions.fusions(load_config([], list(given))).items() if on}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], DENSE_GPU),
        (MOE, DENSE_GPU | EXPERTS),
        (MLA, DENSE_GPU - {fusions.ROTARY}),
        (["fusions=off", *MOE], set()),
    ],
)
def test_a_gpu_takes_all_that_its_model_has_and_hands_them_to_megatron(gpu, given, expected):
    assert used(*given) == expected
    settings = fusions.megatron_fusions(load_config([], given))
    on = {name for name, value in settings.items() if value}
    assert on == {MEGATRON[name] for name in expected - {fusions.WEIGHT_GRADIENTS}}


@pytest.mark.parametrize(
    ("module", "name", "lost"),
    [
        (fusions, "compiles", fusions.SWIGLU),
        (rope_utils, "fused_apply_rotary_pos_emb", fusions.ROTARY),
        (moe_utils, "fused_permute_with_probs", fusions.PERMUTATION),
        (moe_utils, "fused_topk_with_score_function", fusions.ROUTER),
    ],
)
def test_a_kernel_that_is_not_there_is_not_taken(gpu, module, name, lost):
    gpu.setattr(module, name, (lambda: False) if name == "compiles" else None)
    assert used(*MOE) == (DENSE_GPU | EXPERTS) - {lost}


def test_without_transformer_engine_swiglu_is_left_and_with_apex_weight_gradients(gpu):
    for module in (capabilities, fusions):
        gpu.setattr(module, "find_spec", lambda name: None)
    assert used() == {fusions.SWIGLU}
    gpu.setattr(fusions, "find_spec", lambda name: name == "fused_weight_gradient_mlp_cuda" or None)
    assert used() == {fusions.SWIGLU, fusions.WEIGHT_GRADIENTS}


@pytest.mark.parametrize("headers", [True, False])
def test_torch_compiles_with_a_compiler_triton_and_the_headers_of_python(
    monkeypatch, tmp_path, headers
):
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(compiling, "find_spec", lambda name: name == "triton")
    monkeypatch.setattr(compiling.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    if headers:
        (tmp_path / "Python.h").touch()
    assert compiling.compiles.__wrapped__() is headers
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    assert not compiling.compiles.__wrapped__()


class _Linear(nn.Module):
    """TransformerEngine's or Megatron's, as far as the switch goes."""

    def __init__(self, switch: str) -> None:
        super().__init__()
        setattr(self, switch, False)


def test_linear_layers_add_to_the_gradient_buffers_where_that_is_on(gpu):
    layers = [_Linear("fuse_wgrad_accumulation"), _Linear("gradient_accumulation_fusion")]
    chunk = nn.Sequential(*layers, nn.Linear(2, 2))
    state = lambda: [layers[0].fuse_wgrad_accumulation, layers[1].gradient_accumulation_fusion]  # noqa: E731
    fusions.fuse_weight_gradients([chunk], load_config([], ["fusions=off"]))
    assert state() == [False, False]
    fusions.fuse_weight_gradients([chunk], load_config([], []))
    assert state() == [True, True]
    assert not hasattr(chunk[2], "fuse_wgrad_accumulation")


def test_a_model_that_is_wrapped_for_training_gets_them(layout, monkeypatch):
    config = small_config()
    model = build_model(config, VOCABULARY, layout.device)
    switch = "gradient_accumulation_fusion"
    linear = [module for module in model.modules() if hasattr(module, switch)]
    wrap_data_parallel([model], config)
    assert linear and not any(getattr(module, switch) for module in linear)
    monkeypatch.setattr(fusions, "fusions", lambda _: {fusions.WEIGHT_GRADIENTS: True})
    wrap_data_parallel([model], config)
    assert all(getattr(module, switch) for module in linear)


def test_off_gives_the_same_numbers_by_other_operations(layout):
    config = small_config()
    fused = build_model(config, VOCABULARY, layout.device)
    config.fusions = "off"
    plain = build_model(config, VOCABULARY, layout.device)
    plain.load_state_dict(fused.state_dict())
    assert [m.config.apply_rope_fusion for m in (fused, plain)] == [True, False]
    assert plain.decoder.layers[0].mlp.activation_func is nn.functional.silu
    ids = random_ids()
    request = HeadRequest(head_targets(ids, 2))
    found = [m(ids, positions(ids), None, request=request).logprobs for m in (fused, plain)]
    assert_same_up_to_rounding(found[1], found[0], units=64)
