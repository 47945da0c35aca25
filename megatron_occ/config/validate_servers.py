"""What rollouts by servers need: their URLs, and an architecture that they have."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from megatron_occ.config.keys import spell
from megatron_occ.config.load import flat_values
from megatron_occ.config.schema import Config


def architecture(config: Config) -> str:
    """Hugging Face architecture that the weights are exported as.

    MiMo is Qwen2 with one MTP layer of Qwen2's decoder layer (arXiv 2505.07608).
    """
    if config.mtp.num_layers > 0:
        return "MiMoForCausalLM"
    return "Qwen2ForCausalLM" if config.model.qkv_bias else "LlamaForCausalLM"


def server_problems(config: Config) -> Iterator[str]:
    """Problems of rollouts by servers, one message each; none for the embedded engine.

    Args:
        config: a configuration whose single values are in range.
    """
    rollout = config.rl.rollout
    if rollout.engine == "megatron":
        return
    yield from _urls(rollout.engine, rollout.server.urls)
    if rollout.engine == "sglang" and rollout.server.transfer != "folder":
        yield (
            f"rl.rollout.server.transfer={rollout.server.transfer}: SGLang reads weights from "
            "folders alone. Give rl.rollout.server.transfer=folder, or rl.rollout.engine=vllm"
        )
    yield from architecture_problems(config)


def _urls(engine: str, urls: list[str]) -> Iterator[str]:
    key = "rl.rollout.server.urls"
    if not urls:
        yield (
            f"{key}=[]: rl.rollout.engine={engine} has no server to ask. Give {key}="
            "['http://host:port'], or rl.rollout.engine=megatron"
        )
    for url in dict.fromkeys(urls):
        if urls.count(url) > 1:
            yield f"{key}={spell(urls)}: {url} is there twice. Name each server once"
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            yield f"{key}={spell(urls)}: {url!r} is no base URL. Write http://host:port"


def architecture_problems(config: Config) -> Iterator[str]:
    """What Llama, Qwen2 and MiMo have no place for, one message each."""
    model, name = config.model, architecture(config)
    width = model.hidden_size // model.num_attention_heads
    refused = {
        "model.moe.num_experts": (model.moe.num_experts is not None, "experts", "null"),
        "model.mla.enabled": (model.mla.enabled, "latent attention", "false"),
        "model.qk_layernorm": (model.qk_layernorm, "norm of queries and keys", "false"),
        "model.rotary_percent": (model.rotary_percent != 1, "part of a head left unturned", "1.0"),
        "mtp.num_layers": (config.mtp.num_layers > 1, "second MTP layer", "1 or 0"),
        "model.kv_channels": (
            name != "LlamaForCausalLM" and model.kv_channels not in (None, width),
            "heads of another width than hidden_size / heads",
            "null",
        ),
    }
    values = flat_values(config)
    for key, (is_set, what, remedy) in refused.items():
        if is_set:
            yield (
                f"{key}={spell(values[key])}: rl.rollout.engine={config.rl.rollout.engine} gets "
                f"the weights as {name}, which has no {what}. Give {key}={remedy}, or "
                "rl.rollout.engine=megatron"
            )
