"""What phases read: corpus and prompts, checked before anything is built."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_occ.config.schema import Config, DataConfig
from megatron_occ.data.chat import ChatFormat, Template
from megatron_occ.data.corpus import TaskCorpus
from megatron_occ.data.fields import Messages
from megatron_occ.data.prompt_checks import check_prompts, shared_prompts, too_long
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
from megatron_occ.rl.evaluation import held_out_problems
from megatron_occ.rl.pretraining import Corpus
from megatron_occ.rl.rewards import get_verifier, register_verifiers, verifier_names

# Parts of the held-out problems. Pretraining may end at a pass rate: a lucky moment of its own part
# leaves RL's validation as it is.
RL_PART, PRETRAINING_PART = 0, 1
# that a dry run reads of a file
_FIRST_RECORDS = 100


@dataclass(frozen=True)
class Inputs:
    """Data of a command.

    Args:
        corpus: of pretraining; None where there is nothing to pretrain.
        fingerprint: of the corpus.
        train: prompts of RL; None where nothing is trained on them.
        held_out: prompts to measure on; None where nothing is measured.
        warnings: about the data, for the run's log.
        notes: what was read, a line for each file.
    """

    corpus: Corpus | None = None
    fingerprint: str = ""
    train: PromptStream | None = None
    held_out: PromptStream | None = None
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()


def read_inputs(
    config: Config,
    task: Task | None,
    tokenizer: Tokenizer,
    *,
    pretrains: bool = False,
    trains: bool = False,
    validates: bool = False,
) -> Inputs:
    """Open and check the data of a command.

    Args:
        config: of the run.
        task: source of generated problems.
        tokenizer: of all texts.
        pretrains: there is pretraining to do, which may be measured on held-out problems.
        trains: there are training prompts to answer.
        validates: there are held-out problems to answer.

    Raises:
        ValueError: a bad file, a first sequence that does not fit, a record whose verifier is not
            known, or fewer held-out problems than asked for.
    """
    corpus, fingerprint = _corpus(config, task, tokenizer) if pretrains else (None, "")
    train = _prompts(config, task, tokenizer, "train") if trains else None
    measures = pretrains and config.pretrain.validate_every > 0
    held_out = None
    if validates or measures:
        held_out = _prompts(config, task, tokenizer, "validation")
        _check_held_out(held_out, config, PRETRAINING_PART if measures else RL_PART)
    both = train is not None and held_out is not None
    warnings = _overlap(config, train, held_out) if both else []
    _check_unused(config, (train, held_out))
    notes = _notes(train, held_out)
    return Inputs(corpus, fingerprint, train, held_out, warnings, notes)


def _notes(train: PromptStream | None, held_out: PromptStream | None) -> list[str]:
    """What was read, a line for each file."""
    streams = {"data.prompts": train, "data.validation_prompts": held_out}
    return [
        f"{key}: {file.description}"
        for key, stream in streams.items()
        if stream is not None
        for file in stream.files
    ]


def prompt_room(config: Config) -> int:
    """Tokens of a prompt at most: it shares the position range with its response."""
    return config.model.max_position_embeddings - config.rl.rollout.max_response_length


def check_lengths(config: Config, inputs: Inputs, tokenizer: Tokenizer) -> None:
    """Tokenize all prompts of files, and the first ones of a generated task.

    Problems of the package's own tasks are all of one length; those of reasoning-gym are not, and
    a later one that does not fit ends the run where it comes up.

    Raises:
        ValueError: prompts that the tokenizer does not know or that leave no room for a response.
    """
    counts = (
        (inputs.train, config.rl.prompts_per_step),
        (inputs.held_out, config.rl.validation.problems),
    )
    prompts = [
        (stream.place(record), record)
        for stream, count in counts
        if stream is not None
        for record in stream.records(count)
    ]
    tokens = "tokenizer.path" if config.tokenizer.kind == "hf" else "tokenizer.alphabet"
    remedy = (
        "Shorten what is too long, lower rl.rollout.max_response_length="
        f"{config.rl.rollout.max_response_length} or raise model.max_position_embeddings="
        f"{config.model.max_position_embeddings}; characters have to be those of {tokens}"
    )
    check_prompts(prompts, tokenizer, prompt_room(config), remedy)


def _corpus(config: Config, task: Task | None, tokenizer: Tokenizer) -> tuple[Corpus, str]:
    corpus: Corpus
    if config.data.corpus is not None:
        from megatron_occ.mcore.corpus import IndexedCorpus

        corpus = IndexedCorpus(config.data.corpus, tokenizer, config.seed)
        fingerprint = corpus.fingerprint()
    else:
        assert task is not None, "validate refuses a run without corpus and task"
        corpus = TaskCorpus(task, tokenizer, config.seed)
        fingerprint = PromptStream(task, config.seed).fingerprint()
    corpus.batch(0, 1, config.pretrain.sequence_length)
    return corpus, fingerprint


def _prompts(config: Config, task: Task | None, tokenizer: Tokenizer, split: str) -> PromptStream:
    key = "prompts" if split == "train" else "validation_prompts"
    given = getattr(config.data, key)
    if given is None:
        assert task is not None, "validate refuses a run without prompts and task"
        return PromptStream(task, config.seed, split)
    try:
        files = _files(config, given, tokenizer, is_training=split == "train")
        stream = PromptStream(files, config.seed, split)
    except ValueError as error:
        raise ValueError(f"data.{key}: {error}") from error
    _check_names(config, stream.task_names(), key)
    if split == "train":
        _check_step(config, stream)
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
    config: Config, given: str | dict[str, float | None], tokenizer: Tokenizer, *, is_training: bool
) -> list[PromptFile]:
    weights = given if isinstance(given, dict) else {given: None}
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
        given = getattr(data, key)
        paths = list(given) if isinstance(given, dict) else [given] if given else []
        for path in filter(os.path.exists, paths):
            try:
                records = first_prompts(path, _FIRST_RECORDS, options)
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


def _check_unused(config: Config, streams: Sequence[PromptStream | None]) -> None:
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


def _overlap(config: Config, train: PromptStream, held_out: PromptStream) -> list[str]:
    """A warning where files share prompts; generated tasks keep their problems apart."""
    if train.size is None:
        return []
    measured = held_out_problems(held_out, config.rl.validation.problems, RL_PART)
    shared = shared_prompts(train.records(0), measured)
    if shared == 0:
        return []
    return [
        f"{shared} of the {len(measured)} validation prompts are also training prompts: validation "
        "measures in part what was trained on. Take them out of data.prompts="
        f"{config.data.prompts}, or give other data.validation_prompts"
    ]


def _check_held_out(stream: PromptStream, config: Config, last_part: int) -> None:
    count = config.rl.validation.problems
    try:
        for part in range(last_part + 1):
            held_out_problems(stream, count, part)
    except ValueError as error:
        both = "pretraining and RL are measured on different ones. " if last_part else ""
        raise ValueError(f"rl.validation.problems={count}: {both}{error}") from None
