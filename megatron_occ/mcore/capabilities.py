"""What this machine can do, and refusals of what it can't."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from megatron_occ.config.schema import Config


def uses_transformer_engine() -> bool:
    """Whether layers are TransformerEngine's: it is installed, and there is a CUDA device."""
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


def captures_cycles(config: Config, device: torch.device) -> bool:
    """Whether rollouts by the embedded engine can be CUDA graphs.

    Experts wait for the host, and messages between ranks are left out of graphs.
    """
    ranks = config.parallel.tensor * config.parallel.pipeline
    return device.type == "cuda" and ranks == 1 and config.model.moe.num_experts is None


def check_machine(config: Config, device: torch.device) -> None:
    """Refuse what this machine can't do.

    Args:
        config: of the run.
        device: of the parameters; on "meta" nothing is computed, and nothing is refused.

    Raises:
        ValueError: key, value, reason and remedy.
    """
    if device.type == "meta":
        return
    if not config.rl.rollout.cuda_graphs and not captures_cycles(config, device):
        raise ValueError(
            "rl.rollout.cuda_graphs=false: there are none here anyway, as they take a CUDA device, "
            "a model without experts, parallel.tensor=1 and parallel.pipeline=1: leave it out"
        )
    if uses_transformer_engine():
        return
    where = "there is no CUDA device" if device.type == "cpu" else "it is not installed"
    if config.fp8.format != "none":
        raise ValueError(
            f"fp8.format={config.fp8.format}: is done by TransformerEngine, and {where} here: use "
            "fp8.format=none, or pip install 'megatron-occ[gpu]' on a GPU machine"
        )
    if config.model.moe.num_experts is not None and device.type == "cuda":
        raise ValueError(
            f"model.moe.num_experts={config.model.moe.num_experts}: Megatron-Core's router needs "
            f"TransformerEngine on a GPU, and {where}: pip install 'megatron-occ[gpu]'"
        )
