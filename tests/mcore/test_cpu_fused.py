"""SwiGLU and rotary embedding of the CPU back end against naive computations, with gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from torch.nn import functional

from megatron_occ.mcore.cpu.fused import SwiGLU, rms_norm, rotate, rotate_packed


def values(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return numbers.requires_grad_()


def swiglu():
    config = SimpleNamespace(gated_linear_unit=True, activation_func=functional.silu)
    return SwiGLU(config)


def angles(length, width):
    """[length, 1, 1, width] as Megatron has them: both halves alike."""
    half = torch.outer(torch.arange(length).double(), 10.0 ** -torch.arange(width // 2).double())
    return torch.cat((half, half), dim=-1)[:, None, None]


def turned(vector, angle):
    """A vector [d] of which the first r entries are turned by angles [r], by complex numbers."""
    half = angle.numel() // 2
    turn = torch.polar(torch.ones(half).double(), angle[:half])
    pairs = torch.complex(vector[:half], vector[half : 2 * half]) * turn
    return torch.cat((pairs.real, pairs.imag, vector[2 * half :]))


def test_swiglu_and_its_gradient():
    joined = values(3, 2, 8)
    gate, up = joined.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu()(joined), gate * gate.sigmoid() * up)
    assert torch.autograd.gradcheck(swiglu(), (joined,))


def test_swiglu_leaves_its_input_alone():
    joined = values(3, 2, 8)
    before = joined.detach().clone()
    swiglu()(joined).sum().backward()
    assert torch.equal(joined, before)


def test_rms_norm_and_its_gradients():
    inputs, weight = values(3, 2, 8), values(8, seed=1)
    expected = inputs / (inputs.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(inputs, weight, 1e-5), expected)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (inputs, weight))
    narrow, of = (tensor.detach().bfloat16() for tensor in (inputs, weight))
    torch.testing.assert_close(
        rms_norm(narrow, of, 1e-5), functional.rms_norm(narrow, (8,), of, 1e-5), rtol=0, atol=0
    )


@pytest.mark.parametrize("width", [6, 4])
def test_a_padded_batch_is_turned_by_position(width):
    states, by = values(5, 2, 3, 6), angles(5, width)
    expected = torch.stack(
        [
            torch.stack([torch.stack([turned(v, by[t, 0, 0]) for v in row]) for row in states[t]])
            for t in range(5)
        ]
    )
    torch.testing.assert_close(rotate(states, by), expected)
    assert torch.autograd.gradcheck(lambda x: rotate(x, by), (states,))


def test_a_slice_of_a_larger_tensor_is_turned_as_a_copy_of_it():
    joined, by = values(5, 2, 3, 18), angles(5, 6)
    part = joined[..., 6:12]
    torch.testing.assert_close(rotate(part, by), rotate(part.clone(), by), rtol=0, atol=0)


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_packed_sequences_have_positions_of_their_own(size, rank):
    lengths = [4, 8, 12, 4]
    bounds = torch.tensor([0, 4, 12, 24, 28], dtype=torch.int32)
    states, by = values(sum(lengths) // size, 3, 6), angles(max(lengths), 6)
    group = SimpleNamespace(size=lambda: size, rank=lambda: rank)
    expected = rope_utils._apply_rotary_pos_emb_thd(states, bounds, by, cp_group=group)
    torch.testing.assert_close(rotate_packed(states, bounds, by, size, rank), expected)
    if size == 1:
        sequence = states[4:12].unsqueeze(1)
        whole = rotate_packed(states, bounds, by)
        torch.testing.assert_close(whole[4:12].unsqueeze(1), rotate(sequence, by[:8]))
