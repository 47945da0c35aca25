"""Sizes that are each allowed, and together are more than can be counted or held."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_occ.config import limits
from megatron_occ.config.schema import Config


def size_problems(config: Config, *, trains: bool) -> Iterator[str]:
    """Sizes that no run has, by :mod:`megatron_occ.config.limits`.

    Args:
        config: a configuration whose single values are in range.
        trains: whether the command runs reinforcement learning.
    """
    yield from _attention(config)
    yield from _experts(config)
    yield from _temperatures(config)
    rl = config.rl
    responses = rl.prompts_per_step * rl.samples_per_prompt
    if trains and responses > limits.SEQUENCES:
        yield (
            f"rl.prompts_per_step={rl.prompts_per_step}: makes {responses:,} responses a step with "
            f"rl.samples_per_prompt={rl.samples_per_prompt}, and at most {limits.SEQUENCES:,} are "
            "held at once. Lower one of them"
        )


def _temperatures(config: Config) -> Iterator[str]:
    given = {"rl.validation": config.rl.validation.temperature, "eval": config.eval.temperature}
    for section, temperature in given.items():
        if temperature and temperature < limits.COLDEST:
            yield (
                f"{section}.temperature={temperature}: logits divided by it overflow. Give 0, "
                f"which is greedy, or at least {limits.COLDEST}"
            )


def _attention(config: Config) -> Iterator[str]:
    model, mla = config.model, config.model.mla
    heads, widths = model.num_attention_heads, {"model.kv_channels": model.kv_channels or 0}
    if mla.enabled:
        names = ("qk_head_dim", "qk_rope_head_dim", "v_head_dim")
        widths = {f"model.mla.{name}": getattr(mla, name) for name in names}
    for key, head in widths.items():
        if heads * head > limits.WIDTH:
            yield (
                f"{key}={head}: makes attention {heads * head:,} wide with "
                f"model.num_attention_heads={heads}, and it is at most {limits.WIDTH:,} wide. "
                "Lower one of them"
            )


def _experts(config: Config) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    if model.moe.num_experts is None:
        return
    layers = -(-model.num_layers // parallel.pipeline) + config.mtp.num_layers
    experts = layers * -(-model.moe.num_experts // parallel.expert)
    if experts > limits.RANK_EXPERTS:
        yield (
            f"model.moe.num_experts={model.moe.num_experts}: makes about {experts:,} experts on a "
            f"rank, with those of all its layers, and a rank holds at most "
            f"{limits.RANK_EXPERTS:,}. Raise parallel.expert={parallel.expert} or "
            f"parallel.pipeline={parallel.pipeline}, or lower model.num_layers={model.num_layers}"
        )
