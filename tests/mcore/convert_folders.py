"""Tiny random checkpoints of each family in its public naming, and what they compute.

Names and shapes of the trunk are those that transformers writes, where it knows the family; those
of MTP layers are written out here after the published checkpoints.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from tests.mcore.convert_configs import CONFIGS, LAYERS, WIDTH


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
    if depths and "Lite" in _architecture(folder):
        folder = _as_deepseek(folder)
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
    return "MiMo" in _architecture(folder)


def _architecture(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["architectures"][0]


def _as_deepseek(folder: Path) -> Path:
    """GLM-4.7-Flash by another name: of that one transformers has no MTP layers."""
    target = folder.with_name("as_deepseek")
    shutil.copytree(folder, target, dirs_exist_ok=True)
    content = json.loads((folder / "config.json").read_text())
    del content["mlp_layer_types"]
    content |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    content["first_k_dense_replace"] = 1
    (target / "config.json").write_text(json.dumps(content))
    return target


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
