"""What phases read: corpus and prompts, checked before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_occ.config.schema import Config
from megatron_occ.data.corpus import TaskCorpus
from megatron_occ.data.prompt_checks import check_prompts, shared_prompts
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.data.tasks import Task
from megatron_occ.data.tokenizers import Tokenizer
from megatron_occ.phases.prompt_files import check_used, open_prompts
from megatron_occ.rl.evaluation import held_out_problems
from megatron_occ.rl.pretraining import Corpus

# Parts of the held-out problems. Pretraining may end at a pass rate: a lucky moment of its own part
# leaves RL's validation as it is.
RL_PART, PRETRAINING_PART = 0, 1


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
    train = open_prompts(config, task, tokenizer, "train") if trains else None
    measures = pretrains and config.pretrain.validate_every > 0
    held_out = None
    if validates or measures:
        held_out = open_prompts(config, task, tokenizer, "validation")
        _check_held_out(held_out, config, PRETRAINING_PART if measures else RL_PART)
    both = train is not None and held_out is not None
    warnings = _overlap(config, train, held_out) if both else []
    check_used(config, (train, held_out))
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
