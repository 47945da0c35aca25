"""The optimizer's state in a checkpoint, by the names of parameters: any layout can read it.

Megatron's own form holds what belongs to a layout: parameter groups, and a second optimizer with a
prefix of its own where experts are split over ranks. For the distributed optimizer it offers one
form that other layouts can read, and that one shifts parameters if a gradient buffer has padding
between its buckets (0.16.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_occ.mcore.moments import (
    MOMENTS,
    allocate,
    moments_of,
    refresh_host_copies,
    set_updates,
)

_MAIN = "fp32_param"


@dataclass(frozen=True)
class _Slot:
    """State of one parameter on this rank.

    Args:
        parameter: of the model.
        tensors: moments and, of a 16-bit parameter, the fp32 copy; empty where ``span`` is.
        span: entries of the flat parameter that the tensors are of, if it is split.
        group: the ranks that it is split over, or None.
    """

    parameter: Tensor
    tensors: dict[str, Tensor]
    span: slice | None = None
    group: ProcessGroup | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return MOMENTS if self.parameter.dtype == torch.float32 else (*MOMENTS, _MAIN)

    @property
    def is_written(self) -> bool:
        """One of the ranks that share a parameter takes all of it to and from the checkpoint."""
        return self.group is None or self.group.rank() == 0


@torch.no_grad()
def sharded_state(
    optimizer: ChainedOptimizer, model_state: dict[str, Any], *, loading: bool
) -> dict[str, Any]:
    """Sharded tensors of the state; called on all ranks.

    Args:
        optimizer: allocated here if it has made no update yet.
        model_state: the model's sharded state.
        loading: no values are needed.
    """
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    places = {id(place.data): place for place in nested_values(sharded)}
    state = {}
    for number, slot in enumerate(_slots(optimizer)):
        found = {}
        for name in slot.names:
            value = slot.tensors[name] if slot.group is None else _whole(slot, name, loading)
            if slot.is_written:
                place = places[id(slot.parameter)]
                found[name] = make_sharded_optimizer_tensor(place, value, f"optimizer.state.{name}")
        if found:
            state[f"parameter_{number}"] = found
    return state


@torch.no_grad()
def load_state(optimizer: ChainedOptimizer, state: dict[str, Any], updates: int) -> None:
    """Take over loaded tensors of :func:`sharded_state`.

    Args:
        optimizer: of this rank.
        state: as loaded.
        updates: how many the optimizer has made.
    """
    for number, slot in enumerate(_slots(optimizer)):
        found = state.get(f"parameter_{number}", {})
        for name in slot.names:
            if slot.group is None:
                slot.tensors[name].copy_(found[name])
            else:
                _scatter(slot, name, found.get(name))
    refresh_host_copies(optimizer)
    set_updates(optimizer, updates)


def state_tensors(optimizer: ChainedOptimizer) -> list[Tensor]:
    """Adam's moments on this rank, allocated if there has been no update yet."""
    found = []
    for part in optimizer.chained_optimizers:
        allocate(part)
        for _, main in main_parameters(part):
            found += moments_of(part, main).values()
    return found


@torch.no_grad()
def reload_main_weights(optimizer: ChainedOptimizer) -> None:
    """Take the main weights from those of the model.

    Megatron's own looks, where there are copies on the host, at these alone, and not at main
    weights in fp32, which it has them made of.
    """
    for part in optimizer.chained_optimizers:
        if not isinstance(part.optimizer, HybridDeviceOptimizer):
            part.reload_model_params()
            continue
        for parameter, main in main_parameters(part):
            main.copy_(parameter.flatten()[_span(part, parameter)])
    refresh_host_copies(optimizer)


def main_parameters(part: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters of the model and what the optimizer updates in their place on this rank.

    That is the parameter itself, its fp32 copy, or, with the distributed optimizer, this rank's
    share of it; a parameter without such a share is left out.
    """
    if part.optimizer is None:  # no parameter on this rank
        return
    if isinstance(part, DistributedOptimizer):
        for parameter, (group, place) in part.model_param_group_index_map.items():
            yield parameter, part.optimizer.param_groups[group]["params"][place]
    else:
        yield from _pairs(part)


def _slots(optimizer: ChainedOptimizer) -> Iterator[_Slot]:
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:  # no parameter on this rank
            continue
        allocate(part)
        if isinstance(part, DistributedOptimizer):
            yield from _split_slots(part)
            continue
        for parameter, main in _pairs(part):
            yield _Slot(parameter, moments_of(part, main) | {_MAIN: main})


def _pairs(part: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters of the model and what the optimizer updates in their place."""
    if not isinstance(part, Float16OptimizerWithFloat16Params):
        yield from ((parameter, parameter) for parameter in part.get_parameters())
        return
    groups = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
    for parameters, mains in groups:
        yield from zip(parameters, mains, strict=True)
    for parameters in part.fp32_from_fp32_groups:
        yield from zip(parameters, parameters, strict=True)


def _split_slots(part: DistributedOptimizer) -> Iterator[_Slot]:
    """Of all parameters in the gradient buffers, in one order on the ranks that share them."""
    group = part.data_parallel_group
    for parameter in (p for buffer in part.buffers for p in buffer.param_index_map):
        place = part.model_param_group_index_map.get(parameter)
        if place is None:
            yield _Slot(parameter, {}, None, group)
            continue
        main = part.optimizer.param_groups[place[0]]["params"][place[1]]
        tensors = moments_of(part, main) | {_MAIN: main}
        yield _Slot(parameter, tensors, _span(part, parameter), group)


def _span(part: DistributedOptimizer, parameter: Tensor) -> slice:
    """This rank's share of the entries of a flat parameter."""
    buffer, dtype, bucket = part.model_param_gbuf_map[parameter]
    span = part.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]["param"]
    return slice(span.start, span.end)


def _whole(slot: _Slot, name: str, loading: bool) -> Tensor | None:
    """A split tensor in the parameter's shape on the CPU, on the rank that writes it."""
    if loading:
        return torch.empty(slot.parameter.shape) if slot.is_written else None
    flat = torch.zeros(slot.parameter.numel(), device=slot.parameter.device)
    if slot.span is not None:
        flat[slot.span] = slot.tensors[name].flatten().to(flat)
    torch.distributed.reduce(flat, group=slot.group, group_dst=0)
    return flat.view(slot.parameter.shape).cpu() if slot.is_written else None


def _scatter(slot: _Slot, name: str, whole: Tensor | None) -> None:
    flat = torch.empty(slot.parameter.numel(), device=slot.parameter.device)
    if slot.is_written:
        flat.copy_(whole.flatten())
    torch.distributed.broadcast(flat, group=slot.group, group_src=0)
    if slot.span is not None:
        slot.tensors[name].copy_(flat[slot.span].view(slot.tensors[name].shape))
