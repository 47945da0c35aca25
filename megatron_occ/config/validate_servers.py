"""What rollouts by servers need: their URLs, and an architecture that they have."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from megatron_occ.config.keys import spell
from megatron_occ.config.schema import Config
from megatron_occ.config.served import architecture_problems


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
