"""The trunk's states on both sides of its final norm, for MTP layers that read them before it.

Megatron-Core's decoder gives the states after its final norm alone, and MTP layers get those. The
MTP layers of MiMo read them before the norm (``model.mtp_reads=before``): both then leave the
decoder, one behind the other along the sequence. Where the MTP layers are on a later pipeline stage
they go there so, and are parted before that stage's decoder sees them: it takes the length of the
sequence from its input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class FinalNorm:
    """What MTP layers read of a decoder.

    Args:
        decoder: Megatron's block of the trunk's layers on this stage.
        reads: ``after`` or ``before`` the final norm.
        has_mtp: whether this stage has the MTP layers.
    """

    def __init__(self, decoder: nn.Module, reads: str, *, has_mtp: bool) -> None:
        # not registered a second time: this is no module
        self._decoder, self._module = decoder, getattr(decoder, "final_layernorm", None)
        self._reads_before = reads == "before"
        self._receives = self._reads_before and has_mtp and self._module is None
        self._received: Tensor | None = None
        self._is_open = False
        if self._reads_before and self._module is not None:
            self._module.register_forward_hook(self._keep_input)

    @contextmanager
    def for_depths(self, wanted: bool) -> Iterator[None]:
        """While it lasts the decoder's output is for :meth:`split`, if ``wanted``."""
        self._is_open = wanted and self._reads_before
        if self._is_open and self._receives:
            self._decoder.input_tensor, self._received = self._decoder.input_tensor.chunk(2)
        try:
            yield
        finally:
            self._is_open = False

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's output for the main head and for the MTP layers, [s, b, h] each.

        Args:
            hidden: made while MTP layers were wanted: [s, b, h], or [2s, b, h] with both.
        """
        if not self._reads_before:
            return hidden, hidden
        if self._receives:
            assert self._received is not None, "made while MTP layers were wanted"
            read, self._received = self._received, None
            return hidden, read
        after, before = hidden.chunk(2)
        return after, before

    @torch.no_grad()
    def of_kept(self, states: Tensor) -> Tensor:
        """The decoder's output for states [s, b, h] that MTP layers have read; no gradient."""
        if not self._reads_before:
            return states
        assert self._module is not None, "kept states come to the only stage"
        return self._module(states)

    def _keep_input(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        return torch.cat([output, args[0]]) if self._is_open else output
