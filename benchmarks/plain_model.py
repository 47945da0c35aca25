"""The model of this project in plain PyTorch, independent of Megatron-Core.

RMSNorm, rotary embedding over halves, grouped-query attention, SwiGLU, tied output layer, and MTP
depths that run one after the other (DeepSeek-V3, arXiv 2412.19437, equations 21 to 23). It serves
as the yardstick of ``benchmarks/plain_pytorch.py`` and as an oracle of the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_occ.config.schema import ModelConfig

# names of Megatron-Core's parameters, and the same part's name here
_NAMES = (
    ("embedding.word_embeddings.", "embedding."),
    ("decoder.layers.", "layers."),
    ("decoder.final_layernorm.", "norm."),
    ("transformer_layer.", "layer."),
    # from Megatron-Core 0.17
    ("mtp_model_layer.", "layer."),
    ("final_layernorm.", "norm."),
    # TransformerEngine's layers have the norm in the product that follows it
    ("self_attention.linear_qkv.layer_norm_", "attention_norm."),
    ("mlp.linear_fc1.layer_norm_", "mlp_norm."),
    ("input_layernorm.", "attention_norm."),
    ("pre_mlp_layernorm.", "mlp_norm."),
    ("self_attention.linear_qkv.", "qkv."),
    ("self_attention.linear_proj.", "out."),
    ("mlp.linear_fc1.", "gate_up."),
    ("mlp.linear_fc2.", "down."),
    ("mtp.layers.", "mtp."),
    ("eh_proj.", "project."),
    ("enorm.", "embedding_norm."),
    ("hnorm.", "hidden_norm."),
)


class PlainGPT(nn.Module):
    """Trunk and MTP depths.

    Args:
        model: sizes; tied embeddings, no bias, no norm of queries and keys.
        vocab_size: token ids.
        depths: MTP depths K.
    """

    def __init__(self, model: ModelConfig, vocab_size: int, depths: int) -> None:
        super().__init__()
        assert model.tie_embeddings
        assert not model.qkv_bias
        assert not model.qk_layernorm
        self.embedding = nn.Embedding(vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(_Layer(model) for _ in range(model.num_layers))
        self.norm = _norm(model)
        self.mtp = nn.ModuleList(_Depth(model) for _ in range(depths))
        cosine, sine = _rotary(model)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, ids: Tensor) -> list[Tensor]:
        """Log-probs of the tokens of ``ids`` [b, s] under the main head and each MTP depth.

        Returns:
            For depth d (0 is the main head) [b, s - 1 - d]: entry t is about token t + 1 + d.
        """
        length = ids.size(1)
        rotary = self.cosine[:length], self.sine[:length]
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden, rotary)
        states = [self.norm(hidden)]
        for k, depth in enumerate(self.mtp, start=1):
            # past the end follows id 0; no loss looks at those positions
            ahead = functional.pad(ids[:, k:], (0, k))
            states.append(depth(states[-1], self.embedding(ahead), rotary))
        return [self._logprobs(state, ids, d) for d, state in enumerate(states)]

    def _logprobs(self, state: Tensor, ids: Tensor, depth: int) -> Tensor:
        logits = state[:, : ids.size(1) - 1 - depth] @ self.embedding.weight.t()
        targets = ids[:, 1 + depth :].unsqueeze(-1)
        return logits.log_softmax(-1).gather(-1, targets).squeeze(-1)


class _Layer(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width, ffn = model.hidden_size, model.ffn_hidden_size
        self.heads, self.groups, self.channels = head_sizes(model)
        rows = (self.heads + 2 * self.groups) * self.channels
        self.attention_norm, self.mlp_norm = _norm(model), _norm(model)
        self.qkv = nn.Linear(width, rows, bias=False)
        self.out = nn.Linear(self.heads * self.channels, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """[b, s, h] to [b, s, h]."""
        hidden = hidden + self._attend(self.attention_norm(hidden), rotary)
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(functional.silu(gate) * up)

    def _attend(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        heads = self.qkv(hidden).unflatten(-1, (-1, self.channels)).transpose(1, 2)
        query, key, value = heads.split((self.heads, self.groups, self.groups), dim=1)
        context = functional.scaled_dot_product_attention(
            _rotate(query, rotary),
            _rotate(key, rotary),
            value,
            is_causal=True,
            enable_gqa=self.heads != self.groups,
        )
        return self.out(context.transpose(1, 2).flatten(2))


class _Depth(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.embedding_norm, self.hidden_norm, self.norm = (_norm(model) for _ in range(3))
        self.project = nn.Linear(2 * model.hidden_size, model.hidden_size, bias=False)
        self.layer = _Layer(model)

    def forward(self, hidden: Tensor, ahead: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Hidden states and embeddings of the tokens ahead, each [b, s, h], to [b, s, h]."""
        joined = torch.cat((self.embedding_norm(ahead), self.hidden_norm(hidden)), dim=-1)
        return self.norm(self.layer(self.project(joined), rotary))


def head_sizes(model: ModelConfig) -> tuple[int, int, int]:
    """Attention heads, key/value groups, channels of a head."""
    heads = model.num_attention_heads
    return heads, model.num_query_groups or heads, model.kv_channels or model.hidden_size // heads


def from_megatron(tensors: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Megatron-Core's weights, or their gradients, under the names and in the layout used here.

    Megatron keeps the rows of queries, keys and values together for each key/value group; here all
    queries come first, then all keys, then all values.
    """
    converted = {}
    for name, tensor in tensors.items():
        for theirs, ours in _NAMES:
            name = name.replace(theirs, ours)
        converted[name] = _split_groups(tensor, model) if name.endswith("qkv.weight") else tensor
    return converted


def _split_groups(weight: Tensor, model: ModelConfig) -> Tensor:
    heads, groups, channels = head_sizes(model)
    blocks = weight.view(groups, heads // groups + 2, channels, -1)
    parts = blocks.split((heads // groups, 1, 1), dim=1)
    return torch.cat([part.flatten(0, 2) for part in parts])


def _norm(model: ModelConfig) -> nn.RMSNorm:
    return nn.RMSNorm(model.hidden_size, eps=model.norm_epsilon)


def _rotary(model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines [positions, channels], both halves alike (RoFormer, arXiv 2104.09864)."""
    channels = head_sizes(model)[2]
    periods = model.rotary_base ** (torch.arange(0, channels, 2) / channels)
    angles = torch.arange(model.max_position_embeddings).unsqueeze(1) / periods
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def _rotate(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = rotary
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat((-second, first), dim=-1) * sine
