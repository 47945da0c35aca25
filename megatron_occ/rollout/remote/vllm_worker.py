"""Runs inside vLLM's workers: loads trunk and drafter rightly, from a folder or out of memory.

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
    """A base class of vLLM's ``Worker``; uses its ``model_runner`` and ``vllm_config``.

    Attributes:
        held_identity: of the weights that were loaded last, to their end: what the manifest says,
            or the path of a folder; "" for those of the start.
    """

    held_identity = ""

    def fetch_weights(self, manifest: str, source: str) -> dict[str, Any]:
        """Load target and drafter from the trainer's memory.

        Args:
            manifest: of ``Manifest.to_json``.
            source: see ``arrival.opened``.

        Returns:
            Tensors for the trunk under ``trunk``, their identity under ``identity``, and as
            :meth:`reload_trunk_and_head` ``drafter`` (0 without one) and ``held``.

        Raises:
            RuntimeError: they did not arrive, or hold none of the drafter's weights.
        """
        from vllm.config import set_current_vllm_config

        from megatron_occ.rollout.remote.manifest import read_manifest
        from megatron_occ.rollout.remote.vllm_fetch import fetch_into

        self.held_identity = ""
        wanted, config = read_manifest(manifest), self.vllm_config
        drafter = _drafter(self.model_runner) if config.speculative_config else None
        with set_current_vllm_config(config):
            loaded = fetch_into(self.model_runner, config, drafter, wanted, source)
        if drafter is not None and not loaded["drafter"]:
            raise RuntimeError(f"version {wanted.version} holds no weights of the drafter")
        held = _held(self.model_runner) if drafter is not None else 0
        self.held_identity = wanted.identity
        return {**loaded, "held": held, "identity": self.held_identity}

    def held_weights(self) -> dict[str, str]:
        """What this worker has loaded, under ``identity``."""
        return {"identity": self.held_identity}

    def reload_trunk(self, weights_path: str) -> None:
        """Load the target, of a server without a drafter, from a Hugging Face folder.

        Raises:
            RuntimeError: no such folder.
        """
        self.held_identity = ""
        _load_folder(self.model_runner, self.vllm_config, None, weights_path)
        self.held_identity = weights_path

    def reload_trunk_and_head(self, weights_path: str) -> dict[str, int]:
        """Load target and drafter from a Hugging Face folder.

        Returns:
            Number of the drafter's parameters that were loaded, under ``drafter``, and a number
            made of the bits that the drafter then holds, under ``held``.

        Raises:
            RuntimeError: no drafter, no such folder, or it holds none of the drafter's weights.
        """
        self.held_identity = ""
        drafter = _drafter(self.model_runner)
        loaded = _load_folder(self.model_runner, self.vllm_config, drafter, weights_path)
        if not loaded:
            raise RuntimeError(f"{weights_path} holds no weights of the drafter")
        held = _held(self.model_runner)
        self.held_identity = weights_path
        return {"drafter": loaded, "held": held}


def _drafter(runner: Any) -> Any:
    """The drafter's module: of the second model runner, or of the first."""
    owner = getattr(runner, "speculator", None) or getattr(runner, "drafter", None)
    model = getattr(owner, "model", None)
    if model is None:
        raise RuntimeError("the server has no drafter that owns weights")
    return model.unwrap() if hasattr(model, "unwrap") else model


def _held(runner: Any) -> int:
    """A fingerprint of the drafter's own parameters, without those that it shares with the target.

    On a server of several workers each has one of its part.
    """
    shared = {parameter.data_ptr() for parameter in runner.model.parameters()}
    own = [p.data for p in _drafter(runner).parameters() if p.data_ptr() not in shared]
    return fingerprint(own)


def _load_folder(runner: Any, config: Any, drafter: Any, folder: str) -> int:
    """Load both; returns the number of the drafter's parameters that were loaded."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    from megatron_occ.rollout.remote.vllm_loading import load_drafter, load_trunk

    if not Path(folder).is_dir():
        raise RuntimeError(f"{folder}: no such folder on {socket.gethostname()}")
    with set_current_vllm_config(config):
        load_trunk(runner, config.model_config, drafter, weights_path=folder)
        if drafter is None:
            return 0
        draft_config = copy.copy(config.speculative_config.draft_model_config)
        draft_config.model, draft_config.revision = folder, None
        weights = get_model_loader(config.load_config).get_all_weights(draft_config, drafter)
        return load_drafter(drafter, draft_config, weights)
