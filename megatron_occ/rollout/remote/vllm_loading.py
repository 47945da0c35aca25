"""Runs inside vLLM's workers: loads trunk and drafter, wherever the weights come from.

vLLM counts what each layer has got and takes a layer as loaded at its last element
(``vllm/model_executor/model_loader/reload/layerwise.py``, 0.32.0): a loading that fails in the
middle has to be ended, or the next one goes on where it stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from megatron_occ.rollout.remote.vllm_packing import pack_experts_again, pack_output_layer_again


def load_trunk(runner: Any, model_config: Any, drafter: Any, **weights: Any) -> None:
    """Load the target.

    Args:
        runner: vLLM's model runner.
        model_config: its configuration.
        drafter: module of the drafter, whose experts are packed again as well; None without one.
        weights: ``weights_path`` or ``weights_iterator``, of its ``reload_weights``.
    """
    pack_experts_again(runner.model, drafter)
    with _ended(runner.model, model_config):
        runner.reload_weights(**weights)
    pack_output_layer_again(runner.model)


def load_drafter(model: Any, model_config: Any, weights: Iterable[tuple[str, Tensor]]) -> int:
    """Load a drafter, as vLLM's weight transfer engines do.

    Source: ``vllm/distributed/weight_transfer/nccl_engine.py`` (0.30.0), ``start_weight_update``
    to ``finish_weight_update``.

    Args:
        model: see ``vllm_worker``.
        model_config: of the drafter.
        weights: names and tensors of a Hugging Face checkpoint.

    Returns:
        Number of parameters that were loaded.
    """
    with torch.no_grad(), _ended(model, model_config):
        initialize_layerwise_reload(model)
        loaded = model.load_weights(weights)
        finalize_layerwise_reload(model, model_config)
    return len(loaded or ())


@contextlib.contextmanager
def _ended(model: Any, model_config: Any) -> Iterator[None]:
    """End a loading that failed in the middle."""
    try:
        yield
    except BaseException:
        # the cause is what is told
        with contextlib.suppress(Exception):
            finalize_layerwise_reload(model, model_config)
        raise
