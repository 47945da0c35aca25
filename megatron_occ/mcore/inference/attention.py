"""Attention of Megatron's layers over a cache with rows of different lengths.

Megatron's own modules take one position for a whole batch; these read the same weights and let each
row be at a place of its own. Numbers of heads and groups are those of this tensor-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from megatron_occ.mcore.inference.cache import Tokens, rotate, write
from megatron_occ.mcore.inference.linear import Linear, tensor_of
from megatron_occ.mcore.inference.rounding import Rounding

Shapes = list[tuple[int, ...]]


def norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension."""
    return torch.rms_norm(values, weight.shape, weight, eps)


def sum_over(values: Tensor, group: ProcessGroup) -> Tensor:
    """Sum of the parts that tensor-parallel ranks hold, in place."""
    if group.size() > 1:
        torch.distributed.all_reduce(values, group=group)
    return values


def gather_last(values: Tensor, group: ProcessGroup) -> Tensor:
    """Shares [..., d] of all tensor-parallel ranks, [..., ranks * d]."""
    if group.size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(group.size())]
    torch.distributed.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def norm_before(linear: Any, module: Any) -> Tensor | None:
    """Weight of the norm in front of a linear layer: fused into it, or a module of its own."""
    fused = tensor_of(linear, "layer_norm_weight")
    return fused if fused is not None else tensor_of(module)


def epsilon_before(linear: Any, module: Any, usual: float) -> float:
    """Epsilon of the norm in front of a linear layer; the usual one where there is no norm."""
    fused = getattr(linear, "eps", None)
    return fused if fused is not None else getattr(module, "eps", usual)


class GroupedAttention:
    """Multi-head and grouped-query attention.

    Args:
        module: Megatron's self-attention.
        config: of the model.
        group: tensor-parallel ranks.
        rounding: of products; None: none.
    """

    def __init__(
        self, module: Any, config: Any, group: ProcessGroup, rounding: Rounding | None
    ) -> None:
        self.group, self.eps, self.width = group, config.layernorm_epsilon, config.kv_channels
        self.groups = config.num_query_groups // group.size()
        self.share = config.num_attention_heads // config.num_query_groups
        self.qkv, self.out = (
            Linear(layer, rounding) for layer in (module.linear_qkv, module.linear_proj)
        )
        self.q_norm, self.k_norm = tensor_of(module.q_layernorm), tensor_of(module.k_layernorm)
        # key and value of a group side by side, as the projection gives them: one write
        self.cached: Shapes = [(self.groups, 2, self.width)]

    def __call__(self, hidden: Tensor, tokens: Tokens, cache: list[Tensor]) -> Tensor:
        """[n * q, h] to [n * q, h]; the tokens' keys and values are in the cache afterwards."""
        mixed = self.qkv(hidden)
        # of each group its queries, then key, then value
        mixed = mixed.view(-1, self.groups, self.share + 2, self.width)
        mixed = rotate(self._normed(mixed), tokens)
        write(cache[0], tokens.places, mixed[:, :, -2:])
        context = self._attend(mixed[:, :, :-2], tokens, cache[0])
        return sum_over(self.out(context), self.group)

    def _normed(self, mixed: Tensor) -> Tensor:
        """Queries and keys under norms of their own, where the model has them."""
        if self.q_norm is None:
            return mixed
        query, key, value = mixed.split((self.share, 1, 1), dim=2)
        query, key = norm(query, self.q_norm, self.eps), norm(key, self.k_norm, self.eps)
        return torch.cat((query, key, value), dim=2)

    def _attend(self, query: Tensor, tokens: Tokens, cache: Tensor) -> Tensor:
        n, q = tokens.rows, tokens.each
        query = query.reshape(n, q, self.groups, self.share, self.width)
        if tokens.is_causal:
            # heads of a group are neighbours, as grouped-query attention wants them
            heads = query.flatten(2, 3).transpose(1, 2)
            key, value = cache[:n, :q].transpose(1, 2).unbind(3)
            context = functional.scaled_dot_product_attention(
                heads, key, value, is_causal=q > 1, enable_gqa=self.share > 1
            )
            return context.transpose(1, 2).reshape(n * q, -1)
        return tokens.attend(query, cache).reshape(n * q, -1)


