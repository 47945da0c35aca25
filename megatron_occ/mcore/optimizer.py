"""Megatron-Core's optimizer and learning-rate schedule, with a gradient clip of the head's own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_occ.config.schema import OptimizerConfig, ParallelConfig
from megatron_occ.mcore.moments import set_updates
from megatron_occ.mcore.optimizer_settings import optimizer_settings
from megatron_occ.mcore.optimizer_state import load_state, sharded_state
from megatron_occ.mcore.weight_gathers import finish_gathers, start_gathers

# Megatron tells parameter groups of a checkpoint apart by four keys; this one is free for the head
_HEAD_GROUP = "is_decoupled_lr"


@dataclass(frozen=True)
class StepReport:
    """Gradient norms before clipping, and the learning rate of the update."""

    trunk_norm: float
    head_norm: float
    lr: float
    skipped: bool


class JointOptimizer:
    """One optimizer, two gradient clips: trunk with shared parameters, and the MTP head.

    A clip over both would let a large head gradient shrink the policy's update.

    Args:
        chunks: of the model on this rank, wrapped for data parallelism.
        config: section ``pretrain.optimizer`` or ``rl.optimizer``.
        bf16: parameters are bf16 with fp32 main copies.
        parallel: where the optimizer's state lies, and in which precision.
        total_updates: length of the learning-rate schedule.
        head_clip: largest gradient norm of the head's parameters (0: no clip).
        any_rank: whether any rank of the run has a flag, see ``Layout.any_rank``.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        config: OptimizerConfig,
        *,
        bf16: bool,
        parallel: ParallelConfig,
        total_updates: int,
        head_clip: float,
        any_rank: Callable[[bool], bool],
    ) -> None:
        self._chunks, self._any_rank = chunks, any_rank
        self.trunk_clip, self.head_clip = config.clip_grad, head_clip
        no_decay = ParamPredicate(name="vectors", fn=lambda parameter: parameter.dim() == 1)
        overrides = {
            ParamKey(predicate=no_decay): {"wd_mult": 0.0},
            ParamKey(attr="is_mtp_head"): {_HEAD_GROUP: True},
        }
        # one for dense and one for expert parameters, whose ranks differ
        self.megatron: ChainedOptimizer = get_megatron_optimizer(
            optimizer_settings(config, parallel, bf16=bf16),
            list(chunks),
            config_overrides=overrides,
            use_gloo_process_groups=False,
        )
        if parallel.optimizer_offload > 0:
            # Megatron made one for the whole model first, in cycles that Python would leave a while
            gc.collect()
        self.schedule = _schedule(self.megatron, config, total_updates)
        # made so far, skipped ones not counted
        self.updates = 0

    def step(self, mix: Callable[[], None] | None = None) -> StepReport:
        """Clip, update, and advance the schedule.

        Gathers of the new weights may be open afterwards, see :meth:`finish_gathers`.

        Non-finite gradients skip the update. Trunk or head stay as they are where their whole
        gradient is 0: nothing was learned about them, so that neither decay nor the moments of
        earlier updates may move them.

        Args:
            mix: called before norms are taken; it may change the gradients.
        """
        # the schedule counts finished updates; this one runs at the rate of the next count
        self.schedule.step(1)
        overflow = self.megatron.prepare_grads()
        if mix is not None:
            mix()
        norms = {head: self._norm(head) for head in (False, True)}
        finite = all(torch.isfinite(torch.tensor(norm)) for norm in norms.values())
        # norms are those of a rank's own group: ranks of other groups have to skip as well
        skipped = self._any_rank(overflow or not finite)
        if not skipped:
            self._clip(False, norms[False], self.trunk_clip)
            self._clip(True, norms[True], self.head_clip)
            self._hold({head for head, norm in norms.items() if norm == 0})
            self.megatron.step_with_ready_grads()
            start_gathers(self._chunks)
            self.updates += 1
        # `prepare_grads` made each p.grad an alias of the gradient buffer: left in place, the next
        # backward pass would add into the buffer twice
        self.megatron.zero_grad()
        # also on a rank without a parameter to train
        lr = self.schedule.get_lr({})
        return StepReport(norms[False], norms[True], lr, skipped=skipped)

    def finish_gathers(self) -> None:
        """Wait for weights of the last update that other ranks send; see ``weight_gathers.py``."""
        finish_gathers(self._chunks)

    def set_updates(self, updates: int) -> None:
        """Count the updates anew, as where moments are put back."""
        self.updates = updates
        set_updates(self.megatron, updates)

    def _hold(self, parts: set[bool]) -> None:
        """Without a rate Adam counts and forgets, and moves nothing; the schedule sets it anew."""
        for group in self.megatron.param_groups:
            if bool(group.get(_HEAD_GROUP)) in parts:
                group["lr"] = 0.0

    def _norm(self, head: bool) -> float:
        squares = (_norm(part, head) ** 2 for part in self.megatron.chained_optimizers)
        return sum(squares) ** 0.5

    def _clip(self, head: bool, norm: float, limit: float) -> None:
        if limit <= 0 or norm <= limit:
            return
        grads = [p.grad for p in _parameters(self.megatron, head) if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, limit / (norm + 1e-6))

    def sharded_state_dict(self, model_state: dict, *, loading: bool) -> dict:
        """Sharded optimizer state, see :func:`sharded_state`, and the schedule's."""
        state = {"updates": self.updates, "schedule": self.schedule.state_dict()}
        tensors = sharded_state(self.megatron, model_state, loading=loading)
        # a rank that writes no parameter has none
        return state | ({"optimizer": tensors} if tensors else {})

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`sharded_state_dict` described."""
        self.updates = state["updates"]
        load_state(self.megatron, state.get("optimizer", {}), self.updates)
        self.schedule.load_state_dict(state["schedule"])


def _parameters(optimizer: MegatronOptimizer, head: bool) -> list[Tensor]:
    groups = optimizer.param_groups
    return [p for g in groups if bool(g.get(_HEAD_GROUP)) == head for p in g["params"]]


def _norm(optimizer: MegatronOptimizer, head: bool) -> float:
    """Gradient norm over all ranks that hold parts of the model, each part counted once."""
    counted = [
        p.grad
        for p in _parameters(optimizer, head)
        if p.grad is not None
        and param_is_not_shared(p)
        and param_is_not_tensor_parallel_duplicate(p)
    ]
    group = optimizer.get_grad_stats_parallel_group()
    return float(get_grad_norm_fp32(counted, grad_stats_parallel_group=group))


def _schedule(
    optimizer: MegatronOptimizer, config: OptimizerConfig, total_updates: int
) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(total_updates, config.warmup_steps + 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
