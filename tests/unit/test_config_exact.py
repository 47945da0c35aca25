"""Keys of lambda from the gradients themselves: what can't act is refused, with the remedy."""

from __future__ import annotations

import pytest

from megatron_occ.config import ConfigError, load_config, validate
from megatron_occ.config.warnings import rl_warnings

EXACT = "mtp.preset=occ_exact"
EXACT_BY_KEYS = "mtp.trunk={signal: policy, coefficient: occ, estimator: exact, ema: 0.9}"


def problems(*overrides, command="rl"):
    try:
        validate(load_config([], list(overrides)), command=command)
    except ConfigError as error:
        return error.problems
    return []


def test_the_preset_is_accepted_also_without_several_mini_batches_and_for_cross_entropy():
    assert problems(EXACT) == []
    assert problems(EXACT, "rl.mini_batches=1") == []
    assert problems(EXACT_BY_KEYS, "mtp.head.signal=same_as_trunk") == []
    assert problems(EXACT_BY_KEYS.replace("policy", "ce")) == []


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["mtp.trunk.exact.pairs=same"], ["lambda_plus=null", "does not measure", "pairs=cross"]),
        (
            ["mtp.trunk.exact.pairs=same", "mtp.trunk.lambda_plus=1", "mtp.trunk.exact.parts=4"],
            ["exact.parts=4", "does not cut", "pairs=cross"],
        ),
        (["mtp.trunk.ema=0.5"], ["mtp.trunk.ema=0.5", "over 3.0", "ema=0.8", "exact.gate=0"]),
        (
            ["rl.prompts_per_step=36", "rl.micro_batch_size=144"],
            ["exact.parts=2", "rl.mini_batches=4", "rl.prompts_per_step=36", "multiple of 8"],
        ),
        (
            ["mtp.trunk.exact.share=0.8"],
            ["exact.share=0.8", "exact.share_cap=0.5", "null"],
        ),
        (
            ["mtp.trunk.exact.share=0.3", "mtp.trunk.lambda_plus=5"],
            ["lambda_plus=5", "exact.share=0.3", "Drop one"],
        ),
        (
            ["mtp.head.cut_output_layer=false"],
            ["cut_output_layer=false", "part of RL's gradient", "true"],
        ),
        (
            ["mtp.trunk.exact.control=random", "parallel.distributed_optimizer=true"],
            ["control=random", "parallel.distributed_optimizer=true", "false"],
        ),
    ],
)
def test_what_can_not_act_is_refused_with_key_value_and_remedy(overrides, parts):
    (message,) = problems(EXACT, *overrides)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("world_size", "overrides", "parts"),
    [
        (
            2,
            ["rl.prompts_per_step=4", "rl.samples_per_prompt=5", "rl.micro_batch_size=5"],
            ["exact.parts=2", "10 sequences", "2 data-parallel ranks", "pairs=same"],
        ),
        (
            2,
            [
                "rl.prompts_per_step=12",
                "rl.samples_per_prompt=4",
                "rl.micro_batch_size=8",
                "parallel.pipeline=2",
            ],
            ["micro_batch_size=8", "12 sequences", "micro_batch_size=6", "pairs=same"],
        ),
        (
            4,
            [
                "rl.prompts_per_step=12",
                "rl.samples_per_prompt=2",
                "rl.micro_batch_tokens=4096",
                "parallel.pipeline=2",
                "parallel.virtual_pipeline=2",
            ],
            ["exact.parts=2", "6 sequences", "virtual_pipeline=2", "pairs=same"],
        ),
    ],
)
def test_parts_that_no_cut_exists_for_are_refused(world_size, overrides, parts):
    given = ["pretrain.steps=0", "model.num_layers=4", "rl.mini_batches=2", EXACT, *overrides]
    with pytest.raises(ConfigError) as caught:
        validate(load_config([], given), command="rl", world_size=world_size)
    (message,) = caught.value.problems
    assert all(part in message for part in parts), message


def test_a_head_that_shares_the_loss_has_no_layers_coefficient():
    (message,) = problems(
        EXACT_BY_KEYS, "mtp.head.signal=same_as_trunk", "mtp.trunk.exact.per=layer"
    )
    assert "mtp.head.signal=same_as_trunk" in message and "mtp.head.signal=ce" in message


def test_a_proxy_has_no_scale_of_its_own():
    (message,) = problems("mtp.preset=occ", "mtp.trunk.lambda_plus=null")
    assert "mtp.trunk.lambda_plus=null" in message and "mtp.trunk.estimator=exact" in message


@pytest.mark.parametrize("key", ["weighting=unit", "dual_clip=3", "ratio_cap=2"])
def test_weights_of_a_policy_loss_that_is_not_there_are_refused(key):
    found = problems("mtp.preset=detach", f"mtp.trunk.{key}")
    assert any("no MTP head has a policy loss" in text or "no effect" in text for text in found)


def test_an_audit_needs_mtp_layers_and_whole_groups():
    assert problems(command="audit") == []
    (message, *_) = problems("mtp.num_layers=0", "mtp.preset=none", command="audit")
    assert "mtp.num_layers=0: an audit" in message
    cut = ("rl.prompts_per_step=6", "rl.micro_batch_size=24")
    assert problems(*cut, "mtp.preset=occ") == []
    (message,) = problems(*cut, "mtp.preset=occ", command="audit")
    assert "an audit multiplies" in message


def test_an_unbounded_ratio_and_a_one_sided_one_are_warned_about():
    def warnings(*overrides):
        return rl_warnings(load_config([], list(overrides)))

    assert warnings("mtp.preset=occ") == []
    (unbounded,) = warnings("mtp.preset=policy", "mtp.trunk.dual_clip=null")
    assert "mtp.trunk.dual_clip=10" in unbounded
    (one_sided,) = warnings("mtp.preset=occ", "rl.algorithm=gspo")
    assert "negative advantage" in one_sided and "mtp.trunk.weighting=truncated" in one_sided
    assert warnings("mtp.preset=occ_exact", "rl.algorithm=gspo") == []
    assert warnings("mtp.preset=detach", "rl.algorithm=gspo") == []
    masked = ("rl.loss.sampling_mask=true", "rl.rollout.top_k=9")
    (shifted,) = warnings("mtp.preset=occ_decoupled", *masked)
    assert "mtp.trunk.estimator=logprob" in shifted and "mtp.preset=occ_exact" in shifted
    assert warnings("mtp.preset=occ_exact", *masked) == []
    assert warnings("mtp.preset=detach", *masked) == []
