"""Refuses a setting that another one switches off: nothing that was asked for is ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_occ.config.keys import leaves, spell
from megatron_occ.config.presets import PRESETS


def _is(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def _is_given(value: Any) -> bool:
    return value is not None


@dataclass(frozen=True)
class Switch:
    """Keys that act only while another one is on.

    Attributes:
        key: the key that switches.
        is_off: whether a value of it switches the others off.
        keys: the keys that then must have their defaults.
        needs: the settings that would make them act, in words.
        zero: a value of ``keys`` besides the default that asks for nothing, as a weight of 0 does.
    """

    key: str
    is_off: Callable[[Any], bool]
    keys: tuple[str, ...]
    needs: str
    zero: Any = None


def _all_but(section: str, *names: str) -> tuple[str, ...]:
    without = {f"{section}.{name}" for name in names}
    return tuple(key for key in leaves() if key.startswith(f"{section}.") and key not in without)


_CALIBRATION = (
    *(f"mtp.trunk.{name}" for name in ("estimator", "statistics", "lambda_plus", "clamp", "ema")),
    *_all_but("mtp.trunk.exact"),
)
_YARN = (
    "yarn.original_max_position_embeddings",
    "yarn.beta_fast",
    "yarn.beta_slow",
    "yarn.mscale",
)
SWITCHES = (
    Switch(
        "model.moe.num_experts",
        _is(None),
        (*_all_but("model.moe", "num_experts"), "parallel.token_dispatcher"),
        "model.moe.num_experts",
    ),
    Switch(
        "model.moe.expert_bias",
        _is(False),
        ("model.moe.bias_update_rate",),
        "model.moe.expert_bias=true",
    ),
    Switch(
        "model.mla.enabled",
        _is(False),
        _all_but("model.mla", "enabled", *_YARN),
        "model.mla.enabled=true",
    ),
    Switch(
        "model.mla.yarn.factor",
        _is(None),
        tuple(f"model.mla.{name}" for name in _YARN),
        "model.mla.yarn.factor",
    ),
    Switch(
        "model.rotary_scaling.factor",
        _is(None),
        _all_but("model.rotary_scaling", "factor"),
        "model.rotary_scaling.factor",
    ),
    Switch(
        "recompute",
        _is("none", "full"),
        ("recompute_modules",),
        "recompute=selective",
    ),
    Switch(
        "recompute",
        _is("none", "selective"),
        ("recompute_layers",),
        "recompute=full",
    ),
    Switch(
        "model.from_hf", _is_given, ("model.init_device",), "model.from_hf=null (random weights)"
    ),
    Switch("fp8.format", _is("none"), _all_but("fp8", "format"), "fp8.format=hybrid or e4m3"),
    # one scale for all layers of a step: Megatron-Core refuses it as well
    Switch(
        "fp8.scaling",
        _is("delayed"),
        ("fp8.first_layers_bf16", "fp8.last_layers_bf16"),
        "fp8.scaling=current or block",
    ),
    Switch(
        "mtp.num_layers",
        _is(0),
        (
            "pretrain.mtp_weight",
            "mtp.head.clip_grad",
            *_all_but("rl.rollout.speculative", "mode"),
        ),
        "mtp.num_layers=1 or more",
        zero=0,
    ),
    Switch(
        "pretrain.steps",
        _is(0),
        (
            "pretrain.validate_every",
            "pretrain.stop_at_pass_rate",
            "pretrain.label_noise",
            "data.corpus",
        ),
        "pretrain.steps=1 or more",
    ),
    Switch(
        "data.corpus",
        _is_given,
        ("pretrain.label_noise",),
        "data.corpus=null (noise is added to generated solutions)",
    ),
    Switch(
        "rl.rollout.speculative.mode",
        _is("off"),
        _all_but("rl.rollout.speculative", "mode"),
        "rl.rollout.speculative.mode=auto or fixed",
    ),
    Switch(
        "rl.rollout.engine",
        _is("megatron"),
        _all_but("rl.rollout.server"),
        "rl.rollout.engine=vllm or sglang",
    ),
    Switch(
        "rl.rollout.engine",
        _is("vllm", "sglang"),
        (
            "rl.rollout.batch_size",
            "rl.rollout.cuda_graphs",
            *_all_but("rl.rollout.speculative"),
        ),
        "rl.rollout.engine=megatron (drafts of a server are an option of its start)",
    ),
    Switch("data.task.name", _is(None), ("data.task.params",), "data.task.name"),
    Switch("log.wandb.mode", _is("off"), _all_but("log.wandb", "mode"), "log.wandb.mode=offline"),
    Switch("profile.steps", _is([]), _all_but("profile", "steps"), "profile.steps=[first, last]"),
    Switch("log.mlflow.uri", _is(None), _all_but("log.mlflow", "uri"), "log.mlflow.uri"),
    Switch(
        "data.task.name",
        _is_given,
        (
            "data.verifier",
            "data.verifiers",
            "data.max_prompt_tokens",
            *_all_but("data.fields"),
            *_all_but("data.chat"),
        ),
        "data.task.name=null and data.prompts (a generated task has its own verifier)",
    ),
)
RL_SWITCHES = (
    Switch(
        "rl.train_trunk",
        _is(False),
        (
            "rl.algorithm",
            "rl.old_logprobs",
            "rl.optimizer.clip_grad",
            *_all_but("rl.advantage"),
            *_all_but("rl.loss"),
            *_all_but("rl.correction"),
            *_all_but("rl.dynamic_sampling"),
            *_all_but("rl.overlong"),
        ),
        "rl.train_trunk=true (any mtp.preset but head_only)",
    ),
    Switch(
        "mtp.trunk.coefficient",
        _is("fixed"),
        _CALIBRATION,
        "mtp.trunk.coefficient=occ (mtp.preset=occ, occ_decoupled or occ_exact)",
    ),
    Switch(
        "mtp.trunk.estimator",
        _is("logprob", "released"),
        _all_but("mtp.trunk.exact"),
        "mtp.trunk.estimator=exact (mtp.preset=occ_exact)",
    ),
    Switch(
        "mtp.trunk.estimator",
        _is("exact"),
        ("mtp.trunk.statistics",),
        "mtp.trunk.estimator=logprob",
    ),
    Switch(
        "mtp.trunk.weighting",
        _is("truncated", "unit"),
        ("mtp.trunk.dual_clip",),
        "mtp.trunk.weighting=ppo",
    ),
    Switch(
        "mtp.trunk.weighting",
        _is("ppo", "unit"),
        ("mtp.trunk.ratio_cap",),
        "mtp.trunk.weighting=truncated",
    ),
    Switch(
        "mtp.trunk.signal",
        _is("none"),
        ("mtp.trunk.weight",),
        "mtp.trunk.signal=ce or policy (mtp.preset=ce or policy)",
        zero=0,
    ),
    Switch(
        "mtp.trunk.coefficient",
        _is("occ"),
        ("mtp.trunk.weight",),
        "mtp.trunk.coefficient=fixed (mtp.preset=ce or policy); lambda is scaled by "
        "mtp.trunk.lambda_plus",
    ),
    Switch(
        "mtp.head.signal",
        _is("none", "same_as_trunk"),
        ("mtp.head.weight",),
        "mtp.head.signal=ce, soft_ce, tv or policy (mtp.preset=detach or occ_decoupled)",
        zero=0,
    ),
    Switch(
        "mtp.head.signal",
        _is("none", "same_as_trunk"),
        ("mtp.head.states",),
        "mtp.head.signal=soft_ce or tv",
    ),
    Switch(
        "mtp.head.signal",
        _is("none", "same_as_trunk", "soft_ce", "tv"),
        ("mtp.head.cut_output_layer",),
        "mtp.head.signal=ce (mtp.preset=detach or occ_decoupled)",
    ),
    Switch(
        "rl.micro_batch_tokens",
        _is_given,
        ("rl.micro_batch_size",),
        "rl.micro_batch_tokens=null (padded micro-batches)",
    ),
    Switch(
        "rl.dynamic_sampling.enabled",
        _is(False),
        ("rl.dynamic_sampling.max_rounds",),
        "rl.dynamic_sampling.enabled=true",
        zero=1,
    ),
    Switch(
        "rl.overlong.buffer",
        _is(0),
        ("rl.overlong.penalty",),
        "rl.overlong.buffer=1 or more",
        zero=0,
    ),
    Switch(
        "rl.loss.kl_coefficient",
        _is(0),
        (
            "rl.loss.kl_kind",
            "rl.loss.kl_importance",
            "rl.loss.kl_input_clamp",
            "rl.loss.kl_output_clamp",
        ),
        "rl.loss.kl_coefficient above 0",
    ),
    Switch(
        "rl.loss.kind",
        _is("clipped", "cispo", "dppo"),
        ("rl.loss.tau_positive", "rl.loss.tau_negative"),
        "rl.loss.kind=sapo",
    ),
    Switch(
        "rl.loss.kind",
        _is("clipped", "cispo", "sapo"),
        ("rl.loss.divergence", "rl.loss.divergence_limit"),
        "rl.loss.kind=dppo",
    ),
    Switch(
        "rl.loss.kind",
        _is("sapo", "dppo"),
        ("rl.loss.clip_low", "rl.loss.clip_high"),
        "rl.loss.kind=clipped or cispo",
    ),
    Switch(
        "rl.loss.kind",
        _is("cispo", "sapo", "dppo"),
        ("rl.loss.dual_clip",),
        "rl.loss.kind=clipped",
    ),
    Switch(
        "rl.advantage.normalize",
        _is(False),
        ("rl.advantage.normalize_over",),
        "rl.advantage.normalize=true",
    ),
    Switch(
        "rl.correction.weights",
        _is("none"),
        ("rl.correction.low", "rl.correction.high", "rl.correction.outside"),
        "rl.correction.weights=token or sequence",
    ),
    Switch(
        "rl.correction.reject",
        _is("none"),
        ("rl.correction.reject_low", "rl.correction.reject_high"),
        "rl.correction.reject=token, sequence or geometric",
    ),
)
# pretraining trains the head in any regime
RL_ALONE_SWITCHES = (
    Switch(
        "mtp.head.signal",
        _is("none"),
        ("mtp.head.clip_grad",),
        "a loss for the head in mtp.head.signal (any mtp.preset but none)",
    ),
)


def switch_problems(values: Mapping[str, Any], *, pretrains: bool, trains: bool) -> Iterator[str]:
    """Settings without effect, one message each.

    Args:
        values: a whole configuration by dotted key.
        pretrains: whether the command runs pretraining.
        trains: whether the command runs reinforcement learning.
    """
    switches = SWITCHES
    if trains:
        switches += RL_SWITCHES if pretrains else RL_SWITCHES + RL_ALONE_SWITCHES
    found: dict[str, str] = {}
    for switch in switches:
        if not switch.is_off(values[switch.key]):
            continue
        implied = _set_by_presets(switch.keys, values)
        for key in switch.keys:
            default = leaves()[key].default()
            if values[key] not in (default, switch.zero, implied.get(key, default)):
                found.setdefault(key, _message(switch, key, default, values))
    yield from found.values()


def _set_by_presets(keys: tuple[str, ...], values: Mapping[str, Any]) -> dict[str, Any]:
    """What presets among ``keys`` set: a preset that is refused itself speaks for all of it."""
    chosen = [PRESETS[key].get(values[key], {}) for key in keys if key in PRESETS]
    return {key: value for preset in chosen for key, value in preset.items()}


def _message(switch: Switch, key: str, default: Any, values: Mapping[str, Any]) -> str:
    return (
        f"{key}={_plain(values[key])}: has no effect with {switch.key}="
        f"{_plain(values[switch.key])}{_preset_of(switch.key, values)}. Give "
        f"{key}={_plain(default)}, its default, or {switch.needs}"
    )


def _preset_of(key: str, values: Mapping[str, Any]) -> str:
    for preset_key, presets in PRESETS.items():
        preset = presets.get(values[preset_key], {})
        if key in preset and preset[key] == values[key]:
            return f", set by {preset_key}={values[preset_key]}"
    return ""


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else spell(value)
