"""What phases read: corpus and prompts, checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_occ.config.evaluation import eval_settings
from megatron_occ.config.schema import Config
from megatron_occ.data.corpus import TaskCorpus
from megatron_occ.data.prompt_checks import check_prompts, shared_prompts
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.data.tasks import Task
from megatron_occ.data.tokenizers import Tokenizer
from megatron_occ.phases.prompt_files import check_used, open_held_out, open_training
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
        held_out: sets of prompts to measure on, by name; none where nothing is measured.
        evaluates: they are measured as ``eval`` says, and without ``train`` as it says alone.
        warnings: about the data, for the run's log.
        notes: what was read, a line for each file.
    """

    corpus: Corpus | None = None
    fingerprint: str = ""
    train: PromptStream | None = None
    held_out: Mapping[str, PromptStream] = field(default_factory=dict)
    evaluates: bool = False
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()

    def training(self) -> list[PromptStream]:
        """The training prompts, none or one of them."""
        return [] if self.train is None else [self.train]


def read_inputs(
    config: Config,
    task: Task | None,
    tokenizer: Tokenizer,
    *,
    pretrains: bool = False,
    trains: bool = False,
    validates: bool = False,
    evaluates: bool = False,
) -> Inputs:
    """Open and check the data of a command.

    Args:
        config: of the run.
        task: source of generated problems.
        tokenizer: of all texts.
        pretrains: there is pretraining to do, which may be measured on held-out problems.
        trains: there are training prompts to answer.
        validates: there are held-out problems to answer, as ``rl.validation`` says.
        evaluates: there are held-out problems to answer, as ``eval`` says.

    Raises:
        ValueError: a bad file, a first sequence that does not fit, a record whose verifier is not
            known, or fewer held-out problems than asked for.
    """
    corpus, fingerprint = _corpus(config, task, tokenizer) if pretrains else (None, "")
    train = open_training(config, task, tokenizer) if trains else None
    measures = pretrains and config.pretrain.validate_every > 0
    held_out: dict[str, PromptStream] = {}
    if validates or measures or evaluates:
        held_out = open_held_out(config, task, tokenizer)
    for stream in held_out.values():
        if validates or measures:
            _check_held_out(stream, config, PRETRAINING_PART if measures else RL_PART)
        if evaluates:
            _check_evaluated(stream, config)
    warnings = [] if train is None else _overlaps(config, train, held_out)
    inputs = Inputs(corpus, fingerprint, train, held_out, evaluates, warnings)
    check_used(config, (*inputs.training(), *held_out.values()))
    return replace(inputs, notes=_notes(config, inputs))


def _notes(config: Config, inputs: Inputs) -> list[str]:
    """What was read, a line for each file."""
    notes = [f"data.prompts: {f.description}" for stream in inputs.training() for f in stream.files]
    for name, stream in inputs.held_out.items():
        key = f"data.validation_prompts.{name}" if name else "data.validation_prompts"
        notes += [f"{key}: {file.description}" for file in stream.files]
    return notes


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
    rl, settings = config.rl, eval_settings(config)
    held_out = list(inputs.held_out.values())
    if inputs.train is not None or not inputs.evaluates:
        sizes = [(stream, rl.prompts_per_step) for stream in inputs.training()]
        sizes += [(stream, rl.validation.problems) for stream in held_out]
        length = rl.rollout.max_response_length
        _check_room(config, tokenizer, sizes, "rl.rollout.max_response_length", length)
    if inputs.evaluates:
        # a file is read whole, whatever the number
        sizes = [(stream, settings.problems or 0) for stream in held_out]
        length = settings.max_response_length
        _check_room(config, tokenizer, sizes, settings.length_key, length)


def _check_room(
    config: Config,
    tokenizer: Tokenizer,
    sizes: Sequence[tuple[PromptStream, int]],
    key: str,
    length: int,
) -> None:
    """Check prompts, of generated tasks so many, that go with responses of ``length`` (``key``)."""
    prompts = [
        (stream.place(record), record)
        for stream, count in sizes
        for record in stream.records(count)
    ]
    limit = config.model.max_position_embeddings
    tokens = "tokenizer.path" if config.tokenizer.kind == "hf" else "tokenizer.alphabet"
    remedy = (
        f"Shorten what is too long, lower {key}={length} or raise model.max_position_embeddings="
        f"{limit}; characters have to be those of {tokens}"
    )
    check_prompts(prompts, tokenizer, limit - length, remedy)


def _corpus(config: Config, task: Task | None, tokenizer: Tokenizer) -> tuple[Corpus, str]:
    corpus: Corpus
    if config.data.corpus is not None:
        from megatron_occ.mcore.corpus import IndexedCorpus

        corpus = IndexedCorpus(config.data.corpus, tokenizer, config.seed)
        fingerprint = corpus.fingerprint()
    else:
        assert task is not None, "validate refuses a run without corpus and task"
        noise = config.pretrain.label_noise
        corpus = TaskCorpus(task, tokenizer, config.seed, label_noise=noise)
        fingerprint = PromptStream(task, config.seed).fingerprint()
    corpus.batch(0, 1, config.pretrain.sequence_length)
    return corpus, fingerprint


def _overlaps(
    config: Config, train: PromptStream, held_out: Mapping[str, PromptStream]
) -> list[str]:
    """A warning for each set that shares prompts with training; generated problems share none."""
    if train.size is None:
        return []
    prompts = train.records(0)
    warnings = []
    for name, stream in held_out.items():
        measured = held_out_problems(stream, config.rl.validation.problems, RL_PART)
        shared = shared_prompts(prompts, measured)
        which = f" of {name}" if name else ""
        if shared > 0:
            warnings.append(
                f"{shared} of the {len(measured)} validation prompts{which} are also training "
                "prompts: validation measures in part what was trained on. Take them out of "
                f"data.prompts={config.data.prompts}, or give other data.validation_prompts"
            )
    return warnings


def _check_held_out(stream: PromptStream, config: Config, last_part: int) -> None:
    count = config.rl.validation.problems
    try:
        for part in range(last_part + 1):
            held_out_problems(stream, count, part)
    except ValueError as error:
        both = "pretraining and RL are measured on different ones. " if last_part else ""
        raise ValueError(f"rl.validation.problems={count}: {both}{error}") from None


def _check_evaluated(stream: PromptStream, config: Config) -> None:
    settings = eval_settings(config)
    try:
        held_out_problems(stream, settings.problems)
    except ValueError as error:
        key = "rl.validation" if config.eval.problems is None else "eval"
        raise ValueError(f"{key}.problems={settings.problems}: {error}") from None
