"""One mini-batch through Megatron-Core's forward-backward schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_occ.losses.heads import HeadOutputs
from megatron_occ.mcore.head_request import HeadRequest

Result = TypeVar("Result")


@dataclass(frozen=True)
class MicroBatch:
    """Tokens of a micro-batch, what to ask of the model, and what the loss needs besides.

    Args:
        ids: [rows, length] input of the model on this rank, as ``request.placement`` lays it out.
        request: see ``HeadRequest``.
        payload: handed to the loss function untouched.
    """

    ids: Tensor
    request: HeadRequest
    payload: Any


def configure_gradients(chunks: Sequence[DistributedDataParallel]) -> None:
    """Let the schedule reduce gradients at the end of a mini-batch, without rescaling them.

    Our losses divide by counts over all micro-batches and ranks, so gradients are summed: the
    schedule's token count, which it would divide by, is dropped.
    """

    def finalize(models: list, _num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        finalize_model_grads(models, None, **kwargs)

    no_sync = [chunk.no_sync for chunk in chunks]
    config = chunks[0].config
    config.finalize_model_grads_func = finalize
    config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync


def run_mini_batch(
    chunks: Sequence[DistributedDataParallel],
    micro_batches: Sequence[MicroBatch],
    loss: Callable[[HeadOutputs, Any], tuple[Tensor, Result]],
    *,
    forward_only: bool = False,
    completes: bool = True,
) -> list[Result]:
    """Forward and, unless ``forward_only``, backward; gradients end up in the buffers.

    Args:
        chunks: of the model on this rank, wrapped for data parallelism.
        micro_batches: at least one; in a pipeline all of one shape.
        loss: from the model's outputs and the payload to a scalar, to be summed over micro-batches,
            and anything to report.
        forward_only: skip the backward pass.
        completes: the update follows. Without it routers count their tokens on, and their bias
            stays as it is.

    Returns:
        The reports, one a micro-batch; none but on the last pipeline stage.
    """

    def forward_step(batches: Any, module: torch.nn.Module) -> tuple[HeadOutputs, Callable]:
        batch: MicroBatch = next(batches)
        positions = torch.arange(batch.ids.size(1), device=batch.ids.device).expand_as(batch.ids)
        outputs = module(batch.ids, positions, None, request=batch.request)
        return outputs, lambda result: _reported(loss(result, batch.payload))

    if not forward_only:
        for chunk in chunks:
            chunk.zero_grad_buffer()
    rows, length = micro_batches[0].ids.shape
    config = chunks[0].config
    # Megatron's forward_only skips the backward pass but still records the graph
    with torch.set_grad_enabled(not forward_only), _held_bias(config, held=not completes):
        try:
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(micro_batches) for _ in chunks],
                model=list(chunks),
                num_microbatches=len(micro_batches),
                # of the whole sequence: Megatron divides it over context-parallel ranks
                seq_length=length * config.context_parallel_size,
                micro_batch_size=rows,
                forward_only=forward_only,
            )
        finally:
            _let_graphs_go(chunks)


def _let_graphs_go(chunks: Sequence[DistributedDataParallel]) -> None:
    """Cut what Megatron's token dispatchers keep of the last micro-batch off its graph.

    The graph holds the model by the hooks of data parallelism, and the model the dispatcher: a
    circle through autograd, which Python cannot collect. A phase that is over would keep its
    weights, gradients and optimizer in memory.
    """
    if chunks[0].config.num_moe_experts is None:
        return
    for module in (module for chunk in chunks for module in chunk.modules()):
        dispatcher = getattr(module, "token_dispatcher", None)
        # the flexible one has another inside
        for holder in (dispatcher, getattr(dispatcher, "_comm_manager", None)):
            for name, value in vars(holder).copy().items() if holder else ():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    setattr(holder, name, value.detach())


@contextmanager
def _held_bias(config: Any, *, held: bool) -> Iterator[None]:
    """For the time of a schedule, gradients are finalised without a step of the routers' bias.

    Megatron moves the bias and clears the counts there, where one entry of the configuration is
    set. It must not be off any longer: routers that are built then would have no bias.
    """
    finalize = config.finalize_model_grads_func

    def without_bias(*args: Any, **kwargs: Any) -> None:
        before = config.moe_router_enable_expert_bias
        config.moe_router_enable_expert_bias = False
        try:
            finalize(*args, **kwargs)
        finally:
            config.moe_router_enable_expert_bias = before

    config.finalize_model_grads_func = without_bias if held else finalize
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize


def _reported(outcome: tuple[Tensor, Result]) -> tuple[Tensor, Tensor, Result]:
    loss, report = outcome
    # the triple keeps Megatron from dividing the loss; its token count is dropped in `finalize`
    return loss, torch.ones((), dtype=torch.int, device=loss.device), report
