"""Trainers, prompts and verifiers around the fake actor, for the tests of the RL loop."""

from __future__ import annotations

from megatron_occ.config import load_config
from megatron_occ.data.prompt_stream import PromptStream
from megatron_occ.data.tasks import Problem
from megatron_occ.observe.progress import Timers
from megatron_occ.rl.evaluation import Validation
from megatron_occ.rl.exchange import distribute
from megatron_occ.rl.head_update import build_updater
from megatron_occ.rl.rewards import VerifierResult, Votes
from megatron_occ.rl.rollouts import RolloutSource
from megatron_occ.rl.sampler import Sampler
from megatron_occ.rl.trainer import GRPOTrainer
from megatron_occ.rollout import SamplingSettings
from tests.unit.fakes import ALPHABET, STOP_IDS, TOKENIZER, FakeActor

PRESETS = ("none", "detach", "ce", "policy", "occ", "occ_decoupled")
# lambda may be negative then: a clamp at 0 would hide differences
OPEN = "mtp.trunk.clamp=[null,null]"
DYNAMIC = ("rl.dynamic_sampling.enabled=true", "rl.dynamic_sampling.max_rounds=3")


class LetterTask:
    """Problem i of a split: a prompt that spells i in the first eight letters, base 8."""

    name, alphabet, stop = "letters", ALPHABET, "."

    def problem(self, split, index):
        prompt = "".join(ALPHABET[int(digit)] for digit in f"{index:o}")
        return Problem(prompt, "a.", prompt[-1], self.name)

    def params(self):
        return {}


def prompt_names(first, count):
    return [LetterTask().problem("train", index).prompt for index in range(first, first + count)]


class FakeVerifiers:
    """Scores with ``score(response, answer)``, in this process; keeps the scored texts.

    A ``VerifierResult`` that it returns is taken as it is.
    """

    def __init__(self, score):
        self.function, self.items = score, []

    def score(self, items):
        self.items += items
        return [self.result(self.function(text, answer)) for _, text, answer in items]

    def votes(self, questions):
        return [Votes(problem=f"verifier {each.name!r} reads no answers") for each in questions]

    @staticmethod
    def result(found):
        return found if isinstance(found, VerifierResult) else VerifierResult(float(found), "ok")


def in_turn(script):
    """Respond to each prompt with the texts of ``script[prompt]``, one after the other."""
    counts = {}

    def respond(prompt, _seed):
        counts[prompt] = counts.get(prompt, -1) + 1
        texts = script(prompt)
        return texts[counts[prompt] % len(texts)]

    return respond


def spread_only_in(names):
    return in_turn(lambda prompt: ["a.", "b."] if prompt in names else ["a."])


def has_an_a(response, answer):
    return "a" in response


def varied(response, answer):
    """A reward with spread in every group of the actor with seed 2: no update without gradient."""
    return response.count("a") + len(response) / 6


def rl_config(*overrides):
    """4 prompts of 4 samples a step, in 2 mini-batches of 8 sequences; 2 MTP depths."""
    small = (
        "mtp.num_layers=2",
        "rl.prompts_per_step=4",
        "rl.samples_per_prompt=4",
        "rl.mini_batches=2",
        "rl.micro_batch_size=8",
        "rl.steps=2",
        "rl.rollout.max_response_length=6",
        "rl.validation.problems=4",
    )
    return load_config([], [*small, *overrides])


def file_config(train, held_out, *overrides):
    """Prompts of at most 4 tokens, from files in place of a generated task."""
    files = (f"data.prompts={train}", f"data.validation_prompts={held_out}")
    room = ("model.max_position_embeddings=10", "data.verifier=exact")
    room += ("rl.prompts_per_step=1", "rl.mini_batches=1", "rl.micro_batch_size=4")
    return rl_config("data.task={name: null, params: {}}", *files, *room, *overrides)


def make_source(config, actor, score=has_an_a, stream=None):
    rollout = config.rl.rollout
    sampler = Sampler(
        actor,
        actor,
        TOKENIZER,
        score if hasattr(score, "score") else FakeVerifiers(score),
        SamplingSettings(rollout.temperature, rollout.max_response_length, STOP_IDS),
        max_prompt_length=10,
    )
    return RolloutSource(sampler, stream or PromptStream(LetterTask()), config.rl, config.seed)


class Recorder:
    """Stands in for the metrics logger and the rollout log."""

    def __init__(self):
        self.lines, self.events, self.samples = [], [], []

    def log(self, phase, step, metrics):
        self.lines.append((phase, step, metrics))

    def event(self, step, message, *, kind="warning"):
        self.events.append((step, message))

    def write(self, step, samples):
        self.samples.append((step, samples))


def make_trainer(config, actor, score=has_an_a, **callbacks):
    """A trainer whose log, rollout log, saves and validations are in ``trainer.recorder``."""
    recorder, source = Recorder(), make_source(config, actor, score)
    trainer = GRPOTrainer(
        config,
        build_updater(config, actor),
        source,
        validate=callbacks.get("validate", lambda: Validation({"avg@1": 0.0}, [])),
        logger=recorder,
        rollout_log=recorder,
        save=callbacks.get("save", lambda step: None),
        supervision=callbacks.get("supervision"),
    )
    trainer.recorder = recorder
    return trainer


def four_updates(*overrides, micro=2, layout=None, **callbacks):
    """A trainer with 4 updates a step, of 4 sequences each, and its actor."""
    config = rl_config("rl.mini_batches=4", f"rl.micro_batch_size={micro}", *overrides)
    actor = FakeActor(layout=layout, seed=2)
    return make_trainer(config, actor, varied, **callbacks), actor


def mini_batches(trainer, change=lambda batch: batch):
    """This rank's part of the next step's mini-batches, with old log-probs."""
    rollouts, updater = trainer.rollouts.generate(Timers()), trainer.updater
    batch = change(rollouts.batch)
    parts = distribute(
        batch, rollouts.owners, trainer.config.rl, updater.actor, parts=updater.parts
    )
    return updater.compute_logprobs(parts)


def run_updates(trainer, change=lambda batch: batch):
    """Metrics of each update of the next step."""
    return [trainer.updater.run_update(mini).metrics for mini in mini_batches(trainer, change)]


def weights(actor):
    return {name: p.detach().clone() for name, p in actor.model.named_parameters()}
