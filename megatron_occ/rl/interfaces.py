"""What the trainers need of a policy and of its place in the layout, without naming Megatron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from megatron_occ.losses.heads import HeadOutputs, LossReport

LossFunction = Callable[[HeadOutputs, Any], tuple[Tensor, LossReport]]


class StepReportLike(Protocol):
    """Outcome of one optimizer update."""

    trunk_norm: float
    head_norm: float
    lr: float
    skipped: bool


class Collectives(Protocol):
    """This rank among the data-parallel ranks.

    The ranks of one data-parallel share (tensor, context, pipeline) hold the same sequences.
    """

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    device: Any

    @property
    def is_main(self) -> bool:
        """True on the one process that writes."""
        ...

    @property
    def is_model_parallel_main(self) -> bool:
        """True on one of the ranks of each data-parallel share."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank of the run has the flag."""
        ...

    def all_reduce_data_parallel(self, values: Tensor, *, maximum: bool = False) -> Tensor:
        """Sum (or maximum) over data-parallel ranks, in place."""
        ...

    def gather_data_parallel(self, values: Tensor) -> Tensor:
        """Values of all data-parallel ranks, equal shapes, on dimension 0 in rank order."""
        ...

    def gather_ranks(self, values: Tensor) -> Tensor:
        """Values of all ranks, equal shapes, on dimension 0 in rank order."""
        ...

    def broadcast_model_parallel(self, values: Tensor) -> Tensor:
        """Values of the share's main rank on all ranks of the share, in place."""
        ...


class GradientSpaceLike(Protocol):
    """Gradients of the trunk as vectors; ``mcore.gradients.GradientSpace`` is one.

    Attributes:
        groups: names of the G groups of layers.
        has_adam_metric: the optimizer has made an update.
    """

    groups: Sequence[str]

    @property
    def has_adam_metric(self) -> bool: ...

    def current(self) -> Any:
        """The gradient that the optimizer is about to use, not a copy."""
        ...

    def sum(self, gradients: Sequence[Any]) -> Any:
        """Of gradients that hold the same parameters."""
        ...

    def random_like(self, gradient: Any, seed: int) -> Any:
        """The trunk's gradient with the sign of each entry drawn at random; one process."""
        ...

    def add(self, gradients: Sequence[Any], weights: Tensor) -> None:
        """Add gradients with weights [n, G] or [n, 1] to what the optimizer is about to use."""
        ...

    def products(self, left: Sequence[Any], right: Sequence[Any], metric: str) -> Tensor:
        """Inner products [len(left), len(right), G], float64 on the CPU, over all ranks."""
        ...


class Actor(Protocol):
    """A policy that can be scored and updated; ``mcore.actor.MegatronGPTActor`` is one.

    ``lengths``, tokens of each row, asks for packed micro-batches, None for padded ones. What the
    losses see is the same: [b, s] in the source frame. Padding may hold anything.

    Attributes:
        layout: this rank's place.
        num_depths: MTP depths K.
        sequence_multiple: a packed sequence is padded to a multiple of this.
        micro_batch_multiple: the number of micro-batches is a multiple of this.
        version: of the weights, optimizer updates so far.
        gradient_space: gradients of the trunk.
    """

    layout: Collectives
    num_depths: int
    sequence_multiple: int
    micro_batch_multiple: int
    version: int
    gradient_space: GradientSpaceLike

    def get_inference_log_probs(
        self,
        ids: Tensor,
        *,
        parts: Sequence[Sequence[int]],
        lengths: Sequence[int] | None,
        temperature: float,
        entropies: bool = False,
        masks: Tensor | None = None,
        routes: Tensor | None = None,
        recorded: list[Tensor] | None = None,
    ) -> Tensor:
        """Log-probs [n, s], source frame, under the current weights.

        Args:
            ids: [n, s].
            parts: rows of each micro-batch, each row once.
            lengths: n of them, or None.
            temperature: divides the logits.
            entropies: as well: [2, n, s], the second of them in nats.
            masks: [n, s, m] ids that the softmax is over, source frame, see ``RolloutBatch``.
            routes: [n, s, routers, k] experts that tokens go to, likewise.
            recorded: gets those that routers chose.
        """
        ...

    def get_init_policy_logprobs(
        self,
        ids: Tensor,
        *,
        parts: Sequence[Sequence[int]],
        lengths: Sequence[int] | None,
        temperature: float,
        masks: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`get_inference_log_probs`, under the reference policy."""
        ...

    def keep_reference(self) -> None:
        """The present weights are the reference policy from now on."""
        ...

    def micro_batch(
        self,
        ids: Tensor,
        payload: Any,
        *,
        lengths: Sequence[int] | None = None,
        passes: tuple[tuple[bool, bool], ...],
        temperature: float = 1.0,
        entropy: bool = False,
        distance: str | None = None,
        leaks: bool = False,
        states: Tensor | None = None,
        main_head: bool = True,
        masks: Tensor | None = None,
        routes: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> Any:
        """A micro-batch of an update.

        ``ends`` [b] are the tokens of each row, padded ones too: what follows has no part in the
        balance loss of experts.
        """
        ...

    def get_loss_and_metrics(
        self,
        micro_batches: Sequence[Any],
        loss: LossFunction,
        *,
        forward_only: bool = False,
        balanced: bool = True,
    ) -> LossReport:
        """Run a mini-batch; without ``balanced`` it has no balance loss of experts."""
        ...

    def get_gradient(
        self,
        micro_batches: Sequence[Any],
        loss: LossFunction,
        *,
        head: bool = False,
        counts: bool = False,
    ) -> tuple[Any, LossReport]:
        """Trunk gradient by a pass of its own, with ``head`` also the head's, and the report.

        With ``counts`` the pass is a part of the coming update.
        """
        ...

    def pop_routing_metrics(self) -> dict[str, float]:
        """What routers did in training passes since the last call; called by all ranks."""
        ...

    def finish_training_step(self, mix: Callable[[], None] | None = None) -> StepReportLike: ...
