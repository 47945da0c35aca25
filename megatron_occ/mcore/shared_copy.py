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
        rename: from a parameter's name in the copy to its name in the source.
    """

    def __init__(
        self,
        source: nn.Module,
        build: Callable[[], nn.Module],
        rename: Callable[[str], str] = lambda name: name,
    ) -> None:
        with torch.device("meta"):
            self.module = build()
        self._pairs = list(_pairs(self.module, source, rename))
        for mine, name, owner, owned in self._pairs:
            if owned in owner._parameters:
                mine._parameters[name] = nn.Parameter(
                    owner._parameters[owned].detach(), requires_grad=False
                )

    def refresh(self) -> nn.Module:
        """The module on the source's present weights and buffers."""
        for mine, name, owner, owned in self._pairs:
            if owned in owner._parameters:
                mine._parameters[name].data = owner._parameters[owned].data
            else:
                mine._buffers[name] = owner._buffers[owned]
        return self.module


def _pairs(
    copy: nn.Module, source: nn.Module, rename: Callable[[str], str]
) -> Iterator[tuple[nn.Module, str, nn.Module, str]]:
    """(module of the copy, name in it, module of the source, name in it) of each tensor."""
    for kind in ("_parameters", "_buffers"):
        for prefix, module in copy.named_modules():
            for name, value in getattr(module, kind).items():
                if value is None:
                    continue
                full = rename(f"{prefix}.{name}" if prefix else name)
                owner, _, owned = full.rpartition(".")
                yield module, name, source.get_submodule(owner), owned
