"""GRPO steps by TRL's ``GRPOTrainer`` on the CPU, timed, on this project's weights.

TRL gets the configuration that suits it best here: fp32, a whole mini-batch in one forward pass,
no recompute, no reference model (no KL penalty), no logits processor, no evaluation, checkpoint or
log, and prompts in the given order. Loss and advantages are the nearest to ours (token mean, clip
0.2 / 0.28, group normalisation). It trains the trunk alone: no MTP layer takes part, so it does
less than any regime here with an MTP loss.

A step is one rollout and the updates on it, from the end of the step before: what TRL does between
two updates counts, the start of the training does not.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_occ.data.tokenizers import CharTokenizer

INSTALL = "TRL is not installed: pip install trl==1.16.0 -c constraints.txt"

# methods of GRPOTrainer; the whole rollout is _ROLLOUT, the next three are in it
_ROLLOUT, _GENERATION, _REWARD, _LOGPROBS, _FETCH = _METHODS = (
    "_prepare_inputs",
    "_generate",
    "_calculate_rewards",
    "_get_per_token_logps_and_entropies",
    "get_batch_samples",
)

# (responses, reference answers) -> scores
Reward = Callable[[list[str], list[str]], list[float]]


@dataclass(frozen=True)
class TRLSettings:
    """What a step does.

    Args:
        prompts_per_step: prompts of one rollout.
        samples_per_prompt: responses of each, the group.
        updates: optimizer updates on a rollout.
        max_new_tokens: tokens of a response at most.
        lr: constant learning rate.
        temperature: of sampling and of the log-probs.
        betas: Adam's decays.
        micro_batch_size: sequences a forward pass; None: a whole mini-batch.
    """

    prompts_per_step: int = 64
    samples_per_prompt: int = 8
    updates: int = 4
    max_new_tokens: int = 20
    lr: float = 7e-5
    temperature: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    micro_batch_size: int | None = None


@dataclass(frozen=True)
class TRLStep:
    """Seconds of one step and of its parts, and what it generated.

    Args:
        seconds: the whole step.
        generation: prompts to token ids, generation, token ids to text.
        reward: the reward function and what TRL does with its scores.
        logprobs: old log-probs.
        training: forward, backward and optimizer of all updates.
        tokens: of all responses, stop tokens included.
        mean_reward: over all responses.
    """

    seconds: float
    generation: float
    reward: float
    logprobs: float
    training: float
    tokens: int
    mean_reward: float

    @property
    def other(self) -> float:
        """Seconds in none of the parts: data loader, advantages, padding, shuffling, metrics."""
        return self.seconds - self.generation - self.reward - self.logprobs - self.training


def run_grpo(
    peer: Any,
    tokenizer: CharTokenizer,
    prompts: Sequence[str],
    answers: Sequence[str],
    reward: Reward,
    settings: TRLSettings,
    *,
    between: Callable[[int], None] | None = None,
    seed: int = 0,
) -> list[TRLStep]:
    """Train for as many steps as there are prompts for; the weights of ``peer`` change.

    Args:
        peer: from ``export_peer``, with the stop ids.
        tokenizer: the run's.
        prompts: a multiple of ``settings.prompts_per_step``, taken in this order.
        answers: reference answer of each prompt.
        reward: scores of responses.
        settings: see :class:`TRLSettings`.
        between: called after each step with its number from 0, outside the timed part: another
            trainer's step, interleaved.
        seed: of sampling.

    Returns:
        One entry a step. The first is a warm-up.

    Raises:
        SystemExit: TRL is not installed.
    """
    try:
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import GRPOTrainer
    except ImportError as error:
        raise SystemExit(INSTALL) from error
    steps, rest = divmod(len(prompts), settings.prompts_per_step)
    if rest or not steps:
        raise ValueError(f"{len(prompts)} prompts are not steps of {settings.prompts_per_step}")
    rows = [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    clock = _Clock(settings.updates, between)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=peer,
            reward_funcs=clock.scored(reward),
            args=_arguments(settings, steps, folder, seed),
            train_dataset=Dataset.from_list(rows),
            processing_class=hugging_face_tokenizer(tokenizer),
        )
        # it prints a line at the end, with or without logs
        trainer.remove_callback(PrinterCallback)
        clock.watch(trainer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            trainer.train()
    return clock.steps


def hugging_face_tokenizer(tokenizer: CharTokenizer) -> Any:
    """The same ids as a ``PreTrainedTokenizerFast``, padded on the left."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": tokenizer.pad_id, "<eos>": tokenizer.eos_id}
    ids = {char: tokenizer.encode(char)[0] for char in tokenizer.alphabet}
    inner = Tokenizer(models.WordLevel(special | ids))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def _micro_batches(settings: TRLSettings) -> tuple[int, int]:
    """Sequences of a micro-batch, and micro-batches of an update."""
    rows = settings.prompts_per_step * settings.samples_per_prompt
    mini_batch, rest = divmod(rows, settings.updates)
    size = settings.micro_batch_size or mini_batch
    if rest or mini_batch % size:
        raise ValueError(
            f"{rows} responses do not make {settings.updates} updates of micro-batches of {size}"
        )
    return size, mini_batch // size


