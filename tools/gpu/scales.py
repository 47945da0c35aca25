"""Models and workloads of the speed sections: on a GPU, and rehearsed at toy size."""

from __future__ import annotations

from dataclasses import dataclass

COMMON = (
    "precision=bf16",
    "mtp.num_layers=1",
    "model.init_std=0.02",
    "rl.mini_batches=1",
    # lengths and rewards stay as they are
    "rl.optimizer.lr=1e-7",
    # a negative lambda is none of 0: the trunk's MTP pass is always made
    "mtp.trunk.clamp=[null,null]",
)
# about 1.0B parameters, 24 layers
_DENSE = (
    "model.num_layers=24",
    "model.hidden_size=2048",
    "model.ffn_hidden_size=4096",
    "model.num_attention_heads=16",
    "model.num_query_groups=8",
)
# about 1.0B parameters in all, of which 0.3B work on a token
_MOE = (
    "model.num_layers=16",
    "model.hidden_size=1024",
    "model.ffn_hidden_size=4096",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "model.moe.num_experts=16",
    "model.moe.top_k=2",
    "model.moe.ffn_hidden_size=1024",
    "model.moe.first_dense_layers=1",
)
# about 0.7B parameters
_ROLLOUT = (
    "model.num_layers=24",
    "model.hidden_size=1536",
    "model.ffn_hidden_size=4096",
    "model.num_attention_heads=12",
    "model.num_query_groups=4",
    "model.max_position_embeddings=1024",
)
_TOY = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
)


@dataclass(frozen=True)
class TrainingScale:
    """Work of an update.

    Args:
        dense: overrides of the dense model.
        moe: of the mixture of experts.
        vocabulary: token ids.
        length: of the longest sequence.
        micro_batch: tokens of a micro-batch, a multiple of ``length``.
        micro_batches: of an update.
        rounds: timed updates.
    """

    dense: tuple[str, ...]
    moe: tuple[str, ...]
    vocabulary: int
    length: int
    micro_batch: int
    micro_batches: int
    rounds: int

    def overrides(self, model: tuple[str, ...]) -> tuple[str, ...]:
        """Of the configuration of a model."""
        sizes = (
            f"model.max_position_embeddings={self.length}",
            f"rl.micro_batch_tokens={self.micro_batch}",
        )
        return (*COMMON, *model, *sizes)

    def mixed_lengths(self) -> list[int]:
        """Sequences that fill the micro-batches: whole ones, and pairs of unequal ones."""
        long = 3 * self.length // 4
        pair = [long, self.length - long]
        fit = self.micro_batch // self.length
        return ([self.length] * (fit - 1) + pair) * self.micro_batches

    def full_lengths(self) -> list[int]:
        """As many tokens, all sequences of the full length."""
        return [self.length] * (self.micro_batch // self.length * self.micro_batches)


@dataclass(frozen=True)
class RolloutScale:
    """Work of the rollouts.

    Args:
        model: overrides.
        vocabulary: rows of the output layer.
        updates: of pretraining, before.
        text: sequences and tokens of one of its batches.
        batches: responses at once.
        prompt: tokens.
        response: tokens.
        peer_response: tokens of a response of ``generate``, whose rate hardly depends on it.
    """

    model: tuple[str, ...]
    vocabulary: int
    updates: int
    text: tuple[int, int]
    batches: tuple[int, ...]
    prompt: int
    response: int
    peer_response: int


TRAINING = TrainingScale(_DENSE, _MOE, 32768, 4096, 16384, 2, 3)
TOY_TRAINING = TrainingScale(
    _TOY,
    (*_TOY, "model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.ffn_hidden_size=64"),
    vocabulary=256,
    length=64,
    micro_batch=128,
    micro_batches=2,
    rounds=2,
)
# the batches that have an aim come first
ROLLOUTS = RolloutScale(_ROLLOUT, 32768, 60, (16, 512), (64, 1, 16, 256), 32, 512, 32)
TOY_ROLLOUTS = RolloutScale(
    (*_TOY, "model.max_position_embeddings=128"), 96, 10, (4, 32), (4, 1), 8, 24, 24
)
