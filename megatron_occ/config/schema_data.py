"""The sections of the configuration that say what is learnt from: tokenizer, task, prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_occ.config import limits
from megatron_occ.config.options import option, section


@dataclass
class TokenizerConfig:
    kind: str = option(
        "char", "char, or hf for a local Hugging Face folder", choices=("char", "hf")
    )
    alphabet: str | None = option(None, "characters of a char tokenizer (null: the task's own)")
    path: str | None = option(None, "folder of a Hugging Face tokenizer", reads="path")
    unused_rows: bool = option(
        False,
        "rows of the output layer beyond the tokenizer's ids take part in softmax and are drawn "
        "(with a rollout server they always do)",
    )


@dataclass
class TaskConfig:
    name: str | None = option("reversed_multiplication", "generated task (null: use data.prompts)")
    params: dict[str, Any] = option(
        {}, "parameters of the generated task, e.g. {digits_a: 3}", reads="values"
    )


@dataclass
class FieldsConfig:
    prompt: str | None = option(None, "prompt, text or messages (null: recognised)")
    answer: str | None = option(None, "reference answer (null: recognised)")
    task_name: str | None = option(None, "name of the verifier (null: task_name, if there is one)")


@dataclass
class ChatConfig:
    apply: str = option(
        "auto",
        "whose prompts get the tokenizer's chat template: those that are messages, or text too",
        choices=("auto", "always"),
    )
    system: str | None = option(None, "system message before each chat (null: none)", reads="text")
    suffix: str = option(
        "", "text appended to each prompt, inside the user's message of a chat", reads="text"
    )
    kwargs: dict[str, Any] = option(
        {}, "variables of the template, e.g. {enable_thinking: false}", reads="values"
    )


@dataclass
class DataConfig:
    task: TaskConfig = section(TaskConfig, "generated problems")
    corpus: str | None = option(
        None, "pretraining text: path prefix written by preprocess_data.py", reads="path"
    )
    prompts: str | dict[str, Any] | None = option(
        None,
        "RL prompts: jsonl, json or parquet, or several, {a.jsonl: 2, b.parquet: 1} by weight",
        reads="path",
    )
    validation_prompts: str | dict[str, Any] | None = option(
        None,
        "held-out prompts: jsonl, json or parquet, or several sets, {aime24: a.jsonl} by name",
        reads="path",
    )
    fields: FieldsConfig = section(FieldsConfig, "which fields of a record hold what")
    chat: ChatConfig = section(ChatConfig, "chat template and text around prompts")
    max_prompt_tokens: int | None = option(
        None,
        "drop training prompts longer than this (null: a prompt that does not fit is an error)",
        minimum=1,
        maximum=limits.TOKENS,
    )
    verifier: str = option("math", "verifier for records without a task_name")
    verifiers: dict[str, Any] = option(
        {}, "your own verifiers, by task_name, e.g. {echo: 'my_module:echo_verifier'}"
    )
    verifier_timeout: float = option(
        5.0, "time limit of a verifier, in seconds per response", above=0, maximum=limits.SECONDS
    )
    verifier_workers: int | None = option(
        None,
        "verifier processes per rank (null: its share of the node's cores)",
        minimum=1,
        maximum=limits.WORKERS,
    )
