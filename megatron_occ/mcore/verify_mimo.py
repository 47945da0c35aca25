"""MiMo's MTP layers by its formula, on transformers' Qwen2: its own code is never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_occ.convert.source import Source

_NORMS = ("hidden_layernorm", "token_layernorm", "final_layernorm")


class MiMoHeads(nn.Module):
    """``final_layernorm(Block(input_proj [hidden_layernorm(h); token_layernorm(e)]))``, each depth.

    After ``mimo_mtp.py`` in vLLM, with the interface of transformers' ``MtpModel``.

    Args:
        folder: has tensors below ``model.mtp_layers``.
        trunk: of a Qwen2, whose embedding and rotary table are taken.
        depths: to read at most.
    """

    def __init__(self, folder: Path, trunk: Any, depths: int) -> None:
        super().__init__()
        source = Source(folder)
        prefixes = [f"model.mtp_layers.{depth}." for depth in range(depths)]
        found = [p for p in prefixes if f"{p}input_proj.weight" in source.entries]
        self.layers = nn.ModuleList(_layer(source, prefix, trunk.config) for prefix in found)
        # not a submodule: it is rounded with the trunk
        self.__dict__["_trunk"] = trunk

    def forward_layer(
        self, depth: int, hidden: Tensor, places: Tensor, _mask: None, *, input_ids: Tensor
    ) -> Tensor:
        """States [b, s, h] of a depth.

        Args:
            depth: from 0.
            hidden: [b, s, h] of the depth before; of the trunk before its final norm.
            places: [b, s] positions.
            input_ids: [b, s] of the tokens that the depth reads.
        """
        layer = self.layers[depth]
        embedded = layer["token_layernorm"](self._trunk.get_input_embeddings()(input_ids))
        joined = torch.cat([layer["hidden_layernorm"](hidden), embedded], dim=-1)
        state = layer["input_proj"](joined)
        rotary = self._trunk.rotary_emb(state, places)
        state = layer["block"](state, attention_mask=None, position_embeddings=rotary)
        return layer["final_layernorm"](state[0] if isinstance(state, tuple) else state)


def _layer(source: Source, prefix: str, config: Any) -> nn.ModuleDict:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

    width = config.hidden_size
    layer = nn.ModuleDict({name: Qwen2RMSNorm(width, config.rms_norm_eps) for name in _NORMS})
    layer["input_proj"] = nn.Linear(2 * width, width, bias=False)
    layer["block"] = Qwen2DecoderLayer(config, 0)
    for part, module in layer.items():
        inside = "" if part == "block" else f"{part}."
        names = {name: f"{prefix}{inside}{name}" for name in module.state_dict()}
        module.load_state_dict({name: source.tensor(full) for name, full in names.items()})
    return layer.float().eval()
