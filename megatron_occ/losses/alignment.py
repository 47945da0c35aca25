"""Index work between the two frames in which the prediction of an MTP depth can be written.

*Source frame*: entry t belongs to the trunk state at position t. Depth d there predicts token
`x_{t+1+d}`: depth 0 is the main head, depth k >= 1 is MTP depth k. Models compute in this frame.

*Token frame* ("aligned"): entry t is about token `x_t`, whichever trunk state it came from. The
losses compare depths with the main head in this frame.

Integer targets, masks and other constants travel left into the source frame (`align_mtp_targets`,
`shift_to_source`), log-probs with a gradient travel right into the token frame (`shift_to_tokens`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def align_mtp_targets(
    ids: Tensor, depth: int, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Targets of depth `depth` in the source frame: `targets[t] = ids[t + 1 + depth]`.

    Args:
        ids: [b, s] or [s] token ids.
        depth: 0 for the main head, k >= 1 for MTP depth k.
        cu_seqlens: [n + 1] cumulative lengths of the n sequences packed into one row, starting
            with 0; then `ids` is [s] or [1, s]. Tokens past the last boundary are padding.

    Returns:
        `(targets, valid)`, both shaped like `ids`. `valid` is bool, False where t + 1 + depth lies
        beyond the end of the sequence that t belongs to; targets are 0 there. In the token frame
        the same information is `shift_to_tokens(valid, depth)`.

    Raises:
        ValueError: negative depth, a batch together with `cu_seqlens`, malformed `cu_seqlens`
            (its values are checked on the CPU only, where reading them costs nothing).
    """
    index, valid = _source_index(ids, depth, cu_seqlens)
    targets = ids[..., index].masked_fill(~valid, 0)
    return targets, valid.expand(ids.shape)


def shift_to_source(
    values: Tensor, depth: int, cu_seqlens: Tensor | None = None, fill: float | bool = 0
) -> Tensor:
    """Token-aligned constants moved into the source frame: `out[t] = values[t + 1 + depth]`.

    For response masks, old log-probs and advantages, which must follow the targets of
    `align_mtp_targets`.

    Args:
        values: [b, s] or [s], any dtype; with `cu_seqlens` [s] or [1, s].
        depth: 0 for the main head, k >= 1 for MTP depth k.
        cu_seqlens: as in `align_mtp_targets`.
        fill: value at positions without a target.

    Returns:
        Same shape and dtype as `values`.

    Raises:
        ValueError: as `align_mtp_targets`.
    """
    index, valid = _source_index(values, depth, cu_seqlens)
    return values[..., index].masked_fill(~valid, fill)


def shift_to_tokens(values: Tensor, depth: int, fill: float | bool = 0) -> Tensor:
    """Source-frame values moved into the token frame: `out[t] = values[t - 1 - depth]`.

    Differentiable. The first `depth + 1` entries are `fill`. In a packed row the first `depth + 1`
    entries of each later sequence come from its predecessor: mask them, with
    `shift_to_tokens(valid, depth, False)`.

    Args:
        values: [..., s], any dtype.
        depth: 0 for the main head, k >= 1 for MTP depth k.
        fill: value of the entries that no trunk state predicts.

    Returns:
        Same shape and dtype as `values`.

    Raises:
        ValueError: negative depth.
    """
    length = values.shape[-1]
    shift = min(_shift(depth), length)
    return F.pad(values[..., : length - shift], (shift, 0), value=fill)


def _shift(depth: int) -> int:
    if depth < 0:
        raise ValueError(f"depth is {depth}: use 0 for the main head, k >= 1 for MTP depth k")
    return depth + 1


def _source_index(values: Tensor, depth: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """[s] index of each position's target (clamped into range) and [s] bool, whether it exists."""
    shift = _shift(depth)
    if values.dim() not in (1, 2):
        raise ValueError(f"values have shape {list(values.shape)}: give [b, s] or [s]")
    length = values.shape[-1]
    position = torch.arange(length, device=values.device)
    end = length if cu_seqlens is None else _sequence_end(values, position, cu_seqlens)
    index = position + shift
    return index.clamp(max=length - 1), index < end


def _sequence_end(values: Tensor, position: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[s] position one past the end of the packed sequence each position belongs to."""
    length = position.numel()
    _check_packing(values, cu_seqlens)
    boundaries = cu_seqlens.to(device=position.device, dtype=position.dtype)
    # One more end, 0, for padding behind the last sequence: nothing there has a target.
    ends = F.pad(boundaries[1:], (0, 1), value=0).clamp(max=length)
    return ends[torch.searchsorted(boundaries, position, right=True) - 1]


def _check_packing(values: Tensor, cu_seqlens: Tensor) -> None:
    if values.dim() == 2 and values.shape[0] != 1:
        raise ValueError(
            f"packed values have shape {list(values.shape)}: with cu_seqlens give [s] or [1, s]"
        )
    integral = not (cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or not integral:
        raise ValueError(
            f"cu_seqlens has shape {list(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}: give "
            "n + 1 integers for n sequences"
        )
    if cu_seqlens.device.type != "cpu":
        return  # reading the values would make the host wait for the device at each micro-batch
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > values.shape[-1] or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seqlens is {bounds}: it must start with 0, never fall, and end at or before "
            f"the row length {values.shape[-1]}"
        )
