"""What the trainers need of a policy and of its place in the layout, without naming Megatron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from megatron_occ.losses.heads import HeadOutputs, LossReport
from megatron_occ.rollout import SamplingSettings

LossFunction = Callable[[HeadOutputs, Any], tuple[Tensor, LossReport]]


class GenerationLike(Protocol):
    """Responses of n prompts: token ids, their log-probs, and whether a stop token ended them."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finished: list[bool]


class StepReportLike(Protocol):
    """Outcome of one optimizer update."""

    trunk_norm: float
    head_norm: float
    lr: float
    skipped: bool


class Collectives(Protocol):
    """This rank among the data-parallel ranks."""

    data_parallel_rank: int
    data_parallel_size: int
    tensor_parallel_rank: int
    device: Any
    is_main: bool

    def all_reduce_data_parallel(self, values: Tensor, *, maximum: bool = False) -> Tensor:
        """Sum (or maximum) over data-parallel ranks, in place."""
        ...

    def broadcast_tensor_parallel(self, values: Tensor) -> Tensor:
        """Values of tensor-parallel rank 0 on all ranks of its group, in place."""
        ...


class Actor(Protocol):
    """A policy that can be sampled, scored and updated; ``mcore.actor.MegatronGPTActor`` is one."""

    layout: Collectives
    num_depths: int

    def infer(
        self, prompts: list[list[int]], sampling: SamplingSettings, seeds: list[int]
    ) -> GenerationLike: ...

    def get_inference_log_probs(
        self, ids: Tensor, *, micro_batch_size: int, temperature: float
    ) -> Tensor: ...

    def get_init_policy_logprobs(
        self, ids: Tensor, *, micro_batch_size: int, temperature: float
    ) -> Tensor: ...

    def micro_batch(
        self,
        ids: Tensor,
        payload: Any,
        *,
        passes: tuple[tuple[bool, bool], ...],
        temperature: float = 1.0,
        entropy: bool = False,
        distance: str | None = None,
    ) -> Any: ...

    def get_loss_and_metrics(
        self, micro_batches: Sequence[Any], loss: LossFunction, *, forward_only: bool = False
    ) -> LossReport: ...

    def finish_training_step(self) -> StepReportLike: ...
