"""The policy on Megatron-Core: generation, log-probs and updates behind a small interface.

Method names follow NeMo-Aligner's actors (``infer``, ``get_inference_log_probs``,
``get_init_policy_logprobs``, ``get_loss_and_metrics``, ``finish_training_step``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_occ.config.schema import Config, OptimizerConfig
from megatron_occ.config.sizes import sequence_multiple
from megatron_occ.losses.heads import HeadOutputs, LossReport
from megatron_occ.mcore.balance import Balance
from megatron_occ.mcore.gradients import Gradient, GradientSpace
from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.mcore.layout import Layout
from megatron_occ.mcore.loss_reports import join_reports
from megatron_occ.mcore.micro_batches import MiniBatchPlacer, Sequences, with_balance
from megatron_occ.mcore.model import OCCGPTModel
from megatron_occ.mcore.optimizer import JointOptimizer, StepReport
from megatron_occ.mcore.provider import (
    InferenceChunk,
    build_chunks,
    build_inference_chunk,
    wrap_data_parallel,
)
from megatron_occ.mcore.reference import ReferencePolicy
from megatron_occ.mcore.routing import RouteLog
from megatron_occ.mcore.routing_metrics import pop_routing_metrics
from megatron_occ.mcore.snapshot import restored
from megatron_occ.mcore.training import MicroBatch, configure_gradients, run_mini_batch
from megatron_occ.rl.batch import head_targets

LossFunction = Callable[[HeadOutputs, Any], tuple[Tensor, LossReport]]


class MegatronGPTActor:
    """Model and optimizer of one phase on this rank.

    Args:
        config: the run's configuration.
        vocab_size: ids of the tokenizer.
        layout: this rank's place.
        optimizer: the phase's optimizer section.
        total_updates: length of the phase, in optimizer updates.
        train_head: False freezes the MTP head (regime ``none``): no update, no weight decay.
        train_trunk: False freezes all the rest, embedding and output layer included.
        draws: initial weights are drawn; False: they are loaded before anything else is done.
        balance_loss: coefficient of the balance loss of experts in updates, see
            ``losses/balance.py``; 0: none.

    Attributes:
        has_weights: whether parameters have values.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        layout: Layout,
        *,
        optimizer: OptimizerConfig,
        total_updates: int,
        train_head: bool = True,
        train_trunk: bool = True,
        draws: bool = True,
        balance_loss: float = 0.0,
    ) -> None:
        self.has_weights = draws
        self.config, self.layout, self._train_trunk = config, layout, train_trunk
        self.num_depths = config.mtp.num_layers
        self.sequence_multiple = sequence_multiple(config)
        parallel = config.parallel
        self.micro_batch_multiple = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
        self._chunks = build_chunks(config, vocab_size, layout.device, draws=draws)
        for chunk in self._chunks:
            _freeze(chunk, trunk=not train_trunk, head=not train_head)
        self._wrapped = wrap_data_parallel(self._chunks, config)
        configure_gradients(self._wrapped)
        self.optimizer = JointOptimizer(
            self._wrapped,
            optimizer,
            bf16=config.precision == "bf16",
            parallel=parallel,
            total_updates=total_updates,
            head_clip=config.mtp.head.clip_grad,
            any_rank=layout.any_rank,
        )
        self.gradient_space = GradientSpace(
            self._chunks,
            self.optimizer.megatron,
            num_layers=config.model.num_layers,
            beta2=optimizer.beta2,
            eps=optimizer.eps,
            updates=lambda: self.optimizer.updates,
        )
        self._placer = MiniBatchPlacer(config, layout)
        self.reference = ReferencePolicy(lambda: self.chunks)
        self._routers = 0
        if config.rl.routing_replay != "none":
            for chunk in self._chunks:
                self._routers = chunk.replay_routing(self._routers)
        self._balance_loss = balance_loss
        for chunk in self._chunks if balance_loss else ():
            chunk.balance = Balance(chunk)
        self._inference: list[InferenceChunk] | None = None

    @property
    def chunks(self) -> list[OCCGPTModel]:
        """This rank's model; gathers of the last update's weights end here, if any are open."""
        self.optimizer.finish_gathers()
        return self._chunks

    @property
    def wrapped(self) -> list[DistributedDataParallel]:
        """The same, wrapped for data parallelism."""
        self.optimizer.finish_gathers()
        return self._wrapped

    @property
    def version(self) -> int:
        """Of the weights: optimizer updates so far, those before a resumption included."""
        return self.optimizer.updates

    def inference_chunks(self) -> list[OCCGPTModel]:
        """This rank's model for generation, on the present weights."""
        chunks = self.chunks
        if self._inference is None:
            self._inference = [build_inference_chunk(chunk, self.config) for chunk in chunks]
        return [chunk.refresh() for chunk in self._inference]

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
        """Log-probs under the current weights by the training forward pass.

        Args:
            ids: [n, s] right-padded token ids.
            parts: row indices of each micro-batch, a partition of the rows.
            lengths: tokens of each row: micro-batches are packed; None: padded.
            temperature: divides the logits.
            entropies: as well.
            masks: [n, s, m] ids that the softmax is over, see ``HeadRequest``; None: all.
            routes: [n, s, routers of this rank, k] experts that tokens go to, likewise.
            recorded: gets the experts that routers chose, of the same shape, on the host.

        Returns:
            [n, s] in the source frame: position t is about token t + 1; the last is about none.
            With ``entropies`` [2, n, s], the second of them in nats.
        """
        batches, log = [], None
        if recorded is not None:
            log = RouteLog((*ids.shape, self._routers), self.config.model.moe)
            recorded.append(log.routes)
        for rows in map(list, parts):
            part = ids[rows]
            spans = None if lengths is None else [lengths[row] for row in rows]
            request = HeadRequest(
                head_targets(part, 0),
                (),
                temperature,
                entropies,
                masks=None if masks is None else _rows_of(masks, rows),
                routes=None if routes is None else _rows_of(routes, rows),
                record=None if log is None else log.of(rows),
            )
            batches.append(Sequences(part, spans, request, None))
        found = self._run(self._placer.place(batches), _keep_statistics, forward_only=True)
        result = torch.zeros(1 + entropies, *ids.shape, device=ids.device)
        for rows, statistics in zip(parts if found else (), found, strict=True):
            result[:, list(rows)] = statistics
        result = self.layout.broadcast_last_stage(result)
        return result if entropies else result[0]

    def keep_reference(self) -> None:
        """Remember the current weights as the reference policy."""
        self.reference.keep()

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
        with self.reference.in_place():
            return self.get_inference_log_probs(
                ids, parts=parts, lengths=lengths, temperature=temperature, masks=masks
            )

    def get_loss_and_metrics(
        self,
        micro_batches: Sequence[Sequences],
        loss: LossFunction,
        *,
        forward_only: bool = False,
        balanced: bool = True,
    ) -> LossReport:
        """Run a mini-batch; gradients stay in the buffers until :meth:`finish_training_step`.

        Args:
            micro_batches: from :meth:`micro_batch`.
            loss: from outputs and payload to (loss, report), summed over micro-batches and ranks.
            forward_only: no gradients.
            balanced: False: without the balance loss of experts.

        Returns:
            Metrics and calibration sums of the whole mini-batch, over micro-batches and ranks.
        """
        if self._balance_loss and balanced and not forward_only:
            micro_batches = with_balance(
                micro_batches, self._balance_loss, self.num_depths, self.layout
            )
        placed = self._placer.place(micro_batches)
        return join_reports(self._run(placed, loss, forward_only=forward_only), self.layout)

    def get_gradient(
        self,
        micro_batches: Sequence[Sequences],
        loss: LossFunction,
        *,
        head: bool = False,
        counts: bool = False,
    ) -> tuple[Gradient, LossReport]:
        """Gradient of a loss by a pass of its own, and the report over micro-batches and ranks.

        The balance loss of experts has no part in it.

        Args:
            micro_batches: from :meth:`micro_batch`.
            loss: as in :meth:`get_loss_and_metrics`.
            head: also the gradient of the MTP head's own parameters.
            counts: the pass is a part of the coming update: its tokens count for routers.
        """
        buffers = [buffer for chunk in self._chunks for buffer in chunk.buffers()]
        before = [] if counts else [buffer.clone() for buffer in buffers]
        placed = self._placer.place(micro_batches)
        report = join_reports(self._run(placed, loss, completes=False), self.layout)
        for buffer, value in zip(buffers, before, strict=not counts):
            buffer.copy_(value)
        return self.gradient_space.take(head=head), report

    def finish_training_step(self, mix: Callable[[], None] | None = None) -> StepReport:
        """Clip and update.

        Gathers of the new weights may still be open: :attr:`chunks` waits for them.

        Args:
            mix: called before, with gradients in place that it may change by ``gradient_space``.
        """
        return self.optimizer.step(mix)

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
    ) -> Sequences:
        """A micro-batch that asks for the main head and, in ``passes``, for all depths.

        Args:
            ids: [b, s] right-padded token ids.
            payload: for the loss function.
            lengths: tokens of each row: packed; None: padded.
            passes, temperature, entropy, distance, leaks, states, main_head, masks, routes: see
                ``HeadRequest``.
            ends: [b] tokens of each row, what follows is padding, for the balance loss.
        """
        targets = head_targets(ids, self.num_depths)
        request = HeadRequest(
            targets,
            passes,
            temperature,
            entropy,
            distance,
            leaks,
            states=states,
            frozen_trunk=not self._train_trunk,
            main_head=main_head,
            masks=masks,
            routes=routes,
        )
        return Sequences(ids, lengths, request, payload, ends)

    def restored(self, *, moments: bool = True) -> AbstractContextManager[None]:
        """A block whose updates are undone at its end, see :func:`snapshot.restored`."""
        return restored(self.chunks, self.optimizer, moments=moments)

    def pop_routing_metrics(self) -> dict[str, float]:
        """See :func:`routing_metrics.pop_routing_metrics`."""
        return pop_routing_metrics(self._chunks, self.layout)

    def _run(self, placed: list[MicroBatch], loss: LossFunction, **how: bool) -> list[Any]:
        """See :func:`run_mini_batch`."""
        try:
            return run_mini_batch(self._wrapped, placed, loss, **how)
        finally:
            for chunk in self._chunks:
                chunk.forget_micro_batches()


def _freeze(chunk: OCCGPTModel, *, trunk: bool, head: bool) -> None:
    """Before the chunk is wrapped: what is frozen then has no place in a gradient buffer."""
    for name, parameter in chunk.named_parameters():
        if head if name.startswith("mtp.") else trunk:
            parameter.requires_grad_(False)


def _rows_of(values: Tensor, rows: list[int]) -> Tensor:
    """Rows of what may be large: without a copy where they are neighbours."""
    is_span = rows == list(range(rows[0], rows[-1] + 1))
    return values[rows[0] : rows[-1] + 1] if is_span else values[rows]


def _keep_statistics(outputs: HeadOutputs, _payload: Any) -> tuple[Tensor, Tensor]:
    asked = [each for each in (outputs.logprobs, outputs.entropy) if each is not None]
    return outputs.logprobs.sum(), torch.stack(asked).detach()
