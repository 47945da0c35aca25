"""Adam's moments and updates on a rank, wherever they are: by the weights, in bf16, or on the host.

TransformerEngine's Adam keeps moments in bf16 as plain tensors that its kernel rounds to, and with
them a scale that is 1; it makes both itself. With moments on the host, Megatron-Core's
``HybridDeviceOptimizer`` has optimizers in it, those on the host with copies of the main weights:
each update copies gradients there and new weights back, so a weight that is changed here has to be
copied there too (:func:`refresh_host_copies`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor
from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
# these count updates for each parameter, TransformerEngine's Adam for each group
_TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)


def moments_of(part: MegatronOptimizer, main: Tensor) -> dict[str, Tensor]:
    """The moments of what an allocated optimizer updates, fp32 or bf16; not copies of them."""
    state = part.optimizer.state[main]
    return {name: state[name] for name in MOMENTS}


@torch.no_grad()
def allocate(part: MegatronOptimizer) -> None:
    """Zeros as the state of an optimizer that has made no update yet."""
    inner = part.optimizer
    if inner is None or inner.state:  # no parameter on this rank, or there are moments
        return
    if isinstance(inner, HybridDeviceOptimizer):
        _allocate_parts(inner)
    elif part.config.use_precision_aware_optimizer:
        for main in _parameters(inner):
            for name in MOMENTS:
                inner.set_scaled_state(main, name, torch.zeros_like(main.data))
    else:
        part.init_state_fn(inner, part.config)
    _set_updates(part, 0)


def set_updates(optimizer: ChainedOptimizer, updates: int) -> None:
    """Tell the optimizer how many updates its moments are of."""
    for part in optimizer.chained_optimizers:
        _set_updates(part, updates)


def host_copies(part: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Main weights that are updated on the host, and their copies there."""
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        yield from part.optimizer.gpu_params_map_cpu_copy.items()


@torch.no_grad()
def refresh_host_copies(optimizer: ChainedOptimizer) -> None:
    """Copy main weights to the host, after other than updates have changed them."""
    for part in optimizer.chained_optimizers:
        for main, copy in host_copies(part):
            copy.data.copy_(main)


def _allocate_parts(inner: HybridDeviceOptimizer) -> None:
    """As each part would at its first update; the whole shows the state of its parts."""
    for each in inner.sub_optimizers:
        for updated in _parameters(each):
            state = {name: torch.zeros_like(updated.data) for name in MOMENTS}
            each.state[updated] = inner.state[inner.inner_param_to_orig_param[updated]] = state


def _set_updates(part: MegatronOptimizer, updates: int) -> None:
    for each in _updating(part.optimizer):
        for group in each.param_groups:
            if isinstance(each, _TORCH_ADAM):
                _set_steps(each, group, float(updates))
            else:
                group["step"] = updates


def _set_steps(optimizer: Optimizer, group: dict[str, Any], updates: float) -> None:
    """Where torch has them: its fused kernel reads the count on the parameter's device."""
    for parameter in group["params"]:
        if parameter in optimizer.state:
            device = parameter.device if group.get("fused") else torch.device("cpu")
            optimizer.state[parameter]["step"] = torch.full((), updates, device=device)


def _updating(inner: Optimizer | None) -> Sequence[Optimizer]:
    """Those that make the updates."""
    if isinstance(inner, HybridDeviceOptimizer):
        return inner.sub_optimizers
    return [] if inner is None else [inner]


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
