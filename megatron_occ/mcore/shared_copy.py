"""A second module on the same weights, as constants: no gradient, no memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn


class SharedCopy:
    """A module built as ``source`` was, whose parameters are those of ``source``, detached.

    Unlike ``torch.func.functional_call`` this holds beyond the forward pass: activation recompute
    runs the module again in the backward pass, and must not find trainable weights there then.

    Args:
        source: owner of the weights; its tensors may be replaced over time.
        build: makes the module; called once, on the meta device.
    """

    def __init__(self, source: nn.Module, build: Callable[[], nn.Module]) -> None:
        with torch.device("meta"):
            self.module = build()
        self._places = list(_places(self.module, source))
        for mine, owner, name in self._places:
            if name in owner._parameters:
                mine._parameters[name] = nn.Parameter(
                    owner._parameters[name].detach(), requires_grad=False
                )

    def refresh(self) -> nn.Module:
        """The module on the source's present weights and buffers."""
        for mine, owner, name in self._places:
            if name in owner._parameters:
                mine._parameters[name].data = owner._parameters[name].data
            else:
                mine._buffers[name] = owner._buffers[name]
        return self.module


def _places(copy: nn.Module, source: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, str]]:
    """(module of the copy, the source's, name in both) of each tensor."""
    for kind in ("_parameters", "_buffers"):
        for prefix, module in copy.named_modules():
            owner = source.get_submodule(prefix)
            for name, value in getattr(module, kind).items():
                if value is not None:
                    yield module, owner, name
