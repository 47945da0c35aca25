"""Runs inside vLLM's workers: loads the weights of the drafter too.

``--worker-extension-cls megatron_occ.rollout.remote.vllm_worker.ReloadExtension`` adds the class
to vLLM's ``Worker``; ``/collective_rpc`` calls its method by name. vLLM's own ``reload_weights``
loads the target model alone (``GPUModelRunner.reload_weights``, 0.16.0 to 0.32.0).
"""

from __future__ import annotations

import copy
import socket
from pathlib import Path
from typing import Any

from megatron_occ.rollout.remote.fingerprint import fingerprint


class ReloadExtension:
    """A base class of vLLM's ``Worker``; uses its ``model_runner`` and ``vllm_config``."""

    def reload_trunk_and_head(self, weights_path: str) -> dict[str, int]:
        """Load target and drafter from a Hugging Face folder.

        Returns:
            Number of the drafter's parameters that were loaded, under ``drafter``, and a number
            made of the bits that the drafter then holds, under ``held``.

        Raises:
            RuntimeError: no drafter, no such folder, or it holds none of the drafter's weights.
        """
        from vllm.config import set_current_vllm_config

        if not Path(weights_path).is_dir():
            raise RuntimeError(f"{weights_path}: no such folder on {socket.gethostname()}")
        with set_current_vllm_config(self.vllm_config):
            _lay_out_experts_anew(self.model_runner)
            self.model_runner.reload_weights(weights_path=weights_path)
            loaded = _reload_drafter(self.model_runner, self.vllm_config, weights_path)
        if not loaded:
            raise RuntimeError(f"{weights_path} holds no weights of the drafter")
        return {"drafter": loaded, "held": _held(self.model_runner)}


def _drafter(runner: Any) -> Any:
    """The drafter's module: of the second model runner, or of the first."""
    owner = getattr(runner, "speculator", None) or getattr(runner, "drafter", None)
    model = getattr(owner, "model", None)
    if model is None:
        raise RuntimeError("the server has no drafter that owns weights")
    return model.unwrap() if hasattr(model, "unwrap") else model


def _lay_out_experts_anew(runner: Any) -> None:
    for module in [*runner.model.modules(), *_drafter(runner).modules()]:
        method = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _held(runner: Any) -> int:
    """A fingerprint of the drafter's own parameters, without those that it shares with the target.

    On a server of several workers each has one of its part.
    """
    shared = {parameter.data_ptr() for parameter in runner.model.parameters()}
    own = [p.data for p in _drafter(runner).parameters() if p.data_ptr() not in shared]
    return fingerprint(own)


def _reload_drafter(runner: Any, config: Any, weights_path: str) -> int:
    """What vLLM's weight transfer engines do for a drafter, with weights from a folder.

    Source: ``vllm/distributed/weight_transfer/nccl_engine.py`` (0.30.0), ``start_weight_update``
    to ``finish_weight_update``.
    """
    import torch
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    model = _drafter(runner)
    model_config = copy.copy(config.speculative_config.draft_model_config)
    model_config.model, model_config.revision = weights_path, None
    weights = get_model_loader(config.load_config).get_all_weights(model_config, model)
    with torch.no_grad():
        initialize_layerwise_reload(model)
        loaded = model.load_weights(weights)
        finalize_layerwise_reload(model, model_config)
    return len(loaded or ())
