"""What a checkpoint has to agree with to be loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_occ.config.schema import Config

# settings of the model that its weights do not depend on
FREE = ("max_position_embeddings", "init_std")
# where they came from says nothing about them
_LEFT_OUT = (*FREE, "from_hf", "init_device")


def describe(config: Config, tokenizer_state: dict[str, Any] | None, data: dict[str, str]) -> dict:
    """Content of a checkpoint's ``meta.json`` that is compared.

    Args:
        config: of the run.
        tokenizer_state: identity of the tokenizer; None: any will do.
        data: fingerprint of each data source by name.
    """
    model = asdict(config.model)
    # as it was before there were such things
    if config.model.mla.yarn.factor is None:
        del model["mla"]["yarn"]
    if config.model.mtp_reads == "after":
        del model["mtp_reads"]
    if config.model.mla.norm_epsilon is None:
        del model["mla"]["norm_epsilon"]
    if config.model.rotary_scaling.factor is None:
        del model["rotary_scaling"]
    return {
        "model": {name: value for name, value in model.items() if name not in _LEFT_OUT},
        "mtp_layers": config.mtp.num_layers,
        "tokenizer": tokenizer_state,
        "data": data,
    }


def free_settings(config: Config) -> dict[str, Any]:
    """Settings of the model that a checkpoint tells of, and that need not agree."""
    return {name: getattr(config.model, name) for name in FREE}
