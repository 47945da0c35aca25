"""What a user sets for remote rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_occ.rollout.engine import EngineError

SERVERS = ("vllm", "sglang")
TRANSFERS = ("folder", "memory", "network")


@dataclass(frozen=True)
class RemoteSettings:
    """Servers, limits and tolerances of a :class:`RemoteEngine`.

    Args:
        server: ``vllm`` or ``sglang``; all URLs are of the same kind.
        urls: base URLs, such as ``http://node7:8000``. The servers belong to this run alone: an
            update and an abort end whatever they are working on.
        weights_dir: folder that trainer and servers see under the same path; the engine deletes
            ``version-N`` and ``version-N.partial`` in it.
        vocab_size: size of the vocabulary; an answer with a token id out of it is refused.
        timeout: seconds that one response may take.
        update_timeout: seconds that a server may take to load weights, and to come back.
        retries: how often a failed request is sent again before the call fails.
        backoff: seconds before the first retry; doubles with each one.
        concurrency: requests under way at once, all servers together.
        max_answer_bytes: size of an answer above which it is refused.
        gap_mean, gap_max: largest mean and largest single difference, in nats, between the
            server's log-probs of the probe sequences and the trainer's.
        draft_share: the probe's acceptance of drafts must be at least this share of what is
            expected, or else of the best that this run has seen; 0 switches the check of drafts
            off, for a head that is not trained.
        sampling_z: how many standard deviations the frequency of the likeliest token may be away
            from its probability; 0 switches the check off.
        require_seeds: refuse a server that ignores the seeds of requests.
        api_key: sent as a bearer token, if the servers were started with one.
        transfer: how weights get to servers: by ``folder`` in ``weights_dir``, or out of this
            process's memory, which vLLM maps (``memory``, on one machine) or fetches (``network``).

    Raises:
        EngineError: a value out of its range.
    """

    server: str
    urls: tuple[str, ...]
    weights_dir: Path
    vocab_size: int
    timeout: float = 600.0
    update_timeout: float = 900.0
    retries: int = 3
    backoff: float = 1.0
    concurrency: int = 64
    max_answer_bytes: int = 64 * 2**20
    gap_mean: float = 0.05
    gap_max: float = 2.0
    draft_share: float = 0.5
    sampling_z: float = 5.0
    require_seeds: bool = True
    api_key: str | None = field(default=None, repr=False)
    transfer: str = "folder"

    def __post_init__(self) -> None:
        if self.server not in SERVERS:
            raise EngineError(f"unknown server {self.server!r}: one of {', '.join(SERVERS)}")
        if self.transfer not in TRANSFERS:
            raise EngineError(f"transfer = {self.transfer!r}: one of {', '.join(TRANSFERS)}")
        if self.server == "sglang" and self.transfer != "folder":
            raise EngineError(f"transfer = {self.transfer}: SGLang reads folders alone: use folder")
        if not self.urls or len(set(self.urls)) != len(self.urls):
            raise EngineError(f"urls = {self.urls!r}: name each server once, at least one")
        if not Path(self.weights_dir).is_absolute():
            raise EngineError(f"weights_dir = {self.weights_dir}: must be an absolute path")
        for name in ("vocab_size", "timeout", "update_timeout", "concurrency", "max_answer_bytes"):
            if not getattr(self, name) > 0:
                raise EngineError(f"{name} = {getattr(self, name)}: must be positive")
        names = ("retries", "backoff", "gap_mean", "gap_max", "draft_share", "sampling_z")
        for name in names:
            if not getattr(self, name) >= 0:
                raise EngineError(f"{name} = {getattr(self, name)}: must not be negative")
