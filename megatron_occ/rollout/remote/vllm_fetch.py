"""Runs inside vLLM's workers: fetches weights from the trainer's memory and loads them.

vLLM's own engines for it (``vllm/distributed/weight_transfer``, 0.32.0) need NCCL or CUDA's handles
of memory on both sides; here tensors come by way of the CPU, and work on all devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from megatron_occ.rollout.remote.arrival import opened, tensors_of
from megatron_occ.rollout.remote.manifest import Manifest
from megatron_occ.rollout.remote.vllm_packing import pack_experts_again, pack_output_layer_again

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
        pack_experts_again(runner.model, drafter)
        with _put_in_order(runner.model, config.model_config):
            runner.reload_weights(weights_iterator=counted(tensors_of(manifest, arrived)))
        pack_output_layer_again(runner.model)
        loaded = 0
        if drafter is not None:
            weights = tensors_of(manifest, arrived, for_drafter=True)
            loaded = _load_drafter(drafter, config, weights)
    return {"trunk": given, "drafter": loaded}


def _load_drafter(model: Any, config: Any, weights: Tensors) -> int:
    """See ``vllm_worker._reload_drafter``."""
    import torch
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    model_config = config.speculative_config.draft_model_config
    with torch.no_grad(), _put_in_order(model, model_config):
        initialize_layerwise_reload(model)
        loaded = model.load_weights(weights)
        finalize_layerwise_reload(model, model_config)
    return len(loaded or ())


@contextlib.contextmanager
def _put_in_order(model: Any, model_config: Any) -> Iterator[None]:
    """End a loading that failed in the middle: the next one would go on where it stopped.

    vLLM counts what each layer has got and takes a layer as loaded at its last element
    (``vllm/model_executor/model_loader/reload/layerwise.py``, 0.32.0).
    """
    try:
        yield
    except BaseException:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        # the cause is what is told
        with contextlib.suppress(Exception):
            finalize_layerwise_reload(model, model_config)
        raise
