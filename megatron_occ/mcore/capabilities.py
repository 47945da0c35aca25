"""What this machine can do, and refusals of what it can't."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch

from megatron_occ.config.keys import spell
from megatron_occ.config.schema import Config

# modules of recompute_modules: 0.16.1 takes any norm for one in FP8
ENGINE_MODULES = ("layernorm", "moe_act")
# TransformerEngine's recipe of fp8.scaling, and what gives it scales that are powers of two
_POWERS_OF_TWO = {
    "block": ("Float8BlockScaling", "unset NVTE_FP8_BLOCK_SCALING_FP32_SCALES"),
    "current": (
        "Float8CurrentScaling",
        "export NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES=1, or use fp8.scaling=block",
    ),
}


def uses_transformer_engine() -> bool:
    """Whether layers are TransformerEngine's: it is installed, and there is a CUDA device."""
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


def token_dispatcher(config: Config) -> str:
    """Megatron's name of what takes tokens to experts.

    Without a CUDA device, also for a dry run, it is the one that needs no streams of a GPU; on one
    "auto" is the fastest that needs no library.
    """
    if not torch.cuda.is_available():
        return "allgather"
    name = config.parallel.token_dispatcher
    return "alltoall" if name == "auto" else name


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
    if config.model.init_device == "cuda" and device.type == "cpu":
        raise ValueError(
            "model.init_device=cuda: there is no CUDA device here: use model.init_device=cpu"
        )
    if device.type == "meta":
        return
    _check_dispatcher(config, device)
    _check_optimizer(config, device)
    if uses_transformer_engine():
        _check_scales(config)
        return
    where = "there is no CUDA device" if device.type == "cpu" else "it is not installed"
    if config.attention_backend in ("flash", "fused", "unfused"):
        raise ValueError(
            f"attention_backend={config.attention_backend}: is a kernel of TransformerEngine, and "
            f"{where} here: use attention_backend=auto or local"
        )
    for module in ENGINE_MODULES if config.recompute == "selective" else ():
        if module in config.recompute_modules:
            raise ValueError(
                f"recompute_modules={spell(config.recompute_modules)}: Megatron-Core computes "
                f"{module} again by TransformerEngine, and {where} here: leave {module} out"
            )
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


def _check_optimizer(config: Config, device: torch.device) -> None:
    parallel = config.parallel
    if parallel.moments_dtype != "fp32" and not uses_transformer_engine():
        where = "there is no CUDA device" if device.type == "cpu" else "it is not installed"
        raise ValueError(
            f"parallel.moments_dtype={parallel.moments_dtype}: moments are rounded by "
            f"TransformerEngine's Adam, and {where} here: use parallel.moments_dtype=fp32, or pip "
            "install 'megatron-occ[gpu]' on a GPU machine"
        )
    if parallel.optimizer_offload > 0 and device.type == "cpu":
        raise ValueError(
            f"parallel.optimizer_offload={parallel.optimizer_offload:g}: takes moments from a GPU "
            "to the host, and there is no CUDA device here: use parallel.optimizer_offload=0"
        )


def _check_dispatcher(config: Config, device: torch.device) -> None:
    name = config.parallel.token_dispatcher
    if name in ("alltoall", "flex") and device.type == "cpu":
        raise ValueError(
            f"parallel.token_dispatcher={name}: works on streams of a GPU, and there is no CUDA "
            "device here: use parallel.token_dispatcher=auto or allgather"
        )
    if name == "flex" and find_spec("deep_ep") is None:
        raise ValueError(
            "parallel.token_dispatcher=flex: needs DeepEP, and it is not installed here: install "
            "deep_ep, or use parallel.token_dispatcher=alltoall"
        )


def _check_scales(config: Config) -> None:
    """Rollouts are rounded to powers of two, see ``inference/rounding.py``: so must training be."""
    if not config.rl.rollout.fp8:
        return
    name, remedy = _POWERS_OF_TWO[config.fp8.scaling]
    recipe = getattr(import_module("transformer_engine.common.recipe"), name)
    if not (recipe.fp8_quant_fwd_inp.power_2_scale and recipe.fp8_quant_fwd_weight.power_2_scale):
        raise ValueError(
            f"rl.rollout.fp8=true: TransformerEngine's scales of fp8.scaling={config.fp8.scaling} "
            f"are no powers of two here, and rollouts would round to other values than training: "
            f"{remedy}, or use rl.rollout.fp8=false"
        )
