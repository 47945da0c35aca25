"""The record of an audit, mini-batch by mini-batch: of any module in one process, or in parts."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from megatron_occ.audit.signals import binned, tail
from megatron_occ.losses.gradients import (
    Gradient,
    adam_denominators,
    gradient_products,
    trunk_gradients,
)


def products_of_sample(
    found: Tensor, others: Sequence[int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`same` and `cross` of a sample in one metric.

    Args:
        found: [1+S, n (1+S), G] inner products of a mini-batch's gradients, RL's first, with
            themselves and then with those of n - 1 earlier mini-batches.
        others: numbers of these.
    """
    own, *parts = found.split(found.size(0), dim=1)
    cross = [
        {"other": other, **_row(part), "c_back": part[1:, 0].tolist()}
        for other, part in zip(others, parts, strict=True)
    ]
    return _row(own), cross


def _row(products: Tensor) -> dict[str, list]:
    """<g_0, g_0'>, <g_0, g_s'> and <g_s, g_s'> of [1+S, 1+S, G]."""
    diagonal = torch.stack([products[s, s] for s in range(1, products.size(0))])
    return {
        "rl": products[0, 0].tolist(),
        "c": products[0, 1:].tolist(),
        "v2": diagonal.tolist(),
    }


class AuditRecorder:
    """Audits a model of your own: measures mini-batches, and makes the record for ``summarize``.

    Each mini-batch has to be drawn anew, independently of the others, at the same weights: an
    update by one gradient shifts the next, whose product with it then has its noise in it.
    The proxies of the paper are not measured: they need a policy that has moved.

    Args:
        groups: name -> parameters of a part of the trunk, which main and MTP head share. Groups
            "embedding" and "layer N" also stand in for the whole among the proxies.
        optimizer: Adam or AdamW with some updates made, for its metric too; None: Euclidean alone.
        window: earlier mini-batches that each is paired with; their gradients are kept.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[Tensor]],
        *,
        optimizer: Optimizer | None = None,
        window: int,
    ) -> None:
        self._names, self._optimizer, self._window = list(groups), optimizer, window
        self._parameters = [p for part in groups.values() for p in part]
        self._groups = [number for number, part in enumerate(groups.values()) for _ in part]
        self._kept: deque[tuple[int, list[Gradient]]] = deque(maxlen=window)
        self._metrics = ["euclidean"] if optimizer is None else ["euclidean", "adam"]
        self._signals: list[str] = []
        self._samples: list[dict[str, Any]] = []

    def measure(
        self, rl_loss: Tensor, signals: Mapping[str, tuple[Tensor, Tensor]], mask: Tensor
    ) -> None:
        """Take in a mini-batch.

        Args:
            rl_loss: policy loss of the main head, a mean over the mini-batch.
            signals: name -> the loss of an MTP signal with weight 1, and the log-probs [b, s] that
                it was computed from. The same names each time.
            mask: [b, s] of the tokens that losses are about.

        Raises:
            ValueError: a loss does not reach the trunk or its log-probs, or is not finite in its
                gradient; signals have other names than before.
        """
        names = list(signals)
        if self._samples and names != self._signals:
            raise ValueError(f"signals are {names}, were {self._signals}: give the same each time")
        losses = {"RL": rl_loss, **{name: loss for name, (loss, _) in signals.items()}}
        gradients = trunk_gradients(list(losses.values()), self._parameters)
        for name, gradient in zip(losses, gradients, strict=True):
            if not all(part.isfinite().all() for part in gradient):
                raise ValueError(f"gradient of {name!r} is not finite: leave the mini-batch out")
        keep = mask.bool()
        sample = {
            "round": len(self._samples),
            "mini_batch": 0,
            "sequences": int(keep.any(dim=1).sum()),
            "tokens": int(keep.sum()),
            "proxies": {name: [None] * len(names) for name in ("logprob", "released")},
            "tails": [_tail(name, *signal, keep) for name, signal in signals.items()],
        }
        sample |= self._products(gradients)
        self._kept.append((len(self._samples), gradients))
        self._samples.append(sample)
        self._signals = names

    def record(self, checkpoint: str, task: str, *, updates: int = 0, seed: int = 0) -> dict:
        """The record: see :mod:`megatron_occ.audit.record`.

        Args:
            checkpoint: name of what was measured.
            task: name of what it was measured on.
            updates: of RL behind it.
            seed: of the sampling.
        """
        return {
            "checkpoint": checkpoint,
            "task": task,
            "updates": updates,
            "parameters": sum(parameter.numel() for parameter in self._parameters),
            "world_size": 1,
            "seed": seed,
            "window": self._window,
            "signals": [{"name": name, "depth": 1} for name in self._signals],
            "groups": self._names,
            "metrics": self._metrics,
            "samples": list(self._samples),
        }

    def _products(self, gradients: list[Gradient]) -> dict[str, Any]:
        others = [gradient for _, kept in self._kept for gradient in kept]
        numbers = [number for number, _ in self._kept]
        found: dict[str, Any] = {"same": {}, "cross": {}}
        for metric in self._metrics:
            products = gradient_products(
                gradients,
                [*gradients, *others],
                groups=self._groups,
                denominators=self._denominators(metric),
            )
            found["same"][metric], found["cross"][metric] = products_of_sample(products, numbers)
        return found

    def _denominators(self, metric: str) -> list[Tensor] | None:
        if metric == "euclidean" or self._optimizer is None:
            return None
        return adam_denominators(self._optimizer, self._parameters)


def _tail(name: str, loss: Tensor, logprobs: Tensor, keep: Tensor) -> dict[str, float]:
    """Concentration of the squared weights of tokens, the derivatives by their log-probs."""
    weights = None
    if logprobs.requires_grad:
        (weights,) = torch.autograd.grad(loss, logprobs, retain_graph=True, allow_unused=True)
    if weights is None:
        raise ValueError(f"the loss of {name!r} was not computed from the log-probs given with it")
    return tail(binned(weights.double().square(), keep))
