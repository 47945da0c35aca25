"""The losses in a trainer of your own: plain PyTorch, no Megatron, one file.

    python examples/losses_in_your_trainer.py

A small recurrent model with a main head and two MTP heads learns to count: every token should be
the one before it plus 1. It prints the reward, and lambda of both depths in a step's last update.
Lambda is below 0 while the heads are less sure than the main head of what is rewarded, as here;
then they send nothing into the trunk.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_occ.losses import clipped_policy_loss, group_advantages, occ_coefficient

VOCABULARY, WIDTH, DEPTHS = 6, 32, 2
PROMPT, LENGTH, GROUP, GROUPS, UPDATES = 3, 9, 16, 8, 4  # a prompt longer than DEPTHS


class TinyModel(nn.Module):
    """Token-aligned log-probs: entry t is about token t, whichever position predicted it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.trunk = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, VOCABULARY) for _ in range(1 + DEPTHS))

    def forward(self, ids: Tensor) -> Tensor:
        """[b, s] ids -> [1 + K, b, s]; depth k reads trunk state t - 1 - k, the first are 0."""
        hidden, rows = self.trunk(self.embedding(ids))[0], []
        for depth, head in enumerate(self.heads):
            logprobs = head(hidden[:, : -1 - depth]).log_softmax(-1)
            picked = logprobs.gather(-1, ids[:, 1 + depth :].unsqueeze(-1)).squeeze(-1)
            rows.append(nn.functional.pad(picked, (1 + depth, 0)))
        return torch.stack(rows)

    @torch.no_grad()
    def sample(self, ids: Tensor) -> Tensor:
        while ids.size(1) < LENGTH:
            last = self.heads[0](self.trunk(self.embedding(ids))[0][:, -1])
            ids = torch.cat([ids, last.softmax(-1).multinomial(1)], dim=1)
        return ids


def joint_loss(logprobs, old, mtp_logprobs, advantages, mask):  # noqa: ANN001, ANN201
    """Policy loss of the main head, plus lambda / K times that of each MTP depth."""
    loss, _ = clipped_policy_loss(logprobs, old, advantages, mask)
    weights = occ_coefficient(logprobs, old, mtp_logprobs, mask).to(loss)
    for weight, depth in zip(weights.clamp(min=0), mtp_logprobs, strict=True):
        loss = loss + weight / len(weights) * clipped_policy_loss(depth, old, advantages, mask)[0]
    return loss, weights


def main(steps: int = 20) -> None:
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    mask = (torch.arange(LENGTH) >= PROMPT).expand(GROUP * GROUPS, LENGTH)
    for step in range(steps):
        prompts = torch.randint(VOCABULARY, (GROUPS, PROMPT)).repeat_interleave(GROUP, 0)
        ids = model.sample(prompts)
        right = ids[:, 1:] == (ids[:, :-1] + 1) % VOCABULARY
        rewards = right[:, PROMPT - 1 :].float().mean(1)
        advantages = group_advantages(rewards, GROUP)
        old = model(ids)[0].detach()
        for rows in torch.randperm(len(ids)).chunk(UPDATES):
            main_head, *mtp = model(ids[rows])
            batch = old[rows], torch.stack(mtp), advantages[rows], mask[rows]
            loss, weights = joint_loss(main_head, *batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        values = " ".join(f"{weight:+.3f}" for weight in weights.tolist())
        print(f"step {step + 1:2}  reward {float(rewards.mean()):.3f}  lambda {values}")


if __name__ == "__main__":
    main()
