"""Refuses contradictions before anything is built: what keys must satisfy together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from megatron_occ.config.errors import ConfigError
from megatron_occ.config.keys import check_value, leaves, spell
from megatron_occ.config.load import flat_values
from megatron_occ.config.pipeline import pipeline_problems, what_parts_drafts
from megatron_occ.config.presets import preset_conflicts
from megatron_occ.config.schema import Config, OptimizerConfig
from megatron_occ.config.sizes import BEHIND_DRAFTS
from megatron_occ.config.validate_async import async_problems
from megatron_occ.config.validate_balance import balance_problems
from megatron_occ.config.validate_eval import eval_problems, set_problems
from megatron_occ.config.validate_exact import audit_problems, exact_problems
from megatron_occ.config.validate_layout import layout_problems
from megatron_occ.config.validate_loss import loss_problems
from megatron_occ.config.validate_model import model_problems
from megatron_occ.config.validate_mtp import mtp_problems
from megatron_occ.config.validate_optimizer import optimizer_problems
from megatron_occ.config.validate_profile import profile_problems
from megatron_occ.config.validate_servers import server_problems
from megatron_occ.config.validate_sizes import size_problems
from megatron_occ.config.validate_speed import speed_problems
from megatron_occ.config.validate_switches import switch_problems
from megatron_occ.config.words import counted

COMMANDS = ("pretrain", "rl", "demo", "eval", "audit")
_VERIFIER_NAME = re.compile(r"[\w-]+", re.ASCII)
_VERIFIER_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def validate(config: Config, *, command: str, world_size: int = 1) -> None:
    """Refuses a configuration that could not do what it says.

    Args:
        config: the configuration; also one that was built or changed in Python.
        command: "pretrain", "rl", "demo" or "eval". Only the phases that the command runs are
            checked, so that one file can serve all commands; "rl" and "demo" include pretraining
            where ``rl.init_from`` and ``model.from_hf`` are null.
        world_size: ranks in all.

    Raises:
        ConfigError: with every problem found: key, value and remedy.
    """
    if command not in COMMANDS:
        raise ValueError(f"command={command!r}: must be one of {', '.join(COMMANDS)}")
    problems = _value_problems(config) or list(_problems(config, command, world_size))
    if problems:
        raise ConfigError(problems)


def pretrains_first(config: Config) -> bool:
    """Whether RL begins with pretraining: it has no weights to start from."""
    has_weights = config.rl.init_from is not None or config.model.from_hf is not None
    return not has_weights and config.pretrain.steps > 0


def _value_problems(config: Config) -> list[str]:
    problems = []
    values = flat_values(config)
    for key, leaf in leaves().items():
        try:
            check_value(leaf, values[key])
        except ValueError as error:
            problems.append(str(error))
    return problems or preset_conflicts(values)


def _problems(config: Config, command: str, world_size: int) -> Iterator[str]:
    trains = command in ("rl", "demo", "audit")
    first = command in ("rl", "demo") and pretrains_first(config)
    pretrains = command == "pretrain" or first
    yield from _tokenizer(config)
    yield from model_problems(config)
    yield from size_problems(config, trains=trains)
    yield from layout_problems(config, world_size, pretrains=pretrains, trains=trains)
    yield from speed_problems(config)
    yield from optimizer_problems(config, pretrains=pretrains, trains=trains)
    if pretrains:
        yield from _pretraining(config)
    if command != "pretrain" or config.pretrain.validate_every > 0:
        yield from _verifiers(config)
        yield from _prompts(config, trains=command != "eval")
        yield from _responses(config)
        yield from _speculation(config)
        yield from server_problems(config)
    if command == "eval" or (command in ("rl", "demo") and config.eval.after_rl):
        yield from eval_problems(config)
    if trains:
        yield from _reinforcement(config)
        yield from mtp_problems(config)
        yield from exact_problems(config)
    if command == "audit":
        yield from audit_problems(config)
    yield from balance_problems(config, pretrains=pretrains, trains=trains)
    yield from profile_problems(config, world_size, pretrains=pretrains, trains=trains)
    yield from switch_problems(flat_values(config), pretrains=pretrains, trains=trains)


def _tokenizer(config: Config) -> Iterator[str]:
    tokenizer = config.tokenizer
    if tokenizer.kind == "hf":
        if tokenizer.path is None:
            yield "tokenizer.kind=hf: needs tokenizer.path, the folder of the tokenizer"
        if tokenizer.alphabet is not None:
            yield "tokenizer.alphabet: is for tokenizer.kind=char. Set it to null"
        return
    if tokenizer.path is not None:
        yield f"tokenizer.path={tokenizer.path}: is for tokenizer.kind=hf. Set one or the other"
    if tokenizer.alphabet is None and config.data.task.name is None:
        yield (
            "tokenizer.alphabet=null: without data.task.name there is no task to take the "
            "characters from. Set tokenizer.alphabet, or tokenizer.kind=hf and tokenizer.path"
        )


def _pretraining(config: Config) -> Iterator[str]:
    pretrain, limit = config.pretrain, config.model.max_position_embeddings
    yield from _source(config, "data.corpus", config.data.corpus, "pretraining")
    yield from _optimizer("pretrain.optimizer", pretrain.optimizer, pretrain.steps)
    if pretrain.steps == 0:
        yield "pretrain.steps=0: there is nothing to do. Give at least 1"
    if pretrain.sequence_length > limit:
        yield (
            f"pretrain.sequence_length={pretrain.sequence_length}: is more than "
            f"model.max_position_embeddings={limit}. Lower the one or raise the other"
        )
    if pretrain.stop_at_pass_rate is not None and pretrain.validate_every == 0:
        yield (
            f"pretrain.stop_at_pass_rate={pretrain.stop_at_pass_rate}: "
            "pretrain.validate_every=0 never measures it. Give pretrain.validate_every=25, or "
            "pretrain.stop_at_pass_rate=null"
        )
    if pretrain.mtp_weight == 0 and config.mtp.num_layers > 0:
        yield (
            f"pretrain.mtp_weight=0: the MTP layers (mtp.num_layers={config.mtp.num_layers}) would "
            "not be trained. Give a weight above 0, or mtp.num_layers=0"
        )


def _source(config: Config, key: str, path: Any, use: str) -> Iterator[str]:
    task = config.data.task.name
    if task is None and path is None:
        yield f"{key}=null: {use} has no data. Give {key} or data.task.name"
    if task is not None and path is not None:
        yield (
            f"{key}={path}: data.task.name={task} is given too, and only one can be used. "
            f"Set data.task.name=null or {key}=null"
        )


def _prompts(config: Config, *, trains: bool) -> Iterator[str]:
    data = config.data
    if trains or data.prompts is not None:
        yield from _source(config, "data.prompts", data.prompts, "RL")
    has_others = data.prompts is not None or not trains
    if has_others and data.task.name is None and data.validation_prompts is None:
        yield (
            "data.validation_prompts=null: there is nothing to validate on. Hold out some lines "
            "of data.prompts and give them as data.validation_prompts"
        )
    yield from _weights(data.prompts)
    yield from set_problems(data.validation_prompts)
    if data.task.name is None and data.chat.apply == "always" and config.tokenizer.kind != "hf":
        yield (
            f"data.chat.apply=always: tokenizer.kind={config.tokenizer.kind} has no chat template. "
            "Set tokenizer.kind=hf, or data.chat.apply=auto"
        )
    if data.validation_prompts is not None and data.task.name is not None:
        yield (
            f"data.validation_prompts={_plain(data.validation_prompts)}: data.task.name="
            f"{data.task.name} makes its own held-out problems. Set data.task.name=null or "
            "data.validation_prompts=null"
        )


def _plain(value: Any) -> str:
    return spell(value) if isinstance(value, dict) else str(value)


def _weights(prompts: Any) -> Iterator[str]:
    if not isinstance(prompts, dict):
        return
    key = f"data.prompts={spell(prompts)}"
    weights = list(prompts.values())
    numbers = [w for w in weights if isinstance(w, (int, float)) and not isinstance(w, bool)]
    if not weights:
        yield f"{key}: no file. Give at least one"
    elif any(weight is not None for weight in weights) and len(numbers) < len(weights):
        yield f"{key}: give each file a weight, or none (null: files count by their size)"
    elif any(not 0 < weight < math.inf for weight in numbers):
        yield f"{key}: a weight must be a finite number > 0"


def _verifiers(config: Config) -> Iterator[str]:
    for name, path in config.data.verifiers.items():
        key = f"data.verifiers.{name}"
        if not _VERIFIER_NAME.fullmatch(name):
            yield f"{key}: a verifier's name has letters, digits, '_' and '-' only. Rename it"
        if not isinstance(path, str) or not _VERIFIER_PATH.fullmatch(path):
            yield (
                f"{key}={spell(path)}: must be 'module:function', the module as Python imports "
                "it: my_module:my_verifier"
            )


def _responses(config: Config) -> Iterator[str]:
    length, limit = config.rl.rollout.max_response_length, config.model.max_position_embeddings
    if length >= limit:
        yield (
            f"rl.rollout.max_response_length={length}: leaves no room for a prompt in "
            f"model.max_position_embeddings={limit}. Lower the one or raise the other"
        )
    if "" in config.rl.rollout.stop:
        yield (
            f"rl.rollout.stop={spell(config.rl.rollout.stop)}: an empty text would end each "
            "response at its first token. Leave it out"
        )
    yield from _cache_tokens(config)


def _cache_tokens(config: Config) -> Iterator[str]:
    rollout, limit = config.rl.rollout, config.model.max_position_embeddings
    drafts = 0 if rollout.speculative.mode == "off" else rollout.speculative.draft_length
    needed = limit + drafts + BEHIND_DRAFTS
    if rollout.cache_tokens is not None and rollout.cache_tokens < needed:
        yield (
            f"rl.rollout.cache_tokens={rollout.cache_tokens}: the longest sequence, of "
            f"model.max_position_embeddings={limit}, and what is drafted behind it take {needed}. "
            "Give at least as many, or null"
        )
    elif rollout.cache_tokens is not None and rollout.cache_tokens >= rollout.batch_size * needed:
        yield (
            f"rl.rollout.cache_tokens={rollout.cache_tokens}: is no less than "
            f"rl.rollout.batch_size={rollout.batch_size} of the longest sequences take. Give less "
            "than that, a larger batch_size, or null"
        )


def _speculation(config: Config) -> Iterator[str]:
    key = "rl.rollout.speculative.mode"
    if config.rl.rollout.speculative.mode != "fixed":
        return
    if config.mtp.num_layers == 0:
        yield f"{key}=fixed: mtp.num_layers=0 has no head to draft with. Give {key}=off"
    elif not any(pipeline_problems(config)) and (reason := what_parts_drafts(config)):
        yield f"{key}=fixed: {reason}. Put them into one, or give {key}=off"


def _reinforcement(config: Config) -> Iterator[str]:
    rl = config.rl
    yield from _optimizer("rl.optimizer", rl.optimizer, rl.steps * rl.mini_batches)
    if rl.samples_per_prompt < 2 and rl.train_trunk and rl.advantage.baseline != "none":
        yield (
            f"rl.samples_per_prompt={rl.samples_per_prompt}: a group of one has no baseline "
            f"(rl.advantage.baseline={rl.advantage.baseline}) and no spread, so its advantage is "
            "0. Give at least 2"
        )
    if rl.dynamic_sampling.enabled and rl.dynamic_sampling.max_rounds < 2:
        yield (
            f"rl.dynamic_sampling.max_rounds={rl.dynamic_sampling.max_rounds}: no group could "
            "be replaced. Give at least 2, or rl.dynamic_sampling.enabled=false"
        )
    yield from loss_problems(config)
    yield from async_problems(config)
    buffer, length = rl.overlong.buffer, rl.rollout.max_response_length
    if buffer > length:
        yield (
            f"rl.overlong.buffer={buffer}: is more than rl.rollout.max_response_length={length}. "
            f"Give at most {length}"
        )
    if buffer > 0 and rl.overlong.penalty == 0:
        yield (
            f"rl.overlong.penalty=0: rl.overlong.buffer={buffer} has no effect. Give a penalty "
            "above 0, or rl.overlong.buffer=0"
        )


def _optimizer(key: str, optimizer: OptimizerConfig, updates: int) -> Iterator[str]:
    if optimizer.min_lr > optimizer.lr:
        yield f"{key}.min_lr={optimizer.min_lr}: is more than {key}.lr={optimizer.lr}. Lower it"
    if optimizer.min_lr != 0 and optimizer.schedule == "constant":
        yield (
            f"{key}.min_lr={optimizer.min_lr}: {key}.schedule=constant never gets there. "
            f"Set {key}.min_lr=0, or {key}.schedule=cosine or linear"
        )
    if optimizer.warmup_steps > updates > 0:
        yield (
            f"{key}.warmup_steps={optimizer.warmup_steps}: the run has "
            f"{counted(updates, 'update')} in all. Give at most {updates}"
        )
