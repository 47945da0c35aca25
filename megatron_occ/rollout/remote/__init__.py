"""Rollouts by vLLM or SGLang servers: requests over HTTP, weights over a disk or out of memory."""

from megatron_occ.rollout.remote.engine import RemoteEngine
from megatron_occ.rollout.remote.probe import Probe
from megatron_occ.rollout.remote.settings import RemoteSettings

__all__ = ["Probe", "RemoteEngine", "RemoteSettings"]
