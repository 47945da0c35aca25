"""What a run reads: verifiers, tokenizer, corpus and prompts, checked before anything is built."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from megatron_occ.config.schema import Config
from megatron_occ.data.corpus import TaskCorpus
from megatron_occ.data.prompts import PromptStream
from megatron_occ.data.tasks import Task
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
    """

    corpus: Corpus | None = None
    fingerprint: str = ""
    train: PromptStream | None = None
    held_out: PromptStream | None = None


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
    return Inputs(corpus, fingerprint, train, held_out)


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


def read_tokenizer(config: Config, task: Task | None) -> Tokenizer:
    """The tokenizer; characters of the task where no alphabet is given."""
    section = config.tokenizer
    alphabet = section.alphabet
    if section.kind == "char" and alphabet is None and task is not None:
        alphabet = task.alphabet
    return build_tokenizer(section.kind, alphabet=alphabet, path=section.path)


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
    path = config.data.prompts if split == "train" else config.data.validation_prompts
    source = path if path is not None else task
    assert source is not None, "validate refuses a run without prompts and task"
    stream = PromptStream(source, config.seed, split, default_task_name=config.data.verifier)
    for name in stream.task_names():
        get_verifier(name)
    return stream


def _check_held_out(stream: PromptStream, config: Config, last_part: int) -> None:
    count = config.rl.validation.problems
    try:
        for part in range(last_part + 1):
            held_out_problems(stream, count, part)
    except ValueError as error:
        both = "pretraining and RL are measured on different ones. " if last_part else ""
        raise ValueError(f"rl.validation.problems={count}: {both}{error}") from None
