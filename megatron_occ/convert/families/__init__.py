"""One table per family of checkpoints. The tables are the documentation of the conversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_occ.convert.families.deepseek_v3 import DEEPSEEK_V3, GLM4_MOE_LITE
from megatron_occ.convert.families.dense import LLAMA, MIMO, QWEN2, QWEN3
from megatron_occ.convert.families.glm4_moe import GLM4_MOE
from megatron_occ.convert.families.ling2 import LING2
from megatron_occ.convert.families.qwen3_moe import QWEN3_MOE
from megatron_occ.convert.table import Family

FAMILIES = {
    family.architecture: family
    for family in (
        MIMO,
        DEEPSEEK_V3,
        GLM4_MOE,
        GLM4_MOE_LITE,
        LING2,
        LLAMA,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
    )
}
_LINEAR = (
    "three of four layers are gated delta nets, and attention is gated: the model of this project "
    "has neither"
)
_SPARSE = "its attention is sparse (an indexer chooses the keys)"
# known, and not representable: beginnings of an architecture's name, and why
REFUSED = {
    "Qwen3Next": _LINEAR,
    "Qwen3_5": _LINEAR,
    "Ernie4_5": "its MTP layer reads the trunk's state before the final norm, and its output goes "
    "through the trunk's norm: Megatron-Core's reads the state after it and has a norm of its own",
    "Step3": "each of its MTP depths has an output layer of its own: Megatron-Core has one for all",
    "MiMoV2": "its layers alternate full and sliding-window attention with attention sinks",
    "NemotronH": "it is a hybrid of Mamba and attention layers",
    "Nemotron3": "it is a hybrid of Mamba and attention layers",
    "Longcat": "its layers have two attention blocks and zero-computation experts",
    "BailingHybrid": "most of its layers are linear attention",
    "BailingMoeV2_5": "most of its layers are linear attention",
    "BailingMoeV3": "most of its layers are Kimi's delta attention",
    "KimiLinear": "most of its layers are Kimi's delta attention",
    "KimiK25": "its text model, of DeepSeek-V3's architecture, lies below language_model. beside a "
    "vision tower, and its experts are published as packed int4 numbers",
    "DeepseekV2": "its experts are chosen by other scores than DeepSeek-V3's: softmax without a "
    "bias, not normalised",
    "DeepseekV32": _SPARSE,
    "DeepseekV4": _SPARSE,
    "GlmMoeDsa": _SPARSE,
    "Qwen2Moe": "its shared expert has a gate of its own",
    "Mixtral": "its experts have other names, and there is no table for them",
    "Gemma": "its norms are stored minus one and its embedding is scaled",
    "GptOss": "its attention has sinks and sliding windows, its experts biases",
    "Llama4": "some of its layers have no rotary embedding, and its attention is in chunks",
    "MiniMax": "its layers have linear attention, or norms over all heads at once",
}


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family that a ``config.json`` names.

    Raises:
        ValueError: a family that is unknown, or known not to fit; says why.
    """
    names = hf.get("architectures") or []
    if len(names) != 1:
        raise ValueError(f"architectures={names!r}: exactly one is expected")
    (name,) = names
    if name in FAMILIES:
        return FAMILIES[name]
    for beginning, reason in REFUSED.items():
        if name.startswith(beginning):
            raise ValueError(f"{name} can't be converted: {reason}")
    known = ", ".join(FAMILIES)
    raise ValueError(f"{name} is not known: there are tables for {known}")


def family_for(name: str) -> Family:
    """The family with this architecture.

    Raises:
        ValueError: there is none.
    """
    if name not in FAMILIES:
        raise ValueError(f"{name} is not known: there are tables for {', '.join(FAMILIES)}")
    return FAMILIES[name]
