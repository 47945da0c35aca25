"""Tokenizers, generated tasks and prompts; batches of pretraining in `corpus`. No Megatron."""

from __future__ import annotations

from megatron_occ.data.fields import extract_final_answer
from megatron_occ.data.jsonl import read_jsonl_texts
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.data.prompts import PromptOptions, PromptRecord, read_prompts
from megatron_occ.data.tasks import (
    Problem,
    ReversedAddition,
    ReversedMultiplication,
    Task,
    build_task,
)
from megatron_occ.data.tokenizers import (
    CharTokenizer,
    HFTokenizer,
    Tokenizer,
    build_tokenizer,
)

__all__ = [
    "CharTokenizer",
    "HFTokenizer",
    "Problem",
    "PromptOptions",
    "PromptRecord",
    "PromptStream",
    "ReversedAddition",
    "ReversedMultiplication",
    "Task",
    "Tokenizer",
    "build_task",
    "build_tokenizer",
    "extract_final_answer",
    "read_jsonl_texts",
    "read_prompts",
]
