"""Tiny random checkpoints of each family in its public naming, and what they compute.

Names and shapes of the trunk are those that transformers writes, where it knows the family; those
of MTP layers are written out here after the published checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_layers import MtpModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

VOCABULARY, WIDTH, LAYERS = 23, 32, 3
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-4,
    rope_theta=500.0,
    tie_word_embeddings=False,
    eos_token_id=1,
)
EPSILON = dict(rms_norm_eps=1e-6)
YARN = dict(
    type="yarn",
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=4.0,
    beta_slow=0.05,
    mscale=1.0,
    mscale_all_dim=1.0,
)
HEADS = dict(num_key_value_heads=2, head_dim=8)
EXPERTS = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    n_shared_experts=2,
    first_k_dense_replace=1,
    routed_scaling_factor=1.5,
)
LATENT = dict(q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)


def _groups():
    return EXPERTS | dict(n_group=2, topk_group=1)


CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, **HEADS),
    "llama tied": lambda: LlamaConfig(**SIZES | {"tie_word_embeddings": True}, **HEADS),
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(**SIZES, **HEADS | {"head_dim": 16}),
    "mimo": lambda: Qwen2Config(**SIZES, num_key_value_heads=2),
    "deepseek": lambda: DeepseekV3Config(**SIZES | EPSILON, **_groups(), **LATENT),
    "deepseek whole queries": lambda: DeepseekV3Config(
        **SIZES | EPSILON,
        **EXPERTS | dict(n_group=1, topk_group=1),
        **LATENT | {"q_lora_rank": None},
    ),
    "deepseek yarn": lambda: DeepseekV3Config(
        **SIZES | EPSILON | dict(rope_theta=10000.0),
        **_groups(),
        **LATENT | dict(qk_rope_head_dim=16),
        rope_scaling=YARN,
    ),
    "glm": lambda: Glm4MoeConfig(
        **SIZES, **HEADS, **EXPERTS, attention_bias=True, use_qk_norm=True
    ),
    "glm groups": lambda: Glm4MoeConfig(**SIZES, **HEADS, **_groups(), use_qk_norm=True),
    "glm air": lambda: Glm4MoeConfig(**SIZES, **HEADS, **EXPERTS, attention_bias=True),
}
FAMILIES_WITH_MTP = {"mimo": (1, 2), "deepseek": (1, 2), "glm": (1, 2), "glm air": (1,)}


def make_folder(folder: Path, name: str, depths: int = 0, *, shards: int = 1) -> Path:
    """A folder as it would be downloaded, fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if depths:
        tensors |= _mtp_tensors(name, tensors, depths)
    generator = torch.Generator().manual_seed(11)
    for key, tensor in tensors.items():
        # norms of ones and biases of zeros would hide a mistake
        scale, centre = (0.3, 1.0) if "norm" in key else (0.2, 0.0)
        if tensor.dim() == 1:
            tensors[key] = centre + scale * torch.randn(tensor.shape, generator=generator)
        elif "layernorm" not in key:
            tensors[key] = 0.15 * torch.randn(tensor.shape, generator=generator)
    _repeat(name, tensors, depths)
    content = json.loads((folder / "config.json").read_text())
    if name == "mimo":
        content["architectures"] = ["MiMoForCausalLM"]
    if name.startswith(("mimo", "deepseek", "glm")):
        content["num_nextn_predict_layers"] = depths
    (folder / "config.json").write_text(json.dumps(content))
    write_tensors(folder, tensors, shards)
    return folder


def write_tensors(folder: Path, tensors: dict, shards: int = 1) -> None:
    """Into as many shards, with an index where there is more than one."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def read_tensors(folder: Path) -> dict:
    """All tensors of a folder, by the safetensors library."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def _mtp_tensors(name: str, tensors: dict, depths: int) -> dict:
    found, last = {}, f"model.layers.{LAYERS - 1}."
    block = {k.removeprefix(last): v for k, v in tensors.items() if k.startswith(last)}
    vector, joined = torch.zeros(WIDTH), torch.zeros(WIDTH, 2 * WIDTH)
    for depth in range(depths):
        if name == "mimo":
            prefix = f"model.mtp_layers.{depth}."
            norms = ("token_layernorm", "hidden_layernorm", "final_layernorm")
            projection = "input_proj"
        else:
            prefix = f"model.layers.{LAYERS + depth}."
            norms, projection = ("enorm", "hnorm", "shared_head.norm"), "eh_proj"
        found |= {f"{prefix}{norm}.weight": vector for norm in norms}
        found |= {prefix + key: tensor for key, tensor in block.items()}
        found[f"{prefix}{projection}.weight"] = joined
    return found


def _repeat(name: str, tensors: dict, depths: int) -> None:
    """What DeepSeek-V3 and GLM-4.5 ship twice."""
    if name.startswith(("deepseek", "glm")):
        for depth in range(depths):
            prefix = f"model.layers.{LAYERS + depth}."
            tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()


