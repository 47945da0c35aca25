"""Exported folders, read by transformers and by MiMo's own formula, give our log-probs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_occ.config.schema_model import MLAConfig, MoEConfig
from megatron_occ.data.tokenizers import HFTokenizer, build_tokenizer
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.export import HuggingFaceExport
from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.mcore.main_rank import MainRank
from megatron_occ.mcore.startup import initialize
from megatron_occ.rl.batch import head_targets
from tests.mcore.conftest import VOCABULARY, positions, random_ids, small_config
from tests.mcore.convert_folders import chosen, mimo_heads
from tests.mcore.distributed import run_ranks

TOKENIZER = build_tokenizer("char", alphabet="abcdefghijklmnopqrstu")
EXPERTS = {"num_experts": 4, "ffn_hidden_size": 16}
SIGMOID = EXPERTS | {
    "score_function": "sigmoid",
    "expert_bias": True,
    "shared_ffn_hidden_size": 32,
    "first_dense_layers": 1,
    "scaling_factor": 1.5,
}
SIZES = {"kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_head_dim": 8}
LATENT = {
    "mla": MLAConfig(True, v_head_dim=6, norm_epsilon=1e-6, **SIZES),
    "qk_layernorm": True,
    "num_query_groups": None,
}
# in the folder: tensors of MTP layers, and of an output layer that repeats the embedding
HEADS = {
    "mimo_two_depths": "model.mtp_layers.0.",
    "qwen3_and_a_head": None,
    "qwen3_moe_and_a_head": None,
    "glm": "model.layers.{n}.",
    "deepseek": "model.layers.{n}.",
    "deepseek_untied": "model.layers.{n}.",
}
MODELS = {
    "mimo": (1, {}),
    "mimo_untied_biased": (1, {"tie_embeddings": False, "qkv_bias": True}),
    "mimo_before": (1, {"mtp_reads": "before"}),
    "qwen2": (0, {"qkv_bias": True, "num_query_groups": None}),
    "llama_wide_heads": (0, {"tie_embeddings": False, "kv_channels": 16}),
    "mimo_two_depths": (2, {}),
    "qwen3_and_a_head": (1, {"qk_layernorm": True}),
    "qwen3_moe_and_a_head": (1, {"qk_layernorm": True, "moe": MoEConfig(**EXPERTS)}),
    "glm": (2, {"moe": MoEConfig(**SIGMOID), "rotary_percent": 0.5, "qkv_bias": True}),
    "deepseek": (1, {"moe": MoEConfig(**SIGMOID), **LATENT}),
    "deepseek_untied": (1, {"moe": MoEConfig(**SIGMOID), **LATENT, "tie_embeddings": False}),
}


def configure(name, *, split=1):
    depths, settings = MODELS[name]
    config = small_config(depths)
    for key, value in settings.items():
        setattr(config.model, key, value)
    # other than both sides' defaults
    config.model.rotary_base, config.model.norm_epsilon = 500, 1e-3
    config.parallel.tensor = config.parallel.pipeline = split
    return config


def build(config, layout):
    """Actor whose norms and biases are not those of the start, the same on any layout."""
    with torch.enable_grad():
        actor = MegatronGPTActor(
            config, VOCABULARY, layout, optimizer=config.rl.optimizer, total_updates=1
        )
    with torch.no_grad():
        for chunk in actor.chunks:
            for name, parameter in chunk.named_parameters():
                if "norm" in name:
                    steps = torch.arange(parameter.numel()).remainder(7) / 7
                    parameter.copy_(0.5 + steps)
                if "bias" in name:
                    parameter.normal_()
    return actor


def export(actor, folder, *, reader="sglang"):
    actor.config.rl.rollout.engine = reader
    writer = HuggingFaceExport(actor, MainRank(), folder / "staged", TOKENIZER)
    writer.stage()
    if actor.layout.is_main:
        writer.write(folder)
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def mimo_logprobs(folder, model, hidden, ids, *, swapped=False):
    """[b, s - 2] of MiMo's MTP layer as servers compute it, on the weights of a folder.

    Args:
        swapped: its input projection reads [embedding; hidden].
    """
    head, places = mimo_heads(folder, model, swapped), positions(ids)
    state = head(0, hidden[:, :-1], ids[:, 1:], places[:, :-1])
    output = load_file(folder / "model.safetensors")["lm_head.weight"]
    return chosen(state @ output.t(), ids, 2)


@torch.no_grad()
def ours(actor, ids):
    """[1 + K] log-probs, [b, s] each in the source frame."""
    (model,) = actor.chunks
    targets = head_targets(ids, actor.num_depths)
    outputs = model.eval()(ids, positions(ids), None, request=HeadRequest(targets))
    return [outputs.logprobs, *outputs.passes[0]] if actor.num_depths else [outputs.logprobs]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_trunk_gives_our_logprobs(layout, tmp_path, name):
    config, ids = configure(name), random_ids()
    actor = build(config, layout)
    model = load(export(actor, tmp_path))
    expected = ours(actor, ids)[0][:, :-1]
    torch.testing.assert_close(chosen(model(ids).logits, ids), expected, atol=1e-5, rtol=1e-5)
    text = "cabbage"
    assert HFTokenizer(tmp_path).encode(text) == TOKENIZER.encode(text)
    assert HFTokenizer(tmp_path).decode([*TOKENIZER.encode(text), TOKENIZER.eos_id]) == text
    assert HFTokenizer(tmp_path).eos_id == TOKENIZER.eos_id
    assert not (tmp_path / "staged").exists()


@pytest.mark.parametrize("name", HEADS)
def test_servers_get_the_first_depth_and_an_output_layer_that_they_find(layout, tmp_path, name):
    config = configure(name)
    tensors = load_file(export(build(config, layout), tmp_path) / "model.safetensors")
    layers = config.model.num_layers
    stated = json.loads((tmp_path / "config.json").read_text()).get("num_nextn_predict_layers", 0)
    projections = [key for key in tensors if key.endswith(("eh_proj.weight", "input_proj.weight"))]
    expected = HEADS[name] and HEADS[name].format(n=layers)
    assert len(projections) == stated == (expected is not None)
    assert all(key.startswith(expected) for key in projections)
    # a folder of servers has no file beside, which is for this project alone
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"model.safetensors"}
    tied = config.model.tie_embeddings
    if expected is not None and tied:
        assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert ("lm_head.weight" in tensors) == (expected is not None)


@pytest.mark.parametrize("name", ["mimo", "mimo_untied_biased"])
@torch.no_grad()
def test_the_head_gives_our_logprobs_by_the_formula_of_mimo(layout, tmp_path, name):
    actor, ids = build(configure(name), layout), random_ids()
    folder = export(actor, tmp_path)
    model, expected = load(folder), ours(actor, ids)[1][:, :-2]
    hidden = model.model(ids).last_hidden_state
    found = mimo_logprobs(folder, model, hidden, ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    swapped = mimo_logprobs(folder, model, hidden, ids, swapped=True)
    assert (swapped - expected).abs().mean() > 0.1


def states_before_the_norm(model, ids):
    kept = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    model(ids)
    hook.remove()
    return kept[0]


@torch.no_grad()
def test_a_reader_that_leaves_out_the_final_norm_gets_it_in_the_heads_norm(layout, tmp_path):
    config, ids = configure("mimo"), random_ids()
    config.model.norm_epsilon = 1e-6
    actor = build(config, layout)
    expected = ours(actor, ids)[1][:, :-2]

    def gap(reader, name):
        (tmp_path / name).mkdir()
        folder = export(actor, tmp_path / name, reader=reader)
        model = load(folder)
        hidden = states_before_the_norm(model, ids)
        found = mimo_logprobs(folder, model, hidden, ids)
        return (found - expected).abs().mean().item()

    assert gap("vllm", "nearly") < 0.2 * gap("sglang", "without")
    for name, parameter in actor.chunks[0].named_parameters():
        if name == "decoder.final_layernorm.weight":
            parameter.fill_(1.3)
    expected = ours(actor, ids)[1][:, :-2]
    assert gap("vllm", "exact") < 1e-5


@pytest.mark.parametrize("reader", ["vllm", "sglang"])
@torch.no_grad()
def test_a_head_that_reads_before_the_final_norm_is_written_as_it_is(layout, tmp_path, reader):
    actor, ids = build(configure("mimo_before"), layout), random_ids()
    folder = export(actor, tmp_path, reader=reader)
    model, expected = load(folder), ours(actor, ids)[1][:, :-2]
    found = mimo_logprobs(folder, model, states_before_the_norm(model, ids), ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    after = mimo_logprobs(folder, model, model.model(ids).last_hidden_state, ids)
    assert (after - expected).abs().mean() > 0.01


def export_of_ranks(name, folder):
    config = configure(name, split=2)
    actor = build(config, initialize(config))
    export(actor, Path(folder))
    ids = random_ids()
    rows = [[0, 1], [2, 3]]
    return actor.get_inference_log_probs(ids, parts=rows, lengths=None, temperature=1.0)


@pytest.mark.parametrize("name", ["mimo", "qwen2"])
@torch.no_grad()
def test_a_split_model_is_put_together(tmp_path, name):
    expected = run_ranks(export_of_ranks, 4, name, str(tmp_path))[0][:, :-1]
    ids = random_ids()
    found = chosen(load(tmp_path)(ids).logits, ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
