"""What a run reads: verifiers, tokenizer, corpus and prompts, checked before anything is built."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_occ.config.schema import Config
from megatron_occ.data.corpus import TaskCorpus
from megatron_occ.data.prompt_checks import check_prompts, shared_prompts
from megatron_occ.data.prompts import PromptStream
from megatron_occ.data.tasks import Task, UnknownTask, build_task
from megatron_occ.data.tokenizers import Tokenizer, build_tokenizer
from megatron_occ.pretraining import Corpus
from megatron_occ.rl.evaluation import held_out_problems
from megatron_occ.rl.rewards import get_verifier, register_verifier

# Parts of the held-out problems. Pretraining may end at a pass rate: a lucky moment of its own part
# leaves RL's validation as it is.
RL_PART, PRETRAINING_PART = 0, 1


@dataclass(frozen=True)
class Inputs:
    """Data of a command.

    Args:
        corpus: of pretraining; None where there is nothing to pretrain.
        fingerprint: of the corpus.
        train: prompts of RL; None without RL.
        held_out: prompts to measure on; None where nothing is measured.
        warnings: about the data, for the run's log.
    """

    corpus: Corpus | None = None
    fingerprint: str = ""
    train: PromptStream | None = None
    held_out: PromptStream | None = None
    warnings: Sequence[str] = ()


def read_inputs(
    config: Config,
    task: Task | None,
    tokenizer: Tokenizer,
    *,
    pretrains: bool,
    trains: bool,
    evaluates: bool = False,
) -> Inputs:
    """Open and check the data of a command.

    Args:
        config: of the run.
        task: source of generated problems.
        tokenizer: of all texts.
        pretrains: there is pretraining to do.
        trains: there is RL to do.
        evaluates: a checkpoint is measured.

    Raises:
        ValueError: a bad file, a first sequence that does not fit, a record whose verifier is not
            known, or fewer held-out problems than asked for.
    """
    corpus, fingerprint = _corpus(config, task, tokenizer) if pretrains else (None, "")
    train = _prompts(config, task, "train") if trains else None
    measures = pretrains and config.pretrain.validate_every > 0
    held_out = None
    if trains or evaluates or measures:
        held_out = _prompts(config, task, "validation")
        _check_held_out(held_out, config, PRETRAINING_PART if measures else RL_PART)
    warnings = _overlap(config, train, held_out) if train is not None else []
    return Inputs(corpus, fingerprint, train, held_out, warnings)


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


def register_verifiers(verifiers: dict[str, str]) -> None:
    """Make the user's verifiers known by name; one that can't be imported is told before any work.

    Modules are also looked for in the current folder, which ``python -m`` does and a console script
    does not. Verifier processes inherit the search path.
    """
    if verifiers and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name, path in verifiers.items():
        register_verifier(name, path)
        get_verifier(name)


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


def _prompts(config: Config, task: Task | None, split: str) -> PromptStream:
    key = "prompts" if split == "train" else "validation_prompts"
    path = getattr(config.data, key)
    source = path if path is not None else task
    assert source is not None, "validate refuses a run without prompts and task"
    default = config.data.verifier
    try:
        stream = PromptStream(source, config.seed, split, default_task_name=default)
    except ValueError as error:
        raise ValueError(f"data.{key}: {error}") from error
    for name, place in stream.task_names().items():
        try:
            get_verifier(name)
        except ValueError as error:
            where = f"data.{key}: {place}: 'task_name'"
            if name == default:
                where = f"data.verifier={default}"
            raise ValueError(f"{where}: {error}") from error
    return stream


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
