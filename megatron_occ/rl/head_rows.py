"""What trains the head alone: micro-batches, and responses whose trunk states a rollout kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_occ.config.schema import Config, RLConfig
from megatron_occ.losses.heads import HeadTargets
from megatron_occ.rl.batch import head_masks, sequence_ends
from megatron_occ.rl.interfaces import Actor, Collectives
from megatron_occ.rl.sampler import Samples


@dataclass(frozen=True)
class HeadBatch:
    """b sequences of s tokens that train the head.

    Args:
        ids: [b, s] token ids.
        targets: constants of the loss.
        states: [b, s, h] of the trunk; 0 at the last token of a row and behind it. None: a pass
            through the trunk makes them.
        lengths: tokens of each sequence, packed; None: padded.
    """

    ids: Tensor
    targets: HeadTargets
    states: Tensor | None = None
    lengths: list[int] | None = None

    def for_actor(self, actor: Actor, config: Config) -> Any:
        """The actor's micro-batch: one pass of the depths, cut off from the trunk."""
        # the mask is in the source frame
        last = sequence_ends(self.targets.mask[0])
        return actor.micro_batch(
            self.ids,
            self.targets,
            lengths=self.lengths,
            ends=torch.where(last > 0, last + 1, 0),
            passes=((False, True),),
            temperature=config.rl.rollout.temperature,
            distance=config.mtp.head.signal,
            states=self.states,
        )


@dataclass(frozen=True)
class HeadRows:
    """n sequences that this rank drew.

    Args:
        ids: prompt and response of each.
        starts: first response token of each.
        states: [tokens - 1, h] of each, on the CPU.
        numbers: of each among the sequences of all ranks, the same on any layout.
    """

    ids: list[list[int]]
    starts: list[int]
    states: list[Tensor]
    numbers: list[int]

    @classmethod
    def of(cls, samples: Samples, size: int, layout: Collectives) -> HeadRows:
        """All responses of ``samples``.

        Args:
            samples: whole groups, which rank r of R drew for prompts r, r + R, ...
            size: responses of a group.
            layout: this rank's place.
        """
        assert len(samples.states) == len(samples), "the engine keeps the states of each response"
        pairs = zip(samples.prompts, samples.tokens, strict=True)
        ids = [prompt + tokens for prompt, tokens in pairs]
        rank, ranks = layout.data_parallel_rank, layout.data_parallel_size
        groups = range(rank, len(ids) // size * ranks, ranks)
        numbers = [group * size + copy for group in groups for copy in range(size)]
        return cls(ids, [len(prompt) for prompt in samples.prompts], samples.states, numbers)

    def share(self, number: int, of: int) -> HeadRows:
        """Every ``of``-th sequence of all ranks: this rank's part of one update of a step.

        Where this rank has none of them, its first one without a token that counts: all ranks take
        part in every update.
        """
        rows = [row for row, found in enumerate(self.numbers) if found % of == number]
        starts = [self.starts[row] for row in rows]
        if not rows:
            rows, starts = [0], [len(self.ids[0])]
        ids, states = [self.ids[row] for row in rows], [self.states[row] for row in rows]
        return HeadRows(ids, starts, states, [self.numbers[row] for row in rows])

    def batches(self, config: RLConfig, depths: int, device: torch.device) -> Iterator[HeadBatch]:
        """Micro-batches, longest sequences first, of at least one sequence in all.

        Args:
            config: section ``rl``, for the size of a micro-batch.
            depths: K.
            device: of the result.
        """
        order = sorted(range(len(self.ids)), key=lambda row: -len(self.ids[row]))
        size = config.micro_batch_size
        while order:
            if config.micro_batch_tokens is not None:
                size = max(1, config.micro_batch_tokens // len(self.ids[order[0]]))
            yield self._batch(order[:size], depths, device)
            order = order[size:]

    def _batch(self, rows: Sequence[int], depths: int, device: torch.device) -> HeadBatch:
        shape = (len(rows), len(self.ids[rows[0]]))
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        kept = self.states[rows[0]]
        states = torch.zeros(*shape, kept.size(1), dtype=kept.dtype)
        for place, row in enumerate(rows):
            tokens = self.ids[row]
            ids[place, : len(tokens)] = torch.tensor(tokens)
            mask[place, self.starts[row] : len(tokens)] = 1.0
            states[place, : len(tokens) - 1] = self.states[row]
        masks = head_masks(mask.to(device), depths)
        return HeadBatch(ids.to(device), HeadTargets(masks), states.to(device))
