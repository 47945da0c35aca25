"""Gathers of updated weights that run beside the next forward pass.

Under the distributed optimizer an update leaves each data-parallel rank with a share of the new
weights, and the others' are gathered. With ``parallel.overlap_param_gather`` the update starts all
of these gathers, in the order in which the forward pass comes to the weights, and returns. They end

- in a pass through the model: before a chunk begins, for all that is not named in the next line;
  before each layer and the final norm, for their weights; behind the trunk, for all the rest, since
  MTP layers, their frozen copy and the output layer are read as tensors, without a call;
- for all others when they ask for the model: ``MegatronGPTActor.chunks`` ends them first.

Megatron's own hooks are taken off. They know the weights of called modules alone, start the first
gather in the forward pass, and gather again after every backward pass, whether an update followed
or not: after each of those that take gradients apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn

from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.mcore.model import OCCGPTModel


def wait_in_turn(chunk: OCCGPTModel, wrapped: DistributedDataParallel) -> None:
    """Let a chunk's forward pass wait for gathers of :func:`start_gathers` where it needs them.

    Args:
        chunk: of the model.
        wrapped: the same chunk, wrapped for overlapped gathers.
    """
    wrapped.disable_forward_pre_hook(param_sync=False)
    decoder, every = chunk.decoder, _all_groups(wrapped)
    norm = getattr(decoder, "final_layernorm", None)
    in_turn = [*decoder.layers, *([] if norm is None else [norm])]
    behind = [part for name in ("mtp", "output_layer") if (part := getattr(chunk, name, None))]
    waiting = {id(p) for module in (*in_turn, *behind) for p in module.parameters()}
    first = _groups(wrapped, (p for p in chunk.parameters() if id(p) not in waiting))

    def begin(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        request: HeadRequest | None = kwargs.get("request")
        # the decoder is left out of a pass over kept states, and what is ours of Megatron's own
        runs_trunk = request is not None and request.states is None
        _finish(first if runs_trunk else every)

    chunk.register_forward_pre_hook(begin, with_kwargs=True)
    for module in in_turn:
        groups = _groups(wrapped, module.parameters())
        module.register_forward_pre_hook(lambda *_, groups=groups: _finish(groups))
    decoder.register_forward_hook(lambda *_: _finish(every))


def start_gathers(chunks: Sequence[DistributedDataParallel]) -> None:
    """Begin to gather new weights, where the update has left that open; called by all ranks.

    Args:
        chunks: of the model on this rank; with or without overlapped gathers.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            for group in _in_forward_order(chunk):
                group.start_param_sync()


def _in_forward_order(wrapped: DistributedDataParallel) -> list[Any]:
    """Groups of dense and of expert weights, by the first weight of each in the model."""
    numbers = {id(p): number for number, p in enumerate(wrapped.module.parameters())}

    def first(group: Any) -> int:
        return min(numbers[id(p)] for bucket in group.buckets for p in bucket.params_list)

    return sorted(_all_groups(wrapped), key=first)


def finish_gathers(chunks: Sequence[DistributedDataParallel]) -> None:
    """Wait for all gathers that are open; no message of its own, so any rank may call it."""
    for chunk in chunks:
        _finish(_all_groups(chunk))


def _all_groups(wrapped: DistributedDataParallel) -> list[Any]:
    """Megatron's groups of buckets, of dense and of expert parameters: one gather each."""
    return [*wrapped.expert_parallel_bucket_groups, *wrapped.bucket_groups]


def _groups(wrapped: DistributedDataParallel, parameters: Iterable[nn.Parameter]) -> list[Any]:
    """Groups that have some of the parameters; frozen ones have none."""
    owners = wrapped.param_to_bucket_group
    return list({id(owners[p]): owners[p] for p in parameters if p in owners}.values())


def _finish(groups: Iterable[Any]) -> None:
    for group in groups:
        if group.param_gather_handle is not None:
            group.finish_param_sync(skip_next_bucket_dispatch=True)
