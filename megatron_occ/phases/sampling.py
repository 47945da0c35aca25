"""Responses of a run's actor: the sampler that the configuration describes, and what uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace

from megatron_occ.config.evaluation import EvalSettings
from megatron_occ.data.from_config import read_stops
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.phases.engines import build_engine
from megatron_occ.phases.inputs import prompt_room
from megatron_occ.rl.evaluation import Validation, evaluate
from megatron_occ.rl.rewards import VerifierPool, cores_of_rank
from megatron_occ.rl.rollouts import RolloutSource
from megatron_occ.rl.sampler import Sampler
from megatron_occ.rollout import SamplingSettings
from megatron_occ.run import Run


@contextmanager
def sampling(run: Run, actor: MegatronGPTActor, prompts: PromptStream) -> Iterator[Sampler]:
    """A sampler on an engine and verifiers of its own, closed at the end; called by all ranks.

    Args:
        run: its configuration names engine, sampling and time limit.
        actor: the policy.
        prompts: some of them test whether servers have the right weights.

    Raises:
        EngineError: a server does not come up or can't do the work.
    """
    config = run.config
    workers = config.data.verifier_workers or cores_of_rank()
    with (
        VerifierPool(config.data.verifier_timeout, workers) as verifiers,
        closing(build_engine(config, actor, run.tokenizer, prompts)) as engine,
    ):
        room = prompt_room(config)
        yield Sampler(
            engine, actor, run.tokenizer, verifiers, sampling_settings(run), max_prompt_length=room
        )


def sampling_settings(run: Run) -> SamplingSettings:
    """``rl.rollout`` with what ends a response in this run's text."""
    rollout = run.config.rl.rollout
    stops = read_stops(run.config, run.task, run.tokenizer)
    return SamplingSettings(
        temperature=rollout.temperature,
        max_response_length=rollout.max_response_length,
        stop_ids=stops.ids,
        stop_strings=stops.texts,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
    )


@contextmanager
def rollout_source(
    run: Run, actor: MegatronGPTActor, train: PromptStream, *, keep_states: bool = False
) -> Iterator[RolloutSource]:
    """Batches of the actor's responses to training prompts; its sampler may serve others too.

    Args:
        run: its section ``rl`` says how many, and its seed which.
        actor: the policy, sampled from as it is at the time.
        train: prompts.
        keep_states: hand on the trunk states of all responses.
    """
    with sampling(run, actor, train) as sampler:
        config = run.config
        yield RolloutSource(sampler, train, config.rl, config.seed, keep_states=keep_states)


class HeldOut:
    """Measures an actor on a part of the held-out problems; the context of its own sampler.

    Args:
        run: its configuration names engine, sampling and amount.
        actor: measured as it is at the time.
        sets: prompts by name.
        part: of them.
    """

    def __init__(
        self, run: Run, actor: MegatronGPTActor, sets: Mapping[str, PromptStream], part: int
    ) -> None:
        self.run, self.actor, self.sets, self.part = run, actor, sets, part
        self._sampler: Sampler | None = None
        self._opened = ExitStack()

    def __enter__(self) -> HeldOut:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def measure(self, before_set: Callable[[], None]) -> Validation:
        """See ``evaluate``."""
        assert self.sets, "nothing is measured without held-out problems"
        # with the first measurement, if there is any: servers may be waited for
        if self._sampler is None:
            opened = sampling(self.run, self.actor, first_of(self.sets))
            self._sampler = self._opened.enter_context(opened)
        return measure(self.run, self._sampler, self.sets, self.part, before_set)

    def abort(self) -> None:
        """Cut the running measurement short, from any thread."""
        if self._sampler is not None:
            self._sampler.engine.abort()


def measure(
    run: Run,
    sampler: Sampler,
    held_out: Mapping[str, PromptStream],
    part: int,
    before_set: Callable[[], None],
) -> Validation:
    """Pass rates of a sampler's actor on a part of the held-out problems, see ``evaluate``."""
    config = run.config
    return evaluate(
        sampler, held_out, config.rl.validation, config.seed, part=part, before_set=before_set
    )


def first_of(sets: Mapping[str, PromptStream]) -> PromptStream:
    """The prompts of the first set."""
    return next(iter(sets.values()))


def sampler_for(settings: EvalSettings, run: Run, sampler: Sampler) -> Sampler:
    """A sampler on the same engine and verifiers that draws as ``eval`` says."""
    changed = replace(
        sampler.sampling,
        top_p=settings.top_p,
        top_k=settings.top_k,
        max_response_length=settings.max_response_length,
    )
    room = run.config.model.max_position_embeddings - settings.max_response_length
    return replace(
        sampler, sampling=changed, max_prompt_length=room, length_key=settings.length_key
    )
