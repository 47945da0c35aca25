"""The task and the tokenizer that a configuration names."""

from __future__ import annotations

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
