"""The updates of this project in plain PyTorch: loss, micro-batches, gradient clips and AdamW."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.plain_model import PlainGPT, from_megatron
from megatron_occ.config.schema import Config
from megatron_occ.rl.batch import RolloutBatch


class PlainTrainer:
    """RL updates (preset ``policy``) and pretraining updates of the plain model.

    Args:
        config: the run's configuration.
        vocab_size: token ids.
        weights: Megatron-Core's, by name.
        device: of weights and data.
        dtype: of weights, gradients and moments.
    """

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        weights: dict[str, Tensor],
        *,
        device: torch.device = torch.device("cpu"),  # noqa: B008  a constant
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, given = config, config.rl.optimizer
        with device:
            self.model = PlainGPT(config.model, vocab_size, config.mtp.num_layers)
        self.model.load_state_dict(from_megatron(weights, config.model))
        self.model.to(device, dtype)
        self.head = list(self.model.mtp.parameters())
        self.trunk = [p for n, p in self.model.named_parameters() if not n.startswith("mtp.")]
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=given.lr,
            betas=(given.beta1, given.beta2),
            eps=given.eps,
            weight_decay=given.weight_decay,
            fused=device.type == "cuda" or None,
        )

    def load(self, batch: RolloutBatch, pretraining: tuple[Tensor, Tensor]) -> None:
        """Take the data; ``pretraining`` are ids and token mask [b, s]."""
        self.batch, self.pretraining = batch, pretraining

    def gradients(self) -> float:
        """Forward and backward of the RL loss; returns the loss of the whole batch."""
        batch = self.batch
        constants = (batch.ids, batch.response_mask, batch.old_logprobs, batch.advantages)
        size = self.config.rl.micro_batch_size
        weight = self.config.mtp.trunk.weight
        return self._accumulate(constants, size, weight, self._policy_loss)

    def update(self) -> None:
        """One RL update."""
        self.gradients()
        self._step()

    def pretrain(self) -> None:
        """One pretraining update."""
        settings = self.config.pretrain
        size, weight = settings.micro_batch_size, settings.mtp_weight
        self._accumulate(self.pretraining, size, weight, lambda logprobs, _depth: -logprobs)
        self._step()

    def _accumulate(
        self, constants: tuple[Tensor, ...], size: int, mtp_weight: float, loss: Callable
    ) -> float:
        self.optimizer.zero_grad()
        depths = range(1 + self.config.mtp.num_layers)
        counts = [float(constants[1][:, 1 + d :].sum()) for d in depths]
        total = 0.0
        for ids, mask, *others in zip(*(c.split(size) for c in constants), strict=True):
            losses = [
                (loss(logprobs, d, *others) * mask[:, 1 + d :]).sum() / counts[d]
                for d, logprobs in enumerate(self.model(ids))
            ]
            value = losses[0]
            if losses[1:]:
                value = value + mtp_weight * sum(losses[1:]) / len(losses[1:])
            value.backward()
            total += value.item()
        return total

    def _policy_loss(self, logprobs: Tensor, depth: int, old: Tensor, advantages: Tensor) -> Tensor:
        settings = self.config.rl.loss
        # old log-probs are those of the main head about the same token
        ratio = (logprobs - old[:, depth:-1]).exp()
        clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        advantages = advantages.unsqueeze(1)
        return torch.maximum(-advantages * ratio, -advantages * clipped)

    def _step(self) -> None:
        for parameters, limit in (
            (self.trunk, self.config.rl.optimizer.clip_grad),
            (self.head, self.config.mtp.head.clip_grad),
        ):
            torch.nn.utils.clip_grad_norm_(parameters, limit)
        self.optimizer.step()
