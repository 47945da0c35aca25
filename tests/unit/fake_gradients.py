"""Gradients of the fake policy as vectors, as ``mcore.gradients.GradientSpace`` has them."""

from __future__ import annotations

import torch


class FakeGradients:
    """Three groups of one matrix each; Adam's metric divides by the moment ``squares``."""

    groups = ("embedding", "layer 1", "output")

    def __init__(self, actor):
        self.actor = actor
        self.squares = 4.0

    @property
    def has_adam_metric(self):
        return self.actor.version > 0

    @property
    def trunk(self):
        model = self.actor.model
        return [model.embedding, model.trunk, model.output]

    def current(self):
        return [parameter.grad for parameter in self.trunk]

    def take(self, head):
        parameters = self.trunk + (list(self.actor.model.heads) if head else [])
        return [parameter.grad.clone() for parameter in parameters]

    def sum(self, gradients):
        first, *others = gradients
        for other in others:
            for mine, part in zip(first, other, strict=True):
                mine += part
        return first

    def random_like(self, gradient, seed):
        generator = torch.Generator().manual_seed(seed)
        flipped = [
            x * (torch.randint(0, 2, x.shape, generator=generator) * 2 - 1) for x in gradient
        ]
        return flipped[:3] + list(gradient[3:])

    def add(self, gradients, weights):
        everything = [*self.trunk, *self.actor.model.heads]
        for gradient, row in zip(gradients, weights.tolist(), strict=True):
            for index, part in enumerate(gradient):
                everything[index].grad += part * row[index if len(row) > 1 else 0]

    def products(self, left, right, metric):
        scale = self.squares**-0.5 if metric == "adam" else 1.0
        rows = [
            [[float((x * y).sum()) * scale for x, y in zip(a, b, strict=False)][:3] for b in right]
            for a in left
        ]
        return torch.tensor(rows, dtype=torch.float64)