@torch.no_grad()
def reference_logits(folder: Path, ids: torch.Tensor, depths: int, *, swapped=False) -> list:
    """[1 + K] logits [b, s - k, v] of trunk and depths, by transformers or by formula."""
    model = load_model(folder)
    before = []
    model.model.norm.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    output = model(ids, output_hidden_states=True)
    # MiMo's layers read the state before the final norm, all others that after it
    hidden = before[0] if _is_mimo(folder) else output.hidden_states[-1]
    found = [output.logits]
    heads = mimo_heads(folder, model, swapped) if _is_mimo(folder) else _mtp_heads(model, depths)
    places = torch.arange(ids.size(1)).expand_as(ids)
    for depth in range(depths):
        ahead, hidden = slice(depth + 1, None), hidden[:, : ids.size(1) - depth - 1]
        hidden = heads(depth, hidden, ids[:, ahead], places[:, ahead])
        found.append(functional.linear(hidden, model.lm_head.weight))
    return found


def chosen(logits: torch.Tensor, ids: torch.Tensor, ahead: int = 1) -> torch.Tensor:
    """[b, s - ahead]: log-probs of the tokens ``ahead`` places on."""
    length = ids.size(1) - ahead
    targets = ids[:, ahead:].unsqueeze(-1)
    return logits[:, :length].float().log_softmax(-1).gather(-1, targets).squeeze(-1)


def load_model(folder: Path):
    """By transformers, MTP tensors left alone, fp32."""
    kind = type(AutoModelForCausalLM.from_config(_config(folder)))
    layers = range(LAYERS, LAYERS + 4)
    names = [rf"model\.layers\.{n}\." for n in layers] + [r"model\.mtp_layers\."]
    model_class = type(kind.__name__, (kind,), {})
    model_class._keys_to_ignore_on_load_unexpected = names
    return model_class.from_pretrained(folder, config=_config(folder), dtype=torch.float32).eval()


def _config(folder: Path):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def _is_mimo(folder: Path) -> bool:
    return "MiMo" in json.loads((folder / "config.json").read_text())["architectures"][0]


def _mtp_heads(model, depths):
    if not depths:
        return None
    mtp = MtpModel.from_pretrained(model, device_map={"": torch.device("cpu")}).eval()
    assert len(mtp.layers) == depths
    return lambda depth, hidden, ids, places: mtp.forward_layer(
        depth, hidden, places, None, input_ids=ids
    )


def mimo_heads(folder: Path, model, swapped: bool):
    """MiMo's formula: final_layernorm(Block(input_proj [hidden_ln(h); token_ln(e)]))."""
    tensors, eps = read_tensors(folder), model.config.rms_norm_eps

    def run(depth, hidden, ids, places):
        prefix = f"model.mtp_layers.{depth}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        def norm(x, name):
            return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * own[f"{name}.weight"]

        block = Qwen2DecoderLayer(model.config, 0).eval()
        block.load_state_dict({key: own[key] for key in block.state_dict()})
        embedded = model.get_input_embeddings()(ids)
        parts = [norm(hidden, "hidden_layernorm"), norm(embedded, "token_layernorm")]
        joined = torch.cat(parts[::-1] if swapped else parts, dim=-1)
        state = functional.linear(joined, own["input_proj.weight"])
        rotary = model.model.rotary_emb(state, places)
        state = block(state, attention_mask=None, position_embeddings=rotary)
        return norm(state[0] if isinstance(state, tuple) else state, "final_layernorm")

    return run


def as_ling2(source: Path, target: Path, depths: int) -> Path:
    """A GLM folder with norms of queries and keys and without bias, in Ling 2.0's naming.

    What the two compute is the same: attention over groups with a norm on each head, a rotary
    embedding of half a head, sigmoid scores with a bias and groups of experts.
    """
    target.mkdir()
    names = {
        "embed_tokens": "word_embeddings",
        "self_attn.q_norm": "attention.query_layernorm",
        "self_attn.k_norm": "attention.key_layernorm",
        "self_attn.o_proj": "attention.dense",
        "gate.e_score_correction_bias": "gate.expert_bias",
        "shared_head.norm": "final_layernorm",
    }
    tensors, found = read_tensors(source), {}
    repeated = (".shared_head.head.", *(f"layers.{LAYERS + k}.embed" for k in range(depths)))
    for name, tensor in tensors.items():
        if any(part in name for part in (*repeated, "k_proj", "v_proj")):
            continue
        if "q_proj" in name:
            parts = [
                tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")
            ]
            tensor, name = torch.cat(parts), name.replace("self_attn.q_proj", _FUSED)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found[name] = tensor
    content = json.loads((source / "config.json").read_text())
    moved = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}
    content = {moved.get(key, key): value for key, value in content.items()}
    content |= {"architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe"}
    content |= {"score_function": "sigmoid", "use_qkv_bias": False}
    for key in ("attention_bias", "scoring_func"):
        content.pop(key, None)
    (target / "config.json").write_text(json.dumps(content))
    write_tensors(target, found)
    return target


_FUSED = "attention.query_key_value"
