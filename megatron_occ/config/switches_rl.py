"""Keys that act only while another one is on: those of reinforcement learning."""

from __future__ import annotations

from megatron_occ.config.switch import Switch, all_but, is_given, is_one_of

_CALIBRATION = (
    *(f"mtp.trunk.{name}" for name in ("estimator", "statistics", "lambda_plus", "clamp", "ema")),
    *all_but("mtp.trunk.exact"),
)
RL_SWITCHES = (
    Switch(
        "rl.train_trunk",
        is_one_of(False),
        (
            "rl.algorithm",
            "rl.old_logprobs",
            "rl.routing_replay",
            "rl.optimizer.clip_grad",
            *all_but("rl.advantage"),
            *all_but("rl.loss"),
            *all_but("rl.correction"),
            *all_but("rl.dynamic_sampling"),
            *all_but("rl.overlong"),
        ),
        "rl.train_trunk=true (any mtp.preset but head_only)",
    ),
    Switch(
        "model.moe.num_experts",
        is_one_of(None),
        ("rl.routing_replay", "rl.balance_loss"),
        "model.moe.num_experts",
    ),
    Switch(
        "mtp.trunk.coefficient",
        is_one_of("fixed"),
        _CALIBRATION,
        "mtp.trunk.coefficient=occ (mtp.preset=occ, occ_decoupled or occ_exact)",
    ),
    Switch(
        "mtp.trunk.estimator",
        is_one_of("logprob", "released"),
        all_but("mtp.trunk.exact"),
        "mtp.trunk.estimator=exact (mtp.preset=occ_exact)",
    ),
    Switch(
        "mtp.trunk.estimator",
        is_one_of("exact"),
        ("mtp.trunk.statistics",),
        "mtp.trunk.estimator=logprob",
    ),
    Switch(
        "mtp.trunk.weighting",
        is_one_of("truncated", "unit"),
        ("mtp.trunk.dual_clip",),
        "mtp.trunk.weighting=ppo",
    ),
    Switch(
        "mtp.trunk.weighting",
        is_one_of("ppo", "unit"),
        ("mtp.trunk.ratio_cap",),
        "mtp.trunk.weighting=truncated",
    ),
    Switch(
        "mtp.trunk.signal",
        is_one_of("none"),
        ("mtp.trunk.weight",),
        "mtp.trunk.signal=ce or policy (mtp.preset=ce or policy)",
        zero=0,
    ),
    Switch(
        "mtp.trunk.coefficient",
        is_one_of("occ"),
        ("mtp.trunk.weight",),
        "mtp.trunk.coefficient=fixed (mtp.preset=ce or policy); lambda is scaled by "
        "mtp.trunk.lambda_plus",
    ),
    Switch(
        "mtp.head.signal",
        is_one_of("none", "same_as_trunk"),
        ("mtp.head.weight",),
        "mtp.head.signal=ce, soft_ce, tv or policy (mtp.preset=detach or occ_decoupled)",
        zero=0,
    ),
    Switch(
        "mtp.head.signal",
        is_one_of("none", "same_as_trunk"),
        ("mtp.head.states",),
        "mtp.head.signal=soft_ce or tv",
    ),
    Switch(
        "mtp.head.signal",
        is_one_of("none", "same_as_trunk", "soft_ce", "tv"),
        ("mtp.head.cut_output_layer",),
        "mtp.head.signal=ce (mtp.preset=detach or occ_decoupled)",
    ),
    Switch(
        "rl.micro_batch_tokens",
        is_given,
        ("rl.micro_batch_size",),
        "rl.micro_batch_tokens=null (padded micro-batches)",
    ),
    Switch(
        "rl.dynamic_sampling.enabled",
        is_one_of(False),
        ("rl.dynamic_sampling.max_rounds", "rl.dynamic_sampling.spread_of"),
        "rl.dynamic_sampling.enabled=true",
        zero=1,
    ),
    Switch(
        "rl.overlong.buffer",
        is_one_of(0),
        # without a penalty rewards are scores
        ("rl.overlong.penalty", "rl.dynamic_sampling.spread_of"),
        "rl.overlong.buffer=1 or more",
        zero=0,
    ),
    Switch(
        "rl.loss.kl_coefficient",
        is_one_of(0),
        (
            "rl.loss.kl_reference_every",
            "rl.loss.kl_kind",
            "rl.loss.kl_importance",
            "rl.loss.kl_input_clamp",
            "rl.loss.kl_output_clamp",
        ),
        "rl.loss.kl_coefficient above 0",
    ),
    Switch(
        "rl.loss.kind",
        is_one_of("clipped", "cispo", "dppo"),
        ("rl.loss.tau_positive", "rl.loss.tau_negative"),
        "rl.loss.kind=sapo",
    ),
    Switch(
        "rl.loss.kind",
        is_one_of("clipped", "cispo", "sapo"),
        ("rl.loss.divergence", "rl.loss.divergence_limit"),
        "rl.loss.kind=dppo",
    ),
    Switch(
        "rl.loss.kind",
        is_one_of("sapo", "dppo"),
        ("rl.loss.clip_low", "rl.loss.clip_high"),
        "rl.loss.kind=clipped or cispo",
    ),
    Switch(
        "rl.loss.kind",
        is_one_of("cispo", "sapo", "dppo"),
        ("rl.loss.dual_clip",),
        "rl.loss.kind=clipped",
    ),
    Switch(
        "rl.advantage.normalize",
        is_one_of(False),
        ("rl.advantage.normalize_over",),
        "rl.advantage.normalize=true",
    ),
    Switch(
        "rl.correction.weights",
        is_one_of("none"),
        ("rl.correction.low", "rl.correction.high", "rl.correction.outside"),
        "rl.correction.weights=token or sequence",
    ),
    Switch(
        "rl.correction.reject",
        is_one_of("none"),
        ("rl.correction.reject_low", "rl.correction.reject_high"),
        "rl.correction.reject=token, sequence or geometric",
    ),
)
# pretraining trains the head in any regime
RL_ALONE_SWITCHES = (
    Switch(
        "rl.init_from",
        is_given,
        ("model.init_device",),
        "rl.init_from=null (random weights)",
    ),
    Switch(
        "mtp.head.signal",
        is_one_of("none"),
        ("mtp.head.clip_grad",),
        "a loss for the head in mtp.head.signal (any mtp.preset but none)",
    ),
)
