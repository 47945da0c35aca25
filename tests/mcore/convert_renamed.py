"""Folders of one family in the naming of another that computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.mcore.convert_folders import LAYERS, read_tensors, write_tensors

_FUSED = "attention.query_key_value"


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
