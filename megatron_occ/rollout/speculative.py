"""Which drafted tokens stay: two rules, both lossless.

``coupled`` samples draft and target by races with the same random numbers (``sample_by_race``) and
keeps the drafts that the target drew as well. What comes out is what plain sampling gives, token
for token, whatever was drafted; so a run can be repeated although the draft length follows the
clock. A draft stays with a probability of at least (1 - TV) / (1 + TV), TV being the total
variation between draft and target (Daliri et al. 2024, 2408.07978): no rule that does not know the
draft when it draws from the target can guarantee more.

``rejection`` is speculative sampling (Leviathan et al. 2023, 2211.17192; Chen et al. 2023,
2302.01318). It accepts a draft with the largest possible probability, 1 - TV, and gives the
target's distribution, not the same tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_occ.rollout.sampling import sample_from_weights


def coupled_accept(draft_tokens: Tensor, target_tokens: Tensor) -> Tensor:
    """Number of drafts that the target drew as well, before the first one that it did not.

    Args:
        draft_tokens: [n, k].
        target_tokens: [n, k + 1], drawn with the random numbers that the drafts were drawn with.

    Returns:
        [n] in 0 .. k; ``target_tokens[:, :accepted + 1]`` are the tokens to commit.
    """
    if draft_tokens.size(1) == 0:
        return draft_tokens.new_zeros(len(draft_tokens))
    same = draft_tokens == target_tokens[:, : draft_tokens.size(1)]
    return same.long().cumprod(1).sum(1)


def speculative_accept(
    draft_tokens: Tensor,
    draft_logprobs: Tensor,
    target_logprobs: Tensor,
    generator: torch.Generator | None = None,
    *,
    uniform: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Speculative sampling: accept or reject drafts, and draw the token after the accepted ones.

    Draft j is accepted with probability min(1, p_j / q_j); the first rejected one is replaced by a
    draw from the normalised max(0, p - q); after k accepted ones a token is drawn from the
    target's last distribution. With one-hot distributions (greedy) this is a comparison.

    Args:
        draft_tokens: [n, k], draft j drawn from ``draft_logprobs[:, j]``.
        draft_logprobs: [n, k, v] normalised, -inf for tokens that can't be drawn.
        target_logprobs: [n, k + 1, v] likewise, position j given the drafts before j.
        generator: of the uniform numbers.
        uniform: [n, k + 1, 2] in [0, 1) in place of a generator: for acceptance and for the draw.

    Returns:
        Accepted drafts [n], 0 .. k, and the token that follows them [n].
    """
    rows, drafts = draft_tokens.shape
    if uniform is None:
        size = (rows, drafts + 1, 2)
        uniform = torch.rand(
            size, dtype=torch.float64, generator=generator, device=draft_tokens.device
        )
    target, draft = target_logprobs.double(), draft_logprobs.double()
    picked = draft_tokens.unsqueeze(-1)
    ratio = (target[:, :-1].gather(-1, picked) - draft.gather(-1, picked)).squeeze(-1).exp()
    accepted = (uniform[:, :-1, 0] < ratio).long().cumprod(1).sum(1)
    # nothing was drafted after the last position: what is left there is the target itself
    proposed = torch.cat([draft.exp(), torch.zeros_like(target[:, :1])], dim=1)
    index = accepted.view(rows, 1, 1)
    at = index.expand(-1, -1, target.size(-1))
    wanted = target.gather(1, at).squeeze(1).exp()
    left = (wanted - proposed.gather(1, at).squeeze(1)).clamp_(min=0)
    # equal distributions leave nothing, and reject by rounding alone
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, wanted)
    numbers = uniform[:, :, 1].gather(1, accepted.unsqueeze(1)).squeeze(1)
    return accepted, sample_from_weights(left, numbers)
