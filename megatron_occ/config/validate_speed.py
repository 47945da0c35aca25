"""What keys of speed and memory must satisfy: attention, messages, recompute, rollouts in FP8."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_occ.config.keys import spell
from megatron_occ.config.pipeline import model_chunks, pipeline_problems
from megatron_occ.config.recompute import what_lacks
from megatron_occ.config.schema import Config
from megatron_occ.config.words import counted

# their kernels compute scores again in any case
_WITHOUT_SCORES = ("flash", "fused", "local")
# they hold what other modules of the list would compute again
_WITHIN = {"moe": ("moe_act", "shared_experts")}


def speed_problems(config: Config) -> Iterator[str]:
    """Problems of these keys, one message each."""
    yield from _attention(config)
    yield from _messages(config)
    if config.recompute == "selective":
        yield from _modules(config)
    if config.recompute == "full" and config.recompute_layers is not None:
        yield from _layers(config, config.recompute_layers)
    if config.rl.rollout.fp8 and config.fp8.format != "none":
        yield from _rounded_rollouts(config)


def _attention(config: Config) -> Iterator[str]:
    backend = config.attention_backend
    if backend in ("flash", "fused") and config.precision == "fp32":
        yield (
            f"attention_backend={backend}: these kernels take 16-bit numbers alone. Give "
            "precision=bf16, or attention_backend=auto"
        )


def _messages(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.grad_reduce_dtype == "bf16" and config.precision == "fp32":
        yield (
            "parallel.grad_reduce_dtype=bf16: gradients are summed in the precision of the "
            "parameters then, which is fp32. Give precision=bf16, or "
            "parallel.grad_reduce_dtype=fp32"
        )
    ranks = parallel.expert * (parallel.expert_tensor or parallel.tensor)
    if parallel.token_dispatcher == "flex" and ranks == 1:
        yield (
            "parallel.token_dispatcher=flex: no other rank has experts. Give parallel.expert=2 or "
            "more, or parallel.token_dispatcher=auto"
        )


def _modules(config: Config) -> Iterator[str]:
    modules = config.recompute_modules
    key = f"recompute_modules={spell(modules)}"
    if not modules:
        yield (
            f"{key}: recompute=selective has nothing to compute again. Name modules, e.g. "
            "recompute_modules=[mlp], or give recompute=full or none"
        )
    if len(set(modules)) < len(modules):
        yield f"{key}: names a module twice. Leave one out"
    for module in dict.fromkeys(modules):
        if lacking := what_lacks(module, config.model):
            yield f"{key}: the model has no {module} of its own. Leave it out, or give {lacking}"
        for inner in set(_WITHIN.get(module, ())) & set(modules):
            yield f"{key}: {module} holds {inner} already. Leave {inner} out"
    if "core_attn" in modules and config.attention_backend in _WITHOUT_SCORES:
        yield (
            f"{key}: attention_backend={config.attention_backend} keeps nothing that core_attn "
            "could compute again. Leave core_attn out, or give attention_backend=unfused"
        )
    yield from _modules_in_fp8(config, key)


def _modules_in_fp8(config: Config, key: str) -> Iterator[str]:
    if config.fp8.format == "none" or config.fp8.scaling != "delayed":
        return
    for module in ("moe_act", "layernorm"):
        if module in config.recompute_modules:
            yield (
                f"{key}: fp8.scaling=delayed counts its scales in a second pass through {module}. "
                f"Leave {module} out, or give fp8.scaling=current or block"
            )


def _layers(config: Config, layers: int) -> Iterator[str]:
    if any(pipeline_problems(config)):
        return
    most = max(chunk.count("t") for chunk in model_chunks(config))
    if layers > most:
        yield (
            f"recompute_layers={layers}: no model chunk has more than "
            f"{counted(most, 'transformer layer')}. Give at most {most}, or null for all"
        )


def _rounded_rollouts(config: Config) -> Iterator[str]:
    key = "rl.rollout.fp8=true"
    if config.fp8.scaling == "delayed":
        yield (
            f"{key}: fp8.scaling=delayed rounds by the scales of earlier passes, to other values "
            "than rollouts could. Give fp8.scaling=current or block, or rl.rollout.fp8=false"
        )
    if config.model.moe.num_experts is not None:
        yield (
            f"{key}: rollouts of model.moe.num_experts={config.model.moe.num_experts} run experts "
            "by Megatron's module in bf16, so most of the model would not be rounded. Give "
            "rl.rollout.fp8=false"
        )
