"""What the machine or the layout can't do is refused with the key and the remedy."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.mcore.provider import build_model
from tests.mcore.conftest import VOCABULARY, positions, random_ids, small_config


def test_bf16_without_a_cuda_device_is_refused(layout):
    config = small_config()
    config.precision = "bf16"
    with pytest.raises(ValueError, match=r"precision=bf16.*use precision=fp32"):
        build_model(config, VOCABULARY, torch.device("cpu"))


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
