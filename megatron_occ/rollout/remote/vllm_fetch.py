"""Runs inside vLLM's workers: fetches weights from the trainer's memory and loads them.

vLLM's own engines for it (``vllm/distributed/weight_transfer``, 0.32.0) need NCCL or CUDA's handles
of memory on both sides; here tensors come by way of the CPU, and work on all devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from megatron_occ.rollout.remote.arrival import opened, tensors_of
from megatron_occ.rollout.remote.manifest import Manifest
from megatron_occ.rollout.remote.vllm_loading import load_drafter, load_trunk

Tensors = Iterable[tuple[str, Tensor]]


def fetch_into(runner: Any, config: Any, drafter: Any, manifest: Manifest, source: str) -> Any:
    """Load trunk and drafter with the tensors of a manifest.

    Args:
        runner: vLLM's model runner.
        config: its configuration.
        drafter: module of the drafter; None: the server does not draft.
        manifest: of the version.
        source: see ``arrival.opened``.

    Returns:
        Numbers of parameters loaded: ``trunk`` (tensors that it was given) and ``drafter``.

    Raises:
        ArrivalError: they did not arrive; what is loaded then is not to be used.
    """
    given = 0

    def counted(tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
        nonlocal given
        for each in tensors:
            given += 1
            yield each

    with opened(manifest, source) as arrived:
        tensors = counted(tensors_of(manifest, arrived))
        load_trunk(runner, config.model_config, drafter, weights_iterator=tensors)
        loaded = 0
        if drafter is not None:
            weights = tensors_of(manifest, arrived, for_drafter=True)
            loaded = load_drafter(drafter, config.speculative_config.draft_model_config, weights)
    return {"trunk": given, "drafter": loaded}