class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, 2405.04434) with the up-projections absorbed.

    The cache holds the compressed key/value and the key's rotary part; queries are taken to the
    compressed space, and contexts back from it, so that no key is ever unfolded.

    Args:
        module: Megatron's latent self-attention.
        config: of the model.
        group: tensor-parallel ranks.
        rounding: of products; None: none.
    """

    def __init__(
        self, module: Any, config: Any, group: ProcessGroup, rounding: Rounding | None
    ) -> None:
        self.group = group
        self.eps = epsilon_before(
            module.linear_kv_up_proj, module.kv_layernorm, config.layernorm_epsilon
        )
        self.heads = config.num_attention_heads // group.size()
        self.rank, self.rotary = config.kv_lora_rank, config.qk_pos_emb_head_dim
        self.plain, self.q_rank = config.qk_head_dim, config.q_lora_rank
        self.scale = module.softmax_scale
        self.kv_down = Linear(module.linear_kv_down_proj, rounding)
        self.kv_norm = norm_before(module.linear_kv_up_proj, module.kv_layernorm)
        self.kv_up = Linear(module.linear_kv_up_proj, rounding)
        # [heads, plain + value, rank]
        up = self.kv_up.weight.view(self.heads, -1, self.rank)
        self.key_up, self.value_up = up[:, : self.plain], up[:, self.plain :]
        self.q_down, self.q_norm = None, None
        if self.q_rank is None:
            self.q_up = Linear(module.linear_q_proj, rounding)
        else:
            self.q_down = Linear(module.linear_q_down_proj, rounding)
            self.q_up = Linear(module.linear_q_up_proj, rounding)
            self.q_norm = norm_before(module.linear_q_up_proj, module.q_layernorm)
        self.out = Linear(module.linear_proj, rounding)
        self.cached: Shapes = [(self.rank + self.rotary,)]

    def __call__(self, hidden: Tensor, tokens: Tokens, cache: list[Tensor]) -> Tensor:
        """[n * q, h] to [n * q, h]; the tokens' latents are in the cache afterwards."""
        compressed, key = self.kv_down(hidden).split([self.rank, self.rotary], dim=-1)
        if self.kv_norm is not None:
            compressed = norm(compressed, self.kv_norm, self.eps)
        turned = rotate(_by_halves(key)[:, None, None], tokens)[:, 0, 0]
        # what the absorbed up-projections read
        compressed = self.kv_up.read(compressed)
        write(cache[0], tokens.places, torch.cat((compressed, turned), dim=-1))
        query, turned = self._query(hidden).split([self.plain, self.rotary], dim=-1)
        query = torch.einsum("thd,hdr->thr", query, self.key_up)
        turned = rotate(_by_halves(turned).unsqueeze(1), tokens).squeeze(1)
        context = self._attend(torch.cat((query, turned), dim=-1), tokens, cache[0])
        context = torch.einsum("thr,hdr->thd", context, self.value_up)
        return sum_over(self.out(context.flatten(1)), self.group)

    def _query(self, hidden: Tensor) -> Tensor:
        """[n * q, heads, plain + rotary]."""
        if self.q_down is not None:
            hidden = self.q_down(hidden)
            if hidden.size(-1) != self.q_rank:
                hidden = gather_last(hidden, self.group)
            if self.q_norm is not None:
                hidden = norm(hidden, self.q_norm, self.eps)
        mixed = self.q_up(hidden)
        return mixed.view(mixed.size(0), self.heads, -1)

    def _attend(self, query: Tensor, tokens: Tokens, cache: Tensor) -> Tensor:
        """[n * q, heads, rank + rotary] to [n * q, heads, rank]: one key for all heads."""
        n, q = tokens.rows, tokens.each
        if tokens.is_causal:
            heads = query.view(n, q, self.heads, -1).transpose(1, 2)
            # a view of the key for each head: folded queries would need a mask, heads * q * q large
            latent = cache[:n, :q].unsqueeze(1).expand(-1, self.heads, -1, -1)
            context = functional.scaled_dot_product_attention(
                heads, latent, latent, is_causal=q > 1, scale=self.scale
            ).transpose(1, 2)
        else:
            # the key is the value too, its rotary part left out afterwards
            latent = cache.view(*cache.shape[:2], 1, 1, -1)
            context = tokens.attend(query.view(n, q, 1, self.heads, -1), latent, self.scale)
        return context[..., : self.rank].reshape(n * q, self.heads, self.rank)


def _by_halves(values: Tensor) -> Tensor:
    """Pairs of neighbours to pairs across halves: latent attention turns (x0, x1), (x2, x3) ..."""
    return torch.cat((values[..., 0::2], values[..., 1::2]), dim=-1)
