"""SwiGLU, RMSNorm and rotary embedding for the CPU, each one operation with its own gradient.

Written with single operations as Megatron has them, each makes a new tensor of the size of the
activations for every step, and keeps several of them for the backward pass. On the CPU that costs
more than the arithmetic. Here each pass allocates its result alone, and SwiGLU keeps its input and
nothing else.

SwiGLU and the rotation are called at the places where Megatron calls TransformerEngine's kernels.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional


class SwiGLU(MegatronModule):
    """silu(gate) * up of [..., gate | up]; built by Megatron's MLP in place of its activation."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        assert config.gated_linear_unit, "a gated activation"
        assert config.activation_func is functional.silu, config.activation_func

    def forward(self, joined: Tensor) -> Tensor:
        """[..., 2 f] to [..., f]."""
        return _SwiGLU.apply(joined)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, joined):  # noqa: ANN001, ANN205
        ctx.save_for_backward(joined)
        gate, up = joined.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        (joined,) = ctx.saved_tensors
        gate, up = joined.chunk(2, dim=-1)
        result = torch.empty_like(joined)
        to_gate, to_up = result.chunk(2, dim=-1)
        # the gate's half holds the gradient of silu(gate), then that of the gate
        torch.mul(grad, up, out=to_gate)
        torch.ops.aten.silu_backward.grad_input(to_gate, gate, grad_input=to_gate)
        torch.ops.aten.silu.out(gate, out=to_up)
        to_up.mul_(grad)
        return result


def rms_norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 1910.07467, eq. 4).

    16-bit values go to torch's function, which computes in fp32.
    """
    if values.dtype.itemsize < 4:
        return functional.rms_norm(values, weight.shape, weight, eps)
    return _RMSNorm.apply(values, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, weight, eps):  # noqa: ANN001, ANN205
        norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        scale = norm.square_().div_(values.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(values, weight, scale)
        return (values * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        values, weight, scale = ctx.saved_tensors
        normed = values * scale
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(0)
        # with n = x / rms: dx = (g w - n mean(g w n)) / rms
        mean = (product @ weight).div_(values.size(-1)).unsqueeze(-1)
        torch.mul(grad, weight, out=product).addcmul_(normed, mean, value=-1)
        return product.mul_(scale), grad_weight, None


def rotate(states: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of a padded batch (Su et al. 2104.09864, in halves).

    Args:
        states: [s, b, heads, d].
        angles: [s, 1, 1, r] with r <= d, the same in both halves; what is behind r stays.
        interleaved: must be False.
    """
    assert not interleaved, "pairs lie in halves"
    angles = angles[..., : angles.size(-1) // 2]
    return _Rotate.apply(states, angles.cos().to(states.dtype), angles.sin().to(states.dtype))


def rotate_packed(
    states: Tensor,
    bounds: Tensor,
    angles: Tensor,
    cp_size: int = 1,
    cp_rank: int = 0,
    interleaved: bool = False,
) -> Tensor:
    """The same for packed sequences, each with positions from 0.

    Args:
        states: [t, heads, d], this context-parallel rank's tokens.
        bounds: [n + 1] where each sequence begins and the last one ends, over all ranks.
        angles: [longest, 1, 1, r].
        cp_size: context-parallel ranks; one holds chunks r and 2 * cp - 1 - r of each sequence.
        cp_rank: this one.
        interleaved: must be False; newer versions of Megatron-Core give it.
    """
    positions = _packed_positions(bounds, cp_size, cp_rank)
    turned = rotate(states.unsqueeze(1), angles.index_select(0, positions), interleaved)
    return turned.squeeze(1)


def _packed_positions(bounds: Tensor, size: int, rank: int) -> Tensor:
    """Position of each of this rank's tokens in its sequence."""
    lengths = (bounds.diff() // size).long()
    starts = (bounds[:-1] // size).long().repeat_interleave(lengths)
    place = torch.arange(starts.numel(), device=bounds.device) - starts
    if size == 1:
        return place
    chunk = (lengths // 2).repeat_interleave(lengths)
    # the first chunk begins at rank * chunk, the second at (2 * size - 1 - rank) * chunk
    return place + torch.where(place < chunk, rank, 2 * size - 2 - rank) * chunk


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, cos, sin):  # noqa: ANN001, ANN205
        ctx.save_for_backward(cos, sin)
        return _rotated(states, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        # the transpose of a rotation turns back
        return _rotated(grad, *ctx.saved_tensors, -1), None, None


def _rotated(states: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = cos.size(-1)
    result = torch.empty_like(states, memory_format=torch.contiguous_format)
    first, second = states[..., :half], states[..., half : 2 * half]
    torch.mul(first, cos, out=result[..., :half]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=result[..., half : 2 * half]).addcmul_(first, sin, value=direction)
    if states.size(-1) > 2 * half:
        result[..., 2 * half :] = states[..., 2 * half :]
    return result
