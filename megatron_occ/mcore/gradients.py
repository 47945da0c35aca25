"""Gradients as vectors: copies, inner products by group of layers, and weighted sums.

A gradient is taken where the optimizer reads it: reduced over ranks, in fp32, and with the
distributed optimizer only this rank's share of it. Inner products count each parameter once over
all ranks that hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor
from torch.distributed import all_reduce

from megatron_occ.mcore.model import OCCGPTModel
from megatron_occ.mcore.moments import moments_of
from megatron_occ.mcore.optimizer_state import main_parameters

METRICS = ("euclidean", "adam")
EMBEDDING, OUTPUT = "embedding", "output"
# entries of a parameter that are multiplied at once
BLOCK = 2**22


@dataclass(frozen=True)
class Gradient:
    """One tensor for each parameter of the optimizer on this rank; None: not part of it."""

    parts: list[Tensor | None]


@dataclass(frozen=True)
class _Place:
    """A parameter as the optimizer holds it.

    Args:
        main: what the optimizer updates: the parameter, its fp32 copy, or a share of that.
        optimizer: number of the chained optimizer that it belongs to.
        group: number of its group of layers; None: of the MTP head.
        is_owned: this rank counts it.
    """

    main: Tensor
    optimizer: int
    group: int | None
    is_owned: bool


class GradientSpace:
    """The gradients of a model's trunk, in groups: embedding, each decoder layer, output.

    ``output`` is the final norm and, if it is not the embedding, the output layer.

    Args:
        chunks: of the model on this rank.
        optimizer: of these chunks.
        num_layers: decoder layers of the whole model.
        beta2: Adam's second decay.
        eps: Adam's epsilon.
        updates: tells how many the optimizer has made.
    """

    def __init__(
        self,
        chunks: Sequence[OCCGPTModel],
        optimizer: ChainedOptimizer,
        *,
        num_layers: int,
        beta2: float,
        eps: float,
        updates: Callable[[], int],
    ) -> None:
        self.groups = [EMBEDDING, *(f"layer {n}" for n in range(1, num_layers + 1)), OUTPUT]
        self._optimizer, self._beta2, self._eps = optimizer, beta2, eps
        self._updates = updates
        groups = dict(_groups(chunks, num_layers))
        self._places = [
            _Place(main, number, groups.get(id(parameter)), _is_owned(main))
            for number, part in enumerate(optimizer.chained_optimizers)
            for parameter, main in main_parameters(part)
        ]
        self._device = next(chunks[0].parameters()).device

    def size(self) -> int:
        """Parameters of the trunk over all ranks, each counted once."""
        total = 0
        for number, part in enumerate(self._optimizer.chained_optimizers):
            mine = [p for p in self._places if p.optimizer == number and p.group is not None]
            count = torch.tensor(
                sum(place.main.numel() for place in mine if place.is_owned), device=self._device
            )
            all_reduce(count, group=part.get_grad_stats_parallel_group())
            total += int(count)
        return total

    def current(self) -> Gradient:
        """The trunk's gradient that the optimizer is about to use, not a copy of it."""
        parts = [None if p.group is None else p.main.grad for p in self._places]
        return Gradient(parts)

    def take(self, *, head: bool = False) -> Gradient:
        """A copy of the gradient in the buffers, which are free for another pass afterwards.

        Args:
            head: also that of the MTP head's own parameters.
        """
        self._optimizer.prepare_grads()
        taken = [
            place.main.grad.clone() if head or place.group is not None else None
            for place in self._places
        ]
        # else p.grad would stay an alias of the buffer, and the next pass would add to it twice
        self._optimizer.zero_grad()
        return Gradient(taken)

    def sum(self, gradients: Sequence[Gradient]) -> Gradient:
        """Of gradients that hold the same parameters, in the place of the first."""
        first, *others = gradients
        for other in others:
            for mine, part in zip(first.parts, other.parts, strict=True):
                if mine is not None:
                    mine.add_(part)
        return first

    def random_like(self, gradient: Gradient, seed: int) -> Gradient:
        """The trunk's gradient with the sign of each entry drawn at random; on one process.

        Its norm is the gradient's in Adam's metric as in the plain one.

        Args:
            gradient: see above; a part of the MTP head stays as it is.
            seed: of the signs.
        """
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for place, part in zip(self._places, gradient.parts, strict=True):
            if part is not None and place.group is not None:
                signs = torch.randint(0, 2, part.shape, generator=generator) * 2 - 1
                part = part * signs.to(part)
            parts.append(part)
        return Gradient(parts)

    def add(self, gradients: Sequence[Gradient], weights: Tensor) -> None:
        """Add weighted gradients to those that the optimizer is about to use.

        Args:
            gradients: n of them.
            weights: [n, G] by group, or [n, 1] for all, the MTP head included.
        """
        for gradient, row in zip(gradients, weights.tolist(), strict=True):
            for place, part in zip(self._places, gradient.parts, strict=True):
                if part is None or place.main.grad is None:
                    continue
                assert len(row) == 1 or place.group is not None, "the head has no group's weight"
                place.main.grad.add_(part, alpha=row[place.group if len(row) > 1 else 0])

    def products(
        self, left: Sequence[Gradient], right: Sequence[Gradient], metric: str = "euclidean"
    ) -> Tensor:
        """Inner products over all ranks, [len(left), len(right), G], float64 on the CPU.

        Args:
            left: gradients.
            right: gradients.
            metric: ``euclidean``, or ``adam``: each product of two entries is divided by
                ``sqrt(v) + eps``, as Adam divides the entry of an update; v is the optimizer's
                second moment, bias-corrected (arXiv 1412.6980, algorithm 1).
        """
        assert metric in METRICS, metric
        total = torch.zeros(len(left), len(right), len(self.groups), dtype=torch.float64)
        for number, part in enumerate(self._optimizer.chained_optimizers):
            found = total.new_zeros(total.shape, device=self._device)
            for index, place in enumerate(self._places):
                if place.optimizer != number or place.group is None or not place.is_owned:
                    continue
                for span in _blocks(place.main.numel()):
                    rows = _stacked(left, index, span)
                    columns = rows if right is left else _stacked(right, index, span)
                    if metric == "adam":
                        rows = rows / self._denominator(part, place.main, span)
                    found[:, :, place.group] += rows @ columns.T
            all_reduce(found, group=part.get_grad_stats_parallel_group())
            total += found.cpu()
        return total

    @property
    def has_adam_metric(self) -> bool:
        """Whether the optimizer has made an update, on whose moments the metric stands."""
        return self._updates() > 0

    def _denominator(self, part: MegatronOptimizer, main: Tensor, span: slice) -> Tensor:
        # with the moments on the host it has to come here
        moment = moments_of(part, main)["exp_avg_sq"].flatten()[span].to(main.device).double()
        root = (moment / (1 - self._beta2 ** self._updates())).sqrt() + self._eps
        # an entry that has never had a gradient has no scale: it would be all of the product
        return root.where(moment > 0, torch.inf)


def _blocks(entries: int) -> Iterator[slice]:
    """Spans of a flat parameter: its products in float64 need little memory beside it."""
    for start in range(0, entries, BLOCK):
        yield slice(start, start + BLOCK)


def _stacked(gradients: Sequence[Gradient], index: int, span: slice) -> Tensor:
    """A span of one parameter's part of each gradient, [n, entries] in float64."""
    parts = [gradient.parts[index] for gradient in gradients]
    return torch.stack([part.flatten()[span] for part in parts]).double()


def _is_owned(main: Tensor) -> bool:
    """Whether this rank counts a parameter that several may hold."""
    return param_is_not_shared(main) and param_is_not_tensor_parallel_duplicate(main)


def _groups(chunks: Sequence[OCCGPTModel], num_layers: int) -> Iterator[tuple[int, int]]:
    """(id of a trunk parameter, number of its group)."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if getattr(parameter, "is_mtp_head", False):
                continue
            if name.startswith("embedding."):
                yield id(parameter), 0
            elif name.startswith("decoder.layers."):
                layer = chunk.decoder.layers[int(name.split(".")[2])]
                yield id(parameter), layer.layer_number
            else:
                yield id(parameter), num_layers + 1
