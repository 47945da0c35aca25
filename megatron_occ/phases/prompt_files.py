"""The files of prompts that a configuration names: read, and checked against what else it says."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron_occ.config.files import files_of, sets_of
from megatron_occ.config.schema import Config, DataConfig
from megatron_occ.data.chat import ChatFormat, Template
from megatron_occ.data.fields import Messages
from megatron_occ.data.prompt_checks import too_long
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.data.prompts import (
    PromptFile,
    PromptOptions,
    first_prompts,
    read_prompt_file,
    without,
)
from megatron_occ.data.tasks import Task
from megatron_occ.data.tokenizers import HFTokenizer, Tokenizer
from megatron_occ.rl.rewards import get_verifier, register_verifiers, verifier_names

# that a dry run reads of a file
FIRST_RECORDS = 100


def open_training(config: Config, task: Task | None, tokenizer: Tokenizer) -> PromptStream:
    """The training prompts: of the files of ``data.prompts``, or of the task.

    Raises:
        ValueError: a bad file, an unknown verifier, or fewer prompts than one step takes.
    """
    given = config.data.prompts
    if given is None:
        return _generated(config, task, "train")
    weights = given if isinstance(given, dict) else {given: None}
    stream = _open(config, weights, tokenizer, "train")
    _check_step(config, stream)
    return stream


def open_held_out(
    config: Config, task: Task | None, tokenizer: Tokenizer
) -> dict[str, PromptStream]:
    """The sets of held-out prompts by name; a task's, and a file that has none, under "".

    Raises:
        ValueError: a bad file, or an unknown verifier.
    """
    sets = sets_of(config.data.validation_prompts)
    if not sets:
        return {"": _generated(config, task, "validation")}
    return {
        name: _open(config, {path: None}, tokenizer, "validation") for name, path in sets.items()
    }


def _generated(config: Config, task: Task | None, split: str) -> PromptStream:
    assert task is not None, "validate refuses a run without prompts and task"
    return PromptStream(task, config.seed, split)


def _open(
    config: Config, weights: Mapping[str, float | None], tokenizer: Tokenizer, split: str
) -> PromptStream:
    """The files of a split, "train" or "validation", by weight."""
    key = "prompts" if split == "train" else "validation_prompts"
    try:
        files = _files(config, weights, tokenizer, is_training=split == "train")
        stream = PromptStream(files, config.seed, split)
    except ValueError as error:
        raise ValueError(f"data.{key}: {error}") from error
    _check_names(config, stream.task_names(), key)
    return stream


def _check_step(config: Config, stream: PromptStream) -> None:
    try:
        stream.prompts_for_step(0, config.rl.prompts_per_step)
    except ValueError as error:
        raise ValueError(
            f"rl.prompts_per_step={config.rl.prompts_per_step}: {error}. Lower it, or give more "
            "prompts"
        ) from None


def _files(
    config: Config,
    weights: Mapping[str, float | None],
    tokenizer: Tokenizer,
    *,
    is_training: bool,
) -> list[PromptFile]:
    options = _options(config, _template(tokenizer))
    seen: dict[str, str] | None = {} if is_training else None
    files = []
    for path, weight in weights.items():
        file = replace(read_prompt_file(path, options, seen=seen), weight=weight)
        if is_training and config.data.max_prompt_tokens is not None:
            file = _short_ones(file, tokenizer, config.data.max_prompt_tokens)
        if not file.records:
            raise ValueError(f"{file.description}: nothing is left")
        files.append(file)
    return files


def check_first_records(config: Config) -> None:
    """Read the first records of files of prompts and import the verifiers; for a dry run.

    Files that are not there are passed over, and so is the tokenizer's chat template.

    Raises:
        ValueError: a record without prompt or answer, an unknown verifier, or one that can't be
            imported.
    """
    data = config.data
    if data.task.name is not None:
        return
    register_verifiers(data.verifiers)
    options = _options(config, _AnyTemplate())
    for key in ("prompts", "validation_prompts"):
        for path in filter(os.path.exists, files_of(f"data.{key}", getattr(data, key))):
            try:
                records = first_prompts(path, FIRST_RECORDS, options)
            except ValueError as error:
                raise ValueError(f"data.{key}: {error}") from error
            _check_names(config, {record.task_name: record.place for record in records[::-1]}, key)


class _AnyTemplate:
    def chat(self, messages: Messages, **_: object) -> str:
        return "".join(message["content"] for message in messages)


def _template(tokenizer: Tokenizer) -> Template | None:
    has_one = isinstance(tokenizer, HFTokenizer) and tokenizer.has_chat_template
    return tokenizer if has_one else None


def _options(config: Config, template: Template | None) -> PromptOptions:
    data = config.data
    chat = ChatFormat(
        template,
        data.chat.apply == "always",
        data.chat.system,
        data.chat.suffix,
        data.chat.kwargs,
    )
    return PromptOptions(vars(data.fields), data.verifier, verifier_names(), chat)


def _short_ones(file: PromptFile, tokenizer: Tokenizer, limit: int) -> PromptFile:
    long = too_long([record.prompt for record in file.records], tokenizer, limit)
    return without(file, long, f"longer than data.max_prompt_tokens={limit}")


def _check_names(config: Config, used: Mapping[str, str], key: str) -> None:
    """Refuse names of verifiers that are not known; ``used`` has the place of each."""
    default = config.data.verifier
    for name, place in used.items():
        try:
            get_verifier(name)
        except ValueError as error:
            where = f"data.{key}: {place}: 'task_name'"
            if name == default:
                where = f"data.verifier={default}"
            raise ValueError(f"{where}: {error}") from error


def check_used(config: Config, streams: Sequence[PromptStream | None]) -> None:
    """Refuse a verifier of the configuration that no record of any file asks for.

    Raises:
        ValueError: see above.
    """
    files = [stream for stream in streams if stream is not None and stream.files]
    used = {name for stream in files for name in stream.task_names()}
    own, default = set(config.data.verifiers), config.data.verifier
    unused = None
    if default not in used and default != DataConfig().verifier:
        unused = f"data.verifier={default}"
    elif own and not own & used:
        unused = f"data.verifiers.{min(own)}"
    if files and unused:
        raise ValueError(
            f"{unused}: no prompt asks for it: their records name {', '.join(sorted(used))}. "
            "Leave it out, or take task_name out of the records (data.fields.task_name names "
            "another field)"
        )
