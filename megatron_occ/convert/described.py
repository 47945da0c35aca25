"""The model of an export as its family has it, and the ``config.json`` that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from megatron_occ.config.identity import FREE
from megatron_occ.config.load import flat_values
from megatron_occ.config.schema import Config
from megatron_occ.config.schema_model import MLAConfig, ModelConfig, MoEConfig
from megatron_occ.convert.plan import model_config
from megatron_occ.convert.table import Family
from megatron_occ.convert.transforms import head_sizes
from megatron_occ.data.tokenizers import CharTokenizer


def as_family(
    family: Family, model: ModelConfig, depths: int, vocab_size: int, more: Mapping[str, Any]
) -> ModelConfig:
    """The model with what this family always has; what it never has is refused.

    Queries, keys and values without bias are the same as with one of zeros, an output layer that
    is tied to the embedding the same as a copy of it.

    Args:
        family: of the folder.
        model: section ``model`` of the checkpoint.
        depths: MTP depths to write.
        vocab_size: rows of embedding and output layer.
        more: entries of ``config.json`` besides those of the family.

    Raises:
        ValueError: what the family does not have.
    """
    wanted = replace(model, vocab_size=vocab_size, from_hf=None)
    if family.always_biased:
        wanted = replace(wanted, qkv_bias=True)
    if family.always_untied:
        wanted = replace(wanted, tie_embeddings=False)
    content = family.describe(wanted) | {"vocab_size": vocab_size} | more
    theirs_model = model_config(family.read(content)).model
    if not depths or theirs_model.mtp_reads == "before":
        # nothing reads it, or what does is fitted to it: see ``before_norm``
        wanted = replace(wanted, mtp_reads=theirs_model.mtp_reads)
    ours, theirs = (_spelled_out(m) for m in (wanted, theirs_model))
    problems = [
        f"{key}={ours[key]!r}, {family.architecture} makes it {theirs[key]!r}"
        for key in ours
        if ours[key] != theirs[key]
    ]
    if problems:
        raise ValueError("; ".join(problems))
    return wanted


def _spelled_out(model: ModelConfig) -> dict[str, Any]:
    """Values by key, defaults that depend on other values filled in."""
    _, groups, channels = head_sizes(model)
    moe = model.moe
    if moe.num_experts is None:
        moe = MoEConfig()
    else:
        width = moe.ffn_hidden_size or model.ffn_hidden_size
        factor = moe.scaling_factor or 1.0
        moe = replace(moe, ffn_hidden_size=width, scaling_factor=factor, bias_update_rate=0.0)
    mla = model.mla if model.mla.enabled else MLAConfig()
    if mla.enabled and mla.norm_epsilon is None:
        mla = replace(mla, norm_epsilon=model.norm_epsilon)
    heads = dict(num_query_groups=groups, kv_channels=None if mla.enabled else channels)
    values = flat_values(Config(model=replace(model, moe=moe, mla=mla, **heads)))
    return {key: value for key, value in values.items() if key.startswith("model.")}


def content_of(
    family: Family,
    model: ModelConfig,
    depths: int,
    vocab_size: int,
    like: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """``config.json``; the number of MTP layers is that of the tensors that are written.

    Args:
        family, model, depths, vocab_size: see :func:`as_family`, ``model`` being its result.
        like: ``config.json`` to keep; None: written anew.

    Raises:
        ValueError: ``like`` is of another model.
    """
    described = family.describe(model) | {"vocab_size": vocab_size}
    if like is None:
        content = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            **described,
        }
    else:
        theirs = _spelled_out(model_config(family.read(like)).model)
        differing = [
            f"{key}={value!r}, there {theirs[key]!r}"
            for key, value in _spelled_out(model).items()
            if value != theirs[key] and key.removeprefix("model.") not in FREE
        ]
        if differing:
            raise ValueError(
                f"the model is not that of the config.json to keep: {'; '.join(differing)}"
            )
        content = {k: v for k, v in like.items() if k != "quantization_config"}
    content.pop("num_mtp_layers", None)
    content[family.depths_key] = depths
    if family.mtp_beside and not depths:
        # as the architecture's own configurations are
        del content[family.depths_key]
    return content


def special_ids(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of ``config.json`` about special tokens, from a tokenizer's identity."""
    known = CharTokenizer if tokenizer["kind"] == "char" else SimpleNamespace(**tokenizer)
    return {
        "bos_token_id": None,
        "eos_token_id": known.eos_id,
        "pad_token_id": known.pad_id,
    }
