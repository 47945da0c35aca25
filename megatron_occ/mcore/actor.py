"""The policy on Megatron-Core: generation, log-probs and updates behind a small interface.

Method names follow NeMo-Aligner's actors (``infer``, ``get_inference_log_probs``,
``get_init_policy_logprobs``, ``get_loss_and_metrics``, ``finish_training_step``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_occ.config.schema import Config, OptimizerConfig
from megatron_occ.losses.calibration import CalibrationSums
from megatron_occ.losses.heads import HeadOutputs, LossReport
from megatron_occ.mcore.generation import Generation, generate
from megatron_occ.mcore.model import HeadRequest
from megatron_occ.mcore.optimizer import JointOptimizer, StepReport
from megatron_occ.mcore.provider import build_model, wrap_data_parallel
from megatron_occ.mcore.startup import Layout
from megatron_occ.mcore.training import MicroBatch, configure_gradients, run_mini_batch
from megatron_occ.rl.batch import head_targets
from megatron_occ.rollout import SamplingSettings

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
    ) -> None:
        self.layout = layout
        self.num_depths = config.mtp.num_layers
        self.model = build_model(config, vocab_size, layout.device)
        if self.num_depths and not train_head:
            self.model.mtp.requires_grad_(False)
        self.wrapped = wrap_data_parallel(self.model)
        configure_gradients(self.wrapped)
        self.optimizer = JointOptimizer(
            self.wrapped,
            optimizer,
            bf16=config.precision == "bf16",
            total_updates=total_updates,
            head_clip=config.mtp.head.clip_grad,
        )
        self._reference: dict[str, Tensor] | None = None

    def infer(
        self, prompts: list[list[int]], sampling: SamplingSettings, seeds: list[int]
    ) -> Generation:
        """Sample a response for each prompt; see ``mcore.generation.generate``."""
        return generate(self.model, prompts, sampling, seeds)

    def get_inference_log_probs(
        self, ids: Tensor, *, micro_batch_size: int, temperature: float
    ) -> Tensor:
        """Log-probs under the current weights by the training forward pass.

        Args:
            ids: [n, s] right-padded token ids.
            micro_batch_size: sequences a forward pass.
            temperature: divides the logits.

        Returns:
            [n, s] in the source frame: position t is about token t + 1; the last is about none.
        """
        batches = [
            MicroBatch(part, HeadRequest(head_targets(part, 0), (), temperature), None)
            for part in ids.split(micro_batch_size)
        ]
        parts = run_mini_batch(self.wrapped, batches, _keep_logprobs, forward_only=True)
        return torch.cat(parts)

    def keep_reference(self) -> None:
        """Remember the current weights as the reference policy."""
        self._reference = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def get_init_policy_logprobs(
        self, ids: Tensor, *, micro_batch_size: int, temperature: float
    ) -> Tensor:
        """As :meth:`get_inference_log_probs`, under the reference policy."""
        with self._reference_weights():
            return self.get_inference_log_probs(
                ids, micro_batch_size=micro_batch_size, temperature=temperature
            )

    def get_loss_and_metrics(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: LossFunction,
        *,
        forward_only: bool = False,
    ) -> LossReport:
        """Run a mini-batch; gradients stay in the buffers until :meth:`finish_training_step`.

        Args:
            micro_batches: from :meth:`micro_batch`.
            loss: from outputs and payload to (loss, report), summed over micro-batches and ranks.
            forward_only: no gradients.

        Returns:
            Metrics and calibration sums of the whole mini-batch, over micro-batches and ranks.
        """
        reports = run_mini_batch(self.wrapped, micro_batches, loss, forward_only=forward_only)
        return self._reduce(reports)

    def finish_training_step(self) -> StepReport:
        """Clip and update."""
        return self.optimizer.step()

    def micro_batch(
        self,
        ids: Tensor,
        payload: Any,
        *,
        passes: tuple[tuple[bool, bool], ...],
        temperature: float = 1.0,
        entropy: bool = False,
        distance: str | None = None,
    ) -> MicroBatch:
        """A micro-batch that asks for the main head and all depths; see ``HeadRequest``."""
        targets = head_targets(ids, self.num_depths)
        return MicroBatch(
            ids, HeadRequest(targets, passes, temperature, entropy, distance), payload
        )

    def _reduce(self, reports: list[LossReport]) -> LossReport:
        names = sorted(reports[0].metrics)
        rows = [[r.metrics[n].double() for n in names] for r in reports]
        device = self.layout.device
        total = torch.zeros(len(names), dtype=torch.float64, device=device)
        if names:
            total = torch.stack([torch.stack(row) for row in rows]).sum(0)
        sums = [r.calibration for r in reports if r.calibration is not None]
        if sums:
            total = torch.cat((total, sum(sums[1:], sums[0]).to_tensor().to(total)))
        self.layout.all_reduce_data_parallel(total)
        calibration = CalibrationSums.from_tensor(total[len(names) :]) if sums else None
        return LossReport(dict(zip(names, total, strict=False)), calibration)

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        assert self._reference is not None, "keep_reference() was not called"
        live = {name: parameter.data for name, parameter in self.model.named_parameters()}
        try:
            for name, parameter in self.model.named_parameters():
                parameter.data = self._reference[name]
            yield
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.data = live[name]


def _keep_logprobs(outputs: HeadOutputs, _payload: Any) -> tuple[Tensor, Tensor]:
    return outputs.logprobs.sum(), outputs.logprobs.detach()
