"""The audit on a model of your own: plain PyTorch, no Megatron, one file.

    python examples/audit_your_model.py

A small recurrent model learns to count by REINFORCE: every token should be the one before it plus
1. Its MTP head predicts the token after next. Early in this training the audit asks of two signals
of that head whether they should reach the trunk: c is their inner product with RL's gradient, in
one mini-batch and between different ones, where the noise that both share is gone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_occ.audit.recorder import AuditRecorder
from megatron_occ.audit.summary import summarize
from megatron_occ.audit.text import audit_text
from megatron_occ.losses import group_advantages

VOCABULARY, WIDTH, PROMPT, LENGTH, GROUP, GROUPS = 6, 32, 2, 8, 8, 8


class TinyModel(nn.Module):
    """A trunk and two heads, which predict the next token and the one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.main_head, self.mtp_head = (nn.Linear(WIDTH, VOCABULARY) for _ in range(2))

    def trunk(self, ids: Tensor) -> Tensor:
        return self.gru(self.embedding(ids))[0]

    def logprobs(self, hidden: Tensor, ids: Tensor, head: nn.Module, ahead: int) -> Tensor:
        """Log-probs [b, LENGTH - PROMPT] of the response, each told ``ahead`` tokens before."""
        logits = head(hidden[:, PROMPT - ahead : LENGTH - ahead]).log_softmax(-1)
        return logits.gather(-1, ids[:, PROMPT:].unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def rollout(model: TinyModel) -> tuple[Tensor, Tensor, float]:
    """Ids [b, LENGTH], advantages [b, 1] and the mean reward of fresh prompts and responses."""
    ids = torch.randint(VOCABULARY, (GROUPS, PROMPT)).repeat_interleave(GROUP, 0)
    while ids.size(1) < LENGTH:
        probs = model.main_head(model.trunk(ids)[:, -1]).softmax(-1)
        ids = torch.cat([ids, probs.multinomial(1)], dim=1)
    right = ids[:, PROMPT:] == (ids[:, PROMPT - 1 : -1] + 1) % VOCABULARY
    rewards = right.float().mean(1)
    return ids, group_advantages(rewards, GROUP).unsqueeze(1), float(rewards.mean())


def main(updates: int = 30, mini_batches: int = 40) -> None:
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(updates):
        ids, advantages, _ = rollout(model)
        hidden = model.trunk(ids)
        loss = -(advantages * model.logprobs(hidden, ids, model.main_head, 1)).mean()
        # the head learns by a cross-entropy that is cut off from the trunk
        loss = loss - model.logprobs(hidden.detach(), ids, model.mtp_head, 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    groups = {"embedding": [model.embedding.weight], "layer 1": list(model.gru.parameters())}
    recorder = AuditRecorder(groups, optimizer=optimizer, window=8)
    for _ in range(mini_batches):
        ids, advantages, reward = rollout(model)
        hidden = model.trunk(ids)
        policy_loss = -(advantages * model.logprobs(hidden, ids, model.main_head, 1)).mean()
        mtp = model.logprobs(hidden, ids, model.mtp_head, 2)
        signals = {"policy, no ratio": -(advantages * mtp).mean(), "cross-entropy": -mtp.mean()}
        signals = {name: (loss, mtp) for name, loss in signals.items()}
        recorder.measure(policy_loss, signals, torch.ones_like(mtp))
    record = recorder.record(f"TinyModel, reward {reward:.2f}", "counting", updates=updates)
    print(audit_text(summarize(record)))


if __name__ == "__main__":
    main()
