"""What only the tokenizer can say about prompts, and what two sets of them have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_occ.config.words import counted
from megatron_occ.data.prompts import PromptRecord
from megatron_occ.data.tokenizers import Tokenizer

# Prompts of one call of the tokenizer: enough to keep all cores busy, few enough for the memory.
_BATCH = 1024
_SHOWN = 5


def check_prompts(
    prompts: Sequence[tuple[str, PromptRecord]], tokenizer: Tokenizer, room: int, remedy: str
) -> None:
    """Tokenize every prompt once, and refuse those that no run could sample from.

    Args:
        prompts: place ("file:line") and record of each.
        tokenizer: of the run.
        room: tokens of a prompt at most.
        remedy: what to change where a prompt is too long.

    Raises:
        ValueError: characters that the tokenizer does not know, or fewer than 1 or more than
            ``room`` tokens; with the number of such prompts and the first few places.
    """
    # a file may be given twice, for training and for validation
    problems = list(dict.fromkeys(_problems(prompts, tokenizer, room)))
    if not problems:
        return
    lines = "".join(f"\n  - {text}" for text in problems[:_SHOWN])
    if len(problems) > _SHOWN:
        lines += f"\n  - and {len(problems) - _SHOWN} more"
    count = counted(len(problems), "prompt")
    raise ValueError(f"{count} can't be used:{lines}\n{remedy}")


def too_long(texts: Sequence[str], tokenizer: Tokenizer, limit: int) -> set[int]:
    """Positions of texts with more than ``limit`` tokens; those it does not know are left alone."""
    found = set()
    for start in range(0, len(texts), _BATCH):
        part = texts[start : start + _BATCH]
        try:
            lengths = [len(ids) for ids in tokenizer.encode_batch(part)]
        except ValueError:
            found_ids = [_ids_or_problem(text, tokenizer) for text in part]
            lengths = [0 if isinstance(ids, str) else len(ids) for ids in found_ids]
        found |= {start + i for i, length in enumerate(lengths) if length > limit}
    return found


def shared_prompts(train: Sequence[PromptRecord], held_out: Sequence[PromptRecord]) -> int:
    """How many of the held-out prompts are also training prompts, letter for letter."""
    known = {record.prompt for record in train}
    return sum(record.prompt in known for record in held_out)


def _problems(
    prompts: Sequence[tuple[str, PromptRecord]], tokenizer: Tokenizer, room: int
) -> Iterator[str]:
    for start in range(0, len(prompts), _BATCH):
        part = prompts[start : start + _BATCH]
        try:
            encoded: Sequence[Sequence[int] | str] = tokenizer.encode_batch(
                [record.prompt for _, record in part]
            )
        except ValueError:
            encoded = [_ids_or_problem(record.prompt, tokenizer) for _, record in part]
        for (place, _), ids in zip(part, encoded, strict=True):
            if isinstance(ids, str):
                yield f"{place}: {ids}"
            elif not 0 < len(ids) <= room:
                length = counted(len(ids), "token")
                yield f"{place}: the prompt has {length}, allowed are 1 to {room}"


def _ids_or_problem(text: str, tokenizer: Tokenizer) -> list[int] | str:
    try:
        return tokenizer.encode(text)
    except ValueError as error:
        return str(error)
