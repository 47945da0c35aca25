"""Transformer layers of Megatron's model, run token by token over a cache."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from megatron_occ.mcore.inference.attention import (
    GroupedAttention,
    LatentAttention,
    gather_last,
    norm,
    norm_before,
    sum_over,
)
from megatron_occ.mcore.inference.cache import Tokens, write
from megatron_occ.mcore.inference.linear import Linear, tensor_of
from megatron_occ.mcore.inference.rounding import Rounding
from megatron_occ.mcore.layout import Layout, expert_sharing_group
from megatron_occ.mcore.routing import Choices, place_choices


class Company:
    """Ranks that share experts: a pass is one of all of them, with equally many tokens.

    Megatron's dispatcher for CPUs gathers as many tokens from each: a rank with fewer fills up.

    Args:
        layout: this rank's place.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.shares = expert_sharing_group() is not None
        self.tokens = 0

    def meet(self, tokens: int) -> None:
        """Agree on the size of the pass to come."""
        if self.shares:
            self.tokens = self.largest([tokens])[0]

    def largest(self, values: list[int]) -> list[int]:
        """Maxima over the ranks."""
        return self.layout.largest_among_expert_ranks(values) if self.shares else values

    def fill(self, hidden: Tensor) -> Tensor:
        """[t, h] with rows of zeros up to the agreed number."""
        missing = self.tokens - hidden.size(0)
        return functional.pad(hidden, (0, 0, 0, missing)) if missing > 0 else hidden


class GatedMLP:
    """down(silu(gate(x)) * up(x)); gate and up lie one after the other in ``linear_fc1``."""

    def __init__(self, module: Any, group: ProcessGroup, rounding: Rounding | None) -> None:
        self.inner, self.down = (
            Linear(layer, rounding) for layer in (module.linear_fc1, module.linear_fc2)
        )
        self.gate, self.up = self.inner.weight.chunk(2)
        self.group = group

    def __call__(self, hidden: Tensor) -> Tensor:
        """[t, h] to [t, h]."""
        hidden = self.inner.read(hidden)
        inner = functional.silu(functional.linear(hidden, self.gate), inplace=True)
        inner.mul_(functional.linear(hidden, self.up))
        return sum_over(self.down(inner), self.group)


class ExpertsMLP:
    """Megatron's mixture of experts as it is.

    Args:
        module: Megatron's layer.
        company: see :class:`Company`.
        keeps: take down what the router chooses.
    """

    def __init__(self, module: MoELayer, company: Company, *, keeps: bool) -> None:
        self.module, self.company = module, company
        self.choices: Choices | None = None
        if keeps:
            (self.choices,) = place_choices(module)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[t, h] to [t, h]."""
        output, _ = self.module(self.company.fill(hidden).unsqueeze(1))
        return output.squeeze(1)[: hidden.size(0)]

    @property
    def experts(self) -> int:
        """How many of a token are kept."""
        return self.module.config.moe_router_topk if self.choices is not None else 0


class Layer:
    """A pre-norm transformer layer.

    Args:
        module: Megatron's layer.
        config: of the model.
        group: tensor-parallel ranks.
        company: see :class:`Company`.
        keeps: keep each token's experts in the cache.
        rounding: of products; None: none. Experts are Megatron's module, which knows none.
    """

    def __init__(
        self,
        module: Any,
        config: Any,
        group: ProcessGroup,
        company: Company,
        *,
        keeps: bool,
        rounding: Rounding | None,
    ) -> None:
        self.eps = config.layernorm_epsilon
        kind = LatentAttention if config.multi_latent_attention else GroupedAttention
        self.attention = kind(module.self_attention, config, group, rounding)
        if isinstance(module.mlp, MoELayer):
            self.mlp = ExpertsMLP(module.mlp, company, keeps=keeps)
        else:
            self.mlp = GatedMLP(module.mlp, group, rounding)
        # in latent attention several layers read the norm's output: it is never fused
        first = getattr(module.self_attention, "linear_qkv", None)
        second = getattr(module.mlp, "linear_fc1", None)
        self.before_attention = norm_before(first, module.input_layernorm)
        self.before_mlp = norm_before(second, module.pre_mlp_layernorm)

    def __call__(self, hidden: Tensor, tokens: Tokens, cache: list[Tensor]) -> Tensor:
        """[n * q, h] to [n * q, h]."""
        normed = norm(hidden, self.before_attention, self.eps)
        hidden = hidden + self.attention(normed, tokens, cache)
        output = hidden + self.mlp(norm(hidden, self.before_mlp, self.eps))
        if self.experts:
            chosen = self.mlp.choices.chosen[: hidden.size(0)]
            write(cache[-1], tokens.places, (1 + chosen).to(cache[-1].dtype))
        return output

    @property
    def experts(self) -> int:
        """How many of a token its cache keeps, behind what attention does."""
        return self.mlp.experts if isinstance(self.mlp, ExpertsMLP) else 0


class MTPModule:
    """One MTP depth: embedding of the next token and hidden state, projected, and a layer.

    Args:
        module: Megatron's MTP layer.
        inner: its transformer layer.
        config, group, company, keeps, rounding: see :class:`Layer`.
    """

    def __init__(
        self,
        module: Any,
        inner: Any,
        config: Any,
        group: ProcessGroup,
        company: Company,
        *,
        keeps: bool,
        rounding: Rounding | None,
    ) -> None:
        self.group, self.eps = group, config.layernorm_epsilon
        self.norms = [tensor_of(n) for n in (module.enorm, module.hnorm, module.final_layernorm)]
        self.projection = Linear(module.eh_proj, rounding)
        self.layer = Layer(inner, config, group, company, keeps=keeps, rounding=rounding)

    def __call__(
        self, embedded: Tensor, hidden: Tensor, tokens: Tokens, cache: list[Tensor]
    ) -> Tensor:
        """Embeddings and hidden states [n * q, h] to hidden states [n * q, h]."""
        of_embedding, of_hidden, final = self.norms
        both = norm(embedded, of_embedding, self.eps), norm(hidden, of_hidden, self.eps)
        joined = self.projection(torch.cat(both, dim=-1))
        output = self.layer(gather_last(joined, self.group), tokens, cache)
        return norm(output, final, self.eps)
