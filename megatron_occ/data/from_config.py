"""The task and the tokenizer that a configuration names."""

from __future__ import annotations

from typing import NamedTuple

from megatron_occ.config.schema import Config
from megatron_occ.data.tasks import Task, UnknownTask, build_task
from megatron_occ.data.tokenizers import Tokenizer, build_tokenizer


def read_task(config: Config) -> Task | None:
    """The generated task; None where there is none.

    Raises:
        ValueError: an unknown name or a bad parameter.
    """
    section = config.data.task
    if section.name is None:
        return None
    try:
        return build_task(section.name, **section.params)
    except ValueError as error:
        key = "name" if isinstance(error, UnknownTask) else "params"
        raise ValueError(f"data.task.{key}: {error}") from error


class Stops(NamedTuple):
    """What ends a response: token ids, and texts."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]

    def __str__(self) -> str:
        texts = f" and the texts {', '.join(map(repr, self.texts))}" if self.texts else ""
        return f"the token ids {', '.join(map(str, self.ids))}{texts}"


def read_stops(config: Config, task: Task | None, tokenizer: Tokenizer) -> Stops:
    """The tokenizer's and the task's, and those of ``rl.rollout``.

    Raises:
        ValueError: an id that the tokenizer does not have.
    """
    rollout = config.rl.rollout
    beyond = [id_ for id_ in rollout.stop_ids if not 0 <= id_ < tokenizer.vocab_size]
    if beyond:
        raise ValueError(
            f"rl.rollout.stop_ids={rollout.stop_ids}: the tokenizer has ids 0 to "
            f"{tokenizer.vocab_size - 1}. Leave {beyond[0]} out"
        )
    special = {text: tokenizer.special_id(text) for text in rollout.stop}
    ids = [*tokenizer.stop_ids, *(tokenizer.encode(task.stop) if task is not None else [])]
    ids += [*rollout.stop_ids, *(id_ for id_ in special.values() if id_ is not None)]
    texts = tuple(text for text, id_ in special.items() if id_ is None)
    return Stops(tuple(dict.fromkeys(ids)), texts)


def read_tokenizer(config: Config, task: Task | None) -> Tokenizer:
    """The tokenizer; characters of the task where no alphabet is given.

    Raises:
        ValueError: it can't be made or read.
    """
    section = config.tokenizer
    alphabet = section.alphabet
    if section.kind == "char" and alphabet is None and task is not None:
        alphabet = task.alphabet
    try:
        tokenizer = build_tokenizer(section.kind, alphabet=alphabet, path=section.path)
        if task is not None:
            tokenizer.encode(task.stop)  # ends every response: generation has to know it
    except ValueError as error:
        key = "path" if section.kind == "hf" else "alphabet"
        raise ValueError(f"tokenizer.{key}: {error}") from error
    return tokenizer