def _arguments(settings: TRLSettings, steps: int, folder: str, seed: int) -> Any:
    from trl import GRPOConfig

    size, count = _micro_batches(settings)
    return GRPOConfig(
        output_dir=folder,
        seed=seed,
        use_cpu=True,
        bf16=False,
        # no recompute: False would do the same, with a warning about the name
        gradient_checkpointing=None,
        dataloader_pin_memory=False,
        # what a rollout holds and how it is cut
        num_generations=settings.samples_per_prompt,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=count,
        steps_per_generation=settings.updates * count,
        max_steps=steps * settings.updates,
        shuffle_dataset=False,
        # sampling; the other knobs are off by default and would add logits processors
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        # loss
        beta=0.0,
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        # optimizer
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        # nothing beside training
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
    )


class _Clock:
    """Times the parts of TRL's training loop by wrapping the methods that do them."""

    def __init__(self, updates: int, between: Callable[[int], None] | None) -> None:
        self.updates, self.between = updates, between
        self.steps: list[TRLStep] = []
        self._tokens, self._mean_reward = 0, 0.0
        self._start_step()

    def scored(self, reward: Reward) -> Callable[..., list[float]]:
        """The reward function in TRL's form; counts tokens and scores on the way."""

        def score(
            completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
        ) -> list[float]:
            scores = [float(value) for value in reward(completions, answer)]
            self._tokens = sum(map(len, completion_ids))
            self._mean_reward = sum(scores) / len(scores)
            return scores

        return score

    def watch(self, trainer: Any) -> None:
        """Wrap a trainer's methods; to be called before its ``train``."""
        from transformers import TrainerCallback

        clock = self

        class Boundaries(TrainerCallback):
            def on_train_begin(self, *_args: Any, **_options: Any) -> None:
                clock._start_step()

            def on_step_end(self, _args: Any, state: Any, *_rest: Any, **_options: Any) -> None:
                if state.global_step % clock.updates == 0:
                    clock._end_step()

        trainer.add_callback(Boundaries())
        for method in _METHODS:
            setattr(trainer, method, self._timed(method, getattr(trainer, method)))

    def _timed(self, name: str, method: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = method(*args, **kwargs)
            # log-probs with a gradient belong to the training
            if name != _LOGPROBS or not torch.is_grad_enabled():
                self._inside[name] += time.perf_counter() - start
            return result

        return timed

    def _start_step(self) -> None:
        self._inside = dict.fromkeys(_METHODS, 0.0)
        self._started = time.perf_counter()

    def _end_step(self) -> None:
        seconds = time.perf_counter() - self._started
        inside = self._inside
        step = TRLStep(
            seconds=seconds,
            generation=inside[_GENERATION],
            reward=inside[_REWARD],
            logprobs=inside[_LOGPROBS],
            training=seconds - inside[_ROLLOUT] - inside[_FETCH],
            tokens=self._tokens,
            mean_reward=self._mean_reward,
        )
        self.steps.append(step)
        if self.between:
            self.between(len(self.steps) - 1)
        self._start_step()
