"""Core attention for machines without a CUDA device: padded, packed, over a split context."""

from __future__ import annotations

import itertools
import math

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional


class CoreAttention(MegatronModule):
    """Scaled dot-product attention over torch's CPU kernels, causal by position.

    A query block shorter than the keys is the end of the sequence: decoding with a KV cache, one
    token or several at a time, needs no mask of its own.

    Under context parallelism a sequence is cut into 2 * cp chunks and rank r holds chunks r and
    2 * cp - 1 - r, one after the other: the order that Megatron's batches and rotary embedding
    have. In a packed batch each sequence is cut on its own. Keys and values are gathered, queries
    stay.

    Args:
        config: Megatron's configuration.
        attn_mask_type: must be causal.
        softmax_scale: factor of the scores; None: 1 / sqrt(width of a key).
        k_channels: width of a query and a key of one head; None: ``config.kv_channels``.
        v_channels: width of a value of one head, taken from the value itself.
        pg_collection: its ``cp`` is the context-parallel group; None: Megatron's global one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: object | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal, attn_mask_type
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert dropout == 0, dropout
        assert config.window_size is None, config.window_size
        width = k_channels or config.kv_channels
        self.softmax_scale = 1.0 / math.sqrt(width) if softmax_scale is None else softmax_scale
        self.cp_group = None
        if config.context_parallel_size > 1:
            given = getattr(pg_collection, "cp", None)
            self.cp_group = given or parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [sq, b, heads, d]; key: [sk, b, groups, d]; value: [sk, b, groups, dv], with
                sk >= sq; packed: [t, heads, d], [t, groups, d] and [t, groups, dv]. Under context
                parallelism this rank's share, sq = sk = s / cp or t / cp.
            attention_mask: must be None, the mask is causal.
            packed_seq_params: lengths of packed sequences. The padded ones count where they are
                given: alignment padding comes after a sequence, where no token of it looks. Each
                is a multiple of 2 * cp.

        Returns:
            [sq, b, heads * dv], packed [t, heads * dv].
        """
        assert attention_mask is None
        assert attention_bias is None
        if packed_seq_params is None:
            lengths = [key.size(0)]
        else:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            lengths = self._local_lengths(packed_seq_params)
            assert sum(lengths) == query.size(0) == key.size(0), (lengths, query.shape)
        attend = _suffix_attention if self.cp_group is None else self._attend_split
        if len(lengths) == 1:
            context = attend(query, key, value, self.softmax_scale)
        else:
            sequences = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
            context = torch.cat([attend(*s, self.softmax_scale) for s in sequences])
        context = context.flatten(2)
        return context if packed_seq_params is None else context.squeeze(1)

    def _local_lengths(self, packed: PackedSeqParams) -> list[int]:
        """Tokens of each packed sequence on this rank."""
        assert packed.qkv_format == "thd", packed.qkv_format
        assert packed.local_cp_size is None, "one context-parallel size for all sequences"
        bounds = packed.cu_seqlens_q_padded
        bounds = packed.cu_seqlens_q if bounds is None else bounds
        size = 1 if self.cp_group is None else self.cp_group.size()
        lengths = [end - start for start, end in itertools.pairwise(bounds.tolist())]
        assert size == 1 or all(n % (2 * size) == 0 for n in lengths), (lengths, size)
        return [n // size for n in lengths]

    def _attend_split(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of this rank's two chunks to all keys of one sequence before them."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        assert query.size(0) == key.size(0), "no KV cache under context parallelism"
        both = _GatherContext.apply(torch.cat([key, value], dim=-1), self.cp_group)
        key, value = in_sequence_order(both).split([key.size(-1), value.size(-1)], dim=-1)
        chunk = query.size(0) // 2
        ends = [(part + 1) * chunk for part in (rank, 2 * size - 1 - rank)]
        return torch.cat(
            [
                _suffix_attention(q, key[:end], value[:end], scale)
                for q, end in zip(query.split(chunk), ends, strict=True)
            ]
        )


def in_sequence_order(shares: Tensor) -> Tensor:
    """Put the shares of all ranks back in order.

    Args:
        shares: [cp, s / cp, ...], by rank: chunks r and 2 * cp - 1 - r of rank r.

    Returns:
        [s, ...].
    """
    first, second = shares.chunk(2, dim=1)
    return torch.cat([first.flatten(0, 1), second.flip(0).flatten(0, 1)])


class _GatherContext(torch.autograd.Function):
    """Shares of all ranks, [cp, ...]; the gradient of a share is summed over ranks.

    torch's own differentiable all-gather takes ranks of the group for global ranks over gloo.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        shares = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(shares, x, group=group)
        return torch.stack(shares)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient[ctx.group.rank()], None


def _suffix_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of the last sq of sk positions.

    Args:
        query: [sq, b, heads, d]; key: [sk, b, groups, d]; value: [sk, b, groups, dv].

    Returns:
        [sq, b, heads, dv].
    """
    sq, sk = query.size(0), key.size(0)
    # [s, b, n, d] -> [b, n, s, d]
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    context = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_suffix_mask(sq, sk, query.device) if 1 < sq < sk else None,
        is_causal=sq == sk and sq > 1,
        scale=scale,
        enable_gqa=query.size(1) != key.size(1),
    )
    return context.permute(2, 0, 1, 3)


def _suffix_mask(sq: int, sk: int, device: torch.device) -> Tensor:
    """Causal mask of the last ``sq`` of ``sk`` positions, True where attention is allowed."""
    return torch.ones(sq, sk, dtype=torch.bool, device=device).tril(sk - sq)
