"""Pretraining batches made of generated problems."""

from __future__ import annotations

import torch

from megatron_occ.data.splits import first_problem, mix64
from megatron_occ.data.tasks import Task
from megatron_occ.data.tokenizers import Tokenizer


class TaskCorpus:
    """Batches of a task's problems, one problem a row, as a function of the step alone.

    A row is prompt, solution and eos, padded on the right. ``seed`` picks the range of train
    problems (seed 0 starts at problem 0); the validation split is the same for every seed.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        seed: int = 0,
        *,
        split: str = "train",
        mask_prompt: bool = True,
        label_noise: float = 0.0,
    ) -> None:
        """Raises ValueError for a negative seed or an unknown split.

        ``mask_prompt`` leaves the prompt out of the loss: random operands cannot be learned.
        ``label_noise`` is the share of the solutions' tokens that are redrawn from the tokens of
        the same problem: a model of such texts knows more than it samples, and RL soon brings it
        out.
        """
        self._task = task
        self._tokenizer = tokenizer
        self._split = split
        self._mask_prompt = mask_prompt
        self._label_noise = label_noise
        self._first = first_problem(split, seed)

    def batch(
        self, step: int, size: int, sequence_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows ``step * size`` to ``step * size + size - 1``.

        Returns ``ids`` [size, sequence_length] int64 and ``loss_mask`` [size, sequence_length]
        float32. The mask is aligned with the tokens: 1 where the token itself is to be predicted
        (solution and eos; with ``mask_prompt=False`` the prompt as well, except the very first
        token, which nothing comes before). Raises ValueError when step or size is out of range, a
        problem is longer than ``sequence_length``, or the split has no such problem.
        """
        if step < 0 or size < 1:
            raise ValueError(f"need step >= 0 and size >= 1, got step={step}, size={size}")
        ids, mask = [], []
        first = self._first + step * size
        for index in range(first, first + size):
            row_ids, row_mask = self._row(index, sequence_length)
            ids.append(row_ids)
            mask.append(row_mask)
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.float32)

    def _row(self, index: int, sequence_length: int) -> tuple[list[int], list[int]]:
        problem = self._task.problem(self._split, index)
        if not problem.solution:
            raise ValueError(
                f"task {self._task.name} has problems without a solution, which nothing can be "
                "pretrained on: give RL a model by model.from_hf or rl.init_from"
            )
        prompt = self._tokenizer.encode(problem.prompt)
        solution = self._tokenizer.encode(problem.solution)
        predicted = [*self._noised(solution, prompt, index), self._tokenizer.eos_id]
        padding = sequence_length - len(prompt) - len(predicted)
        if padding < 0:
            raise ValueError(
                f"problem {problem.prompt + problem.solution!r:.80} has {len(prompt)} prompt and "
                f"{len(predicted)} solution and eos tokens, more than the sequence length "
                f"{sequence_length}: raise it to at least {sequence_length - padding}"
            )
        prompt_mask = [0 if self._mask_prompt else 1] * len(prompt)
        mask = prompt_mask + [1] * len(predicted) + [0] * padding
        mask[0] = 0
        return prompt + predicted + [self._tokenizer.pad_id] * padding, mask

    def _noised(self, solution: list[int], prompt: list[int], index: int) -> list[int]:
        if not self._label_noise:
            return solution
        known, noised = prompt + solution, list(solution)
        key = mix64(index)
        for position in range(len(solution)):
            draw = mix64(key + position)
            if draw < self._label_noise * 2**64:
                noised[position] = known[mix64(draw) % len(known)]
        return noised
