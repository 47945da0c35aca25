"""An MTP head for a causal language model of transformers: what ``occ_in_trl.py`` trains.

The first depth of DeepSeek-V3's (arXiv 2412.19437, equations 21 to 23), with an MLP as its layer;
embedding and output layer are the model's. Attach it as ``model.mtp``: optimizer and checkpoints
then hold it too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call


class MTPHead(nn.Module):
    """From the trunk's state at t and the embedding of token t + 1 to a state for token t + 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_state, self.norm_embedding, self.norm = (nn.RMSNorm(width) for _ in range(3))
        self.join = nn.Linear(2 * width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
        )

    def forward(self, states: Tensor, embedded: Tensor) -> Tensor:
        """[b, s, width] twice -> [b, s, width]."""
        joined = torch.cat([self.norm_state(states), self.norm_embedding(embedded)], dim=-1)
        joined = self.join(joined)
        return self.norm(joined + self.mlp(joined))


def trunk_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All that main and MTP head share: those of the model but for ``model.mtp``."""
    return [p for name, p in model.named_parameters() if not name.startswith("mtp.")]


def mtp_logprobs(
    model: nn.Module, hidden: Tensor, ids: Tensor, count: int, temperature: float, *, train: str
) -> Tensor:
    """Log-probs [b, count] of the last tokens by ``model.mtp``.

    Args:
        model: of transformers.
        hidden: [b, s, width] its last hidden state.
        ids: [b, s], at least two tokens more than ``count``.
        count: of tokens, the response.
        temperature: of sampling.
        train: where the gradient goes, "trunk" or "head"; the other is cut off.
    """
    parameters = dict(model.mtp.named_parameters())
    hidden, output = hidden[:, -count - 2 : -2], model.get_output_embeddings().weight
    # the model's own layer: it may have a padding row that never learns
    embedded = model.get_input_embeddings()(ids[:, -count - 1 : -1])
    if train == "trunk":
        parameters = {name: p.detach() for name, p in parameters.items()}
    else:
        hidden, embedded, output = hidden.detach(), embedded.detach(), output.detach()
    states = functional_call(model.mtp, parameters, (hidden, embedded))
    logprobs = (states @ output.T / temperature).log_softmax(-1)
    return logprobs.gather(-1, ids[:, -count:].unsqueeze(-1)).squeeze(-1)
