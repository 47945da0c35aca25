"""Source frame and token frame: targets, shifts, packed sequences."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_occ.losses import align_mtp_targets, shift_to_source, shift_to_tokens


def naive_targets(row: list[int], depth: int, lengths: list[int]) -> tuple[list[int], list[bool]]:
    """Each packed sequence by itself; what `lengths` leave over is padding."""
    targets, valid, start = [], [], 0
    for length in lengths:
        sequence = row[start : start + length]
        for t in range(length):
            inside = t + 1 + depth < length
            targets.append(sequence[t + 1 + depth] if inside else 0)
            valid.append(inside)
        start += length
    padding = len(row) - start
    return targets + [0] * padding, valid + [False] * padding


def test_targets_by_hand() -> None:
    ids = torch.tensor([[11, 12, 13, 14]])
    expected = {
        0: ([12, 13, 14, 0], [True, True, True, False]),
        1: ([13, 14, 0, 0], [True, True, False, False]),
        3: ([0, 0, 0, 0], [False] * 4),
        9: ([0, 0, 0, 0], [False] * 4),
    }
    for depth, (numbers, flags) in expected.items():
        targets, valid = align_mtp_targets(ids, depth)
        assert targets.tolist() == [numbers]
        assert valid.tolist() == [flags]
        targets, valid = align_mtp_targets(ids[0], depth)
        assert (targets.tolist(), valid.tolist()) == (numbers, flags)


def test_packed_targets_stop_at_each_sequence() -> None:
    ids = torch.tensor([[11, 12, 13, 21, 22, 31]])
    targets, valid = align_mtp_targets(ids, 1, torch.tensor([0, 3, 5, 6], dtype=torch.int32))
    assert targets.tolist() == [[13, 0, 0, 0, 0, 0]]
    assert valid.tolist() == [[True, False, False, False, False, False]]


def test_packed_targets_match_naive_loop() -> None:
    rng = random.Random(0)
    for _ in range(30):
        lengths = [rng.choice([0, 1, 2, 3, 9]) for _ in range(rng.randint(1, 5))]
        row = [rng.randint(1, 99) for _ in range(sum(lengths) + rng.randint(0, 3))]
        if not row:
            continue
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        for depth in range(4):
            targets, valid = align_mtp_targets(torch.tensor(row), depth, bounds)
            assert (targets.tolist(), valid.tolist()) == naive_targets(row, depth, lengths)


def test_one_packed_sequence_equals_the_plain_row() -> None:
    ids = torch.arange(1, 8).unsqueeze(0)
    for depth in range(3):
        for plain, packed in zip(
            align_mtp_targets(ids, depth),
            align_mtp_targets(ids, depth, torch.tensor([0, 7])),
            strict=True,
        ):
            assert torch.equal(plain, packed)


def test_shift_to_source_follows_the_targets() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]])
    values = ids * 0.5  # one number per token
    for depth in range(3):
        targets, valid = align_mtp_targets(ids, depth)
        shifted = shift_to_source(values, depth, fill=-1.0)
        assert torch.equal(shifted, torch.where(valid, targets * 0.5, -1.0))
    bounds = torch.tensor([0, 2, 5])
    packed = shift_to_source(values[:1], 0, bounds, fill=-1.0)
    assert packed.tolist() == [[3.0, -1.0, 4.0, 4.5, -1.0]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_shifts_keep_the_dtype(dtype: torch.dtype) -> None:
    values = torch.tensor([[1, 0, 1, 1]]).to(dtype)
    fill = dtype == torch.bool
    left, right = shift_to_source(values, 1, fill=fill), shift_to_tokens(values, 1, fill=fill)
    assert left.dtype == right.dtype == dtype
    assert left.tolist() == [[1, 1, fill, fill]]
    assert right.tolist() == [[fill, fill, 1, 0]]


def test_shift_to_tokens_by_hand() -> None:
    values = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    assert shift_to_tokens(values, 0).tolist() == [[[0.0, 1.0, 2.0, 3.0]]]
    assert shift_to_tokens(values, 1, fill=-9.0).tolist() == [[[-9.0, -9.0, 1.0, 2.0]]]
    assert shift_to_tokens(values, 7).tolist() == [[[0.0] * 4]]


def test_there_and_back() -> None:
    values = torch.arange(1.0, 7.0).unsqueeze(0)
    for depth in range(3):
        back = shift_to_tokens(shift_to_source(values, depth), depth)
        assert back[0, depth + 1 :].tolist() == values[0, depth + 1 :].tolist()
        assert back[0, : depth + 1].tolist() == [0.0] * (depth + 1)


def test_valid_in_the_token_frame_masks_the_start_of_each_packed_sequence() -> None:
    ids = torch.arange(9)
    _, valid = align_mtp_targets(ids, 1, torch.tensor([0, 4, 9]))
    about_token = shift_to_tokens(valid, 1, False)
    assert about_token.tolist() == [False] * 2 + [True] * 2 + [False] * 2 + [True] * 3


def test_shift_to_tokens_passes_the_gradient_to_the_source() -> None:
    values = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    (shift_to_tokens(values, 1) * weights).sum().backward()
    assert values.grad.tolist() == [[3.0, 4.0, 0.0, 0.0]] * 2
    gone = shift_to_tokens(values, 8).sum()
    values.grad = None
    gone.backward()
    assert values.grad.tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize(
    ("ids", "depth", "bounds", "message"),
    [
        (torch.ones(1, 4), -1, None, "depth is -1"),
        (torch.ones(2, 4), 1, torch.tensor([0, 4]), r"\[2, 4\]: with cu_seqlens"),
        (torch.ones(1, 2, 4), 1, None, r"\[1, 2, 4\]"),
        (torch.ones(4), 1, torch.tensor([1, 4]), r"cu_seqlens is \[1, 4\]"),
        (torch.ones(4), 1, torch.tensor([0, 5]), r"cu_seqlens is \[0, 5\].*row length 4"),
        (torch.ones(4), 1, torch.tensor([0, 3, 2]), r"cu_seqlens is \[0, 3, 2\]"),
        (torch.ones(4), 1, torch.tensor([0.0, 4.0]), "n \\+ 1 integers"),
        (torch.ones(4), 1, torch.tensor([4]), "n \\+ 1 integers"),
    ],
)
def test_bad_input_is_refused(
    ids: torch.Tensor, depth: int, bounds: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        align_mtp_targets(ids, depth, bounds)
    with pytest.raises(ValueError, match=message):
        shift_to_source(ids, depth, bounds)


def test_shift_to_tokens_refuses_a_negative_depth() -> None:
    with pytest.raises(ValueError, match="depth is -1"):
        shift_to_tokens(torch.ones(1, 4), -1)
